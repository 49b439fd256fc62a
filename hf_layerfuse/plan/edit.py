"""Edits of blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from ..errors import PlanError
from .layout import BlendedForm, LinearForm, MergedForm, Operator, Source

Kind = Literal["layer", "attention", "cross", "mlp", "conv"]
Mode = Literal["depth", "share", "basis"]
Align = Literal["none", "permutation", "activation", "transport", "rotation"]


def _layer_indices(layers: tuple[int, ...], what: str) -> None:
    if not all(type(layer) is int for layer in layers):
        raise PlanError(f"{what} is {layers!r}: use whole numbers, counted from 0.")


def _one_of(value: object, allowed: object, what: str) -> None:
    if value not in get_args(allowed):
        raise PlanError(f"{what} is {value!r}; allowed: {', '.join(map(repr, get_args(allowed)))}.")


class _Edit:
    """Interface that a plan requires of every edit."""

    layers: tuple[int, ...]
    source: Source | None
    shares: ClassVar[bool] = False
    """Whether the blocks stay at their depths and share weights."""
    align: ClassVar[Align] = "none"
    """Symmetry to remove before the weights of the blocks are combined."""

    def becomes(self) -> dict[int, Source | None]:
        """Source of each layer's block in the result, by layer; None for a removed block.

        Blocks that share weights are omitted. They stay, and a `Tie` names the source of their weights.
        """
        return dict.fromkeys(self.layers, self.source)

    def includes(self, other: Edit) -> bool:
        """Whether this edit does all that the other does, or more, so that its loss is at least as large."""
        return False


class _OneLayer(_Edit):
    """An edit of one layer's block."""

    layer: int

    @property
    def layers(self) -> tuple[int, ...]:
        return (self.layer,)


@dataclass(frozen=True)
class Fuse(_Edit):
    """Several blocks become one.

    In `depth` mode, the fused block runs once, at the depth of the first of `layers`. The layers must be neighbours.
    In `share` mode, one set of weight matrices serves all these depths. Norms and biases stay per depth, and so does a
    residual of `rank` on every matrix (Relaxed Recursive Transformers, Bae et al. 2024).
    In `basis` mode, the matrices at each depth are combinations of one shared basis of `rank` vectors (Basis Sharing,
    Wang et al. 2024). The rank applies to every linear map of the blocks. A map with fewer dimensions uses all of
    them, and is then exact.

    `operator` combines the weights of the group; a basis always uses all of them. `keep` is the layer that `freeze`
    keeps, by default the one nearest the middle. `weights` are the shares of the layers for `weighted`; they sum to
    one. `align` removes a symmetry of the blocks before their weights are combined.

    Attributes:
        kind: Kind of the blocks: `attention`, `cross` (cross-attention), `mlp` or `conv`, or `layer` for whole layers.
        layers: Two or more layers of the original, counted from 0, in ascending order.
        mode: Result of the edit: one block (`depth`), or all blocks with shared weights (`share`, `basis`).
        operator: Operator that combines the weights.
        keep: Member of `layers`, for the operators `freeze` and `select`.
        weights: Share of each of `layers`, for the operator `weighted`.
        align: Symmetry to remove first.
        rank: Rank of the residual at each depth, or size of the basis.

    Raises:
        PlanError: The values contradict each other.
    """

    kind: Kind
    layers: tuple[int, ...]
    mode: Mode = "depth"
    operator: Operator = "freeze"
    keep: int | None = None
    weights: tuple[float, ...] | None = None
    align: Align = "none"
    rank: int = 0
    edit: ClassVar[str] = "fuse"

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        if self.weights is not None:
            object.__setattr__(self, "weights", tuple(self.weights))
        _one_of(self.kind, Kind, "Fuse.kind")
        _one_of(self.mode, Mode, "Fuse.mode")
        _one_of(self.operator, Operator, "Fuse.operator")
        _one_of(self.align, Align, "Fuse.align")
        _layer_indices(self.layers, "Fuse.layers")
        if len(self.layers) < 2 or list(self.layers) != sorted(set(self.layers)):
            raise PlanError(f"Fuse.layers is {self.layers}: give two or more different layers in ascending order.")
        if self.mode == "depth" and self.layers[-1] - self.layers[0] != len(self.layers) - 1:
            raise PlanError(
                f"Fuse.layers is {self.layers}: in depth mode the layers must be neighbours, because the fused block "
                "runs once. Use mode='share' for blocks that are apart."
            )
        self._check_operator()
        self._check_rank()

    def _check_operator(self) -> None:
        if self.keep is not None and (self.operator not in ("freeze", "select") or self.keep not in self.layers):
            raise PlanError(
                f"Fuse.keep is {self.keep!r} with operator {self.operator!r}: use one of layers {self.layers}, with "
                "operator 'freeze', which keeps that layer, or 'select', which starts from it."
            )
        if self.operator == "select" and self.mode != "depth":
            raise PlanError(f"Fuse.mode is {self.mode!r}: operator 'select' needs mode='depth'.")
        if (self.weights is not None) != (self.operator == "weighted"):
            raise PlanError(
                f"Fuse.weights is {self.weights} with operator {self.operator!r}: give weights with operator "
                "'weighted', and with no other."
            )
        if self.weights is not None and not (
            len(self.weights) == len(self.layers)
            and all(isinstance(w, float | int) and w >= 0 for w in self.weights)
            and abs(sum(self.weights) - 1) < 1e-6
        ):
            raise PlanError(
                f"Fuse.weights is {self.weights}: give {len(self.layers)} shares of 0 or more that sum to one."
            )

    def _check_rank(self) -> None:
        if type(self.rank) is not int or self.rank < 0:
            raise PlanError(f"Fuse.rank is {self.rank!r}: use a whole number of 0 or more.")
        if self.mode == "depth" and self.rank:
            raise PlanError(f"Fuse.rank is {self.rank} in depth mode, which shares no weights: use mode='share'.")
        if self.mode == "basis" and not self.rank:
            raise PlanError("mode='basis' needs Fuse.rank, the number of basis vectors that the layers share.")

    @property
    def source(self) -> Source:
        """Source of the fused block's weights."""
        return Source(self.layers, self.operator, self.keep, self.weights)

    @property
    def shares(self) -> bool:
        return self.mode != "depth"

    def becomes(self) -> dict[int, Source | None]:
        if self.shares:
            return {}
        return dict.fromkeys(self.layers) | {self.layers[0]: self.source}

    def includes(self, other: Edit) -> bool:
        return isinstance(other, Fuse) and other.kind == self.kind and set(other.layers) <= set(self.layers)


@dataclass(frozen=True)
class Drop(_OneLayer):
    """A block is removed, and the residual stream passes through.

    The norm before the block is removed too. A norm that follows the residual sum (BERT) stays, unless the whole layer
    is removed.

    Attributes:
        kind: Kind of the block: `attention`, `cross` (cross-attention), `mlp` or `conv`, or `layer` for a whole layer.
        layer: Layer of the original, counted from 0.
    """

    kind: Kind
    layer: int
    edit: ClassVar[str] = "drop"

    def __post_init__(self) -> None:
        _one_of(self.kind, Kind, "Drop.kind")
        _layer_indices(self.layers, "Drop.layer")

    @property
    def source(self) -> None:
        """None, because the block is removed."""
        return None

    def includes(self, other: Edit) -> bool:
        one_block = isinstance(other, Drop | Linearize) and other.layer == self.layer
        return one_block and self.kind in ("layer", other.kind)


@dataclass(frozen=True)
class Linearize(_OneLayer):
    """The MLP of a layer becomes one linear map of the residual stream (LayerCollapse, Shabgahi et al. 2023).

    With a `rank`, the map is a product of two maps. The product is smaller than one map if the rank is below half the
    width of the stream. An MLP with fewer hidden units than that always becomes a product.

    With `fold`, the map becomes I + A and includes the residual sum. This is exact if a norm follows the sum (BERT,
    RoBERTa). The folded map cannot contain the dropout before the sum, so train such a model before folding.

    Attributes:
        layer: Layer of the original, counted from 0.
        rank: Rank of the map; None gives one full map.
        fold: Whether the map includes the residual sum that follows it.

    Raises:
        PlanError: The rank is not a positive whole number, or is combined with `fold`.
    """

    layer: int
    rank: int | None = None
    fold: bool = False
    kind: ClassVar[Kind] = "mlp"
    edit: ClassVar[str] = "linearize"

    def __post_init__(self) -> None:
        _layer_indices(self.layers, "Linearize.layer")
        if self.rank is not None and (type(self.rank) is not int or self.rank < 1):
            raise PlanError(
                f"Linearize.rank is {self.rank!r}: use a whole number of 1 or more, or None for a full map."
            )
        if self.fold and self.rank is not None:
            raise PlanError(
                f"Linearize.rank is {self.rank}, but with fold the map contains the identity, which has full rank: "
                "leave out the rank or fold."
            )

    @property
    def source(self) -> Source:
        """Source of the map's weights."""
        return Source(self.layers, form=LinearForm(self.rank, self.fold))


@dataclass(frozen=True)
class Blend(_OneLayer):
    """The activation of an MLP moves towards a line: (1 - a) act(z) + a (s z + t), with one trainable a.

    At a = 0, the start, the model is the original. At a = 1 the MLP is linear, and `linearize_mlps` replaces it by one
    map. This is the homotopy of LayerCollapse (Shabgahi et al. 2023). Slope s and offset t of each unit come from
    calibration batches; without batches they are 1 and 0. With `faithful`, the activation is a PReLU, as published: a
    ReLU replaces the original activation, with slope 1, offset 0 and a = 0.01 at the start.

    Attributes:
        layer: Layer of the original, counted from 0.
        faithful: Whether the activation is a PReLU, as published.
    """

    layer: int
    faithful: bool = False
    kind: ClassVar[Kind] = "mlp"
    edit: ClassVar[str] = "blend"

    def __post_init__(self) -> None:
        _layer_indices(self.layers, "Blend.layer")

    @property
    def source(self) -> Source:
        """Source of the MLP's weights."""
        return Source(self.layers, form=BlendedForm(self.faithful))


@dataclass(frozen=True)
class MergeConvs(_Edit):
    """Convolutions start + 1 to end of a conv graph become one convolution (LayerMerge, Kim et al. 2024).

    The edit removes the activations inside the segment, and all convolutions except those in `keep`. The rest is
    linear, so one convolution computes it. All padding moves in front of the first convolution, which changes the
    result at the borders of images. An activation follows the segment, even if the original has none there.

    In a segment of one convolution, the batch norm is folded and nothing else changes. The first convolution of the
    conv graph, between boundaries -1 and 0, can be such a segment. If `keep` is empty, the one convolution is removed
    and the activation after it stays.

    With `merged=False`, the convolutions in `keep` remain separate for training. `merge_convs` then merges them
    exactly.

    Attributes:
        start: Boundary before the segment. Boundary i follows convolution i, and -1 is the input.
        end: Boundary after the segment.
        keep: Convolutions that make up the merged one, in ascending order.
        merged: Whether the convolutions are already one.

    Raises:
        PlanError: The boundaries enclose no segment, or `keep` has convolutions outside the segment.
    """

    start: int
    end: int
    keep: tuple[int, ...]
    merged: bool = True
    kind: ClassVar[str] = "convolution"
    edit: ClassVar[str] = "merge"

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", tuple(self.keep))
        _layer_indices((self.start, self.end, *self.keep), "MergeConvs.start, end and keep")
        if self.start < -1 or self.end <= self.start:
            raise PlanError(
                f"MergeConvs.start is {self.start} and end is {self.end}: use a start of -1 or more, and a later end."
            )
        if (
            not (self.keep or len(self.layers) == 1)
            or list(self.keep) != sorted(set(self.keep))
            or not set(self.keep) <= set(self.layers)
        ):
            raise PlanError(
                f"MergeConvs.keep is {self.keep}: give one or more of the convolutions {self.start + 1} to {self.end}, "
                "in ascending order."
            )

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(range(self.start + 1, self.end + 1))

    @property
    def source(self) -> Source:
        """Source of the merged convolution's weights."""
        return Source(self.layers, form=MergedForm())


Edit = Fuse | Drop | Linearize | Blend | MergeConvs
