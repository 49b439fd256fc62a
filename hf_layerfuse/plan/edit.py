"""What can be done to blocks, and how that is written as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal, get_args

from ..errors import PlanError
from .layout import BlendedForm, LinearForm, MergedForm, Operator, Source

Kind = Literal["layer", "attention", "mlp", "conv"]
Mode = Literal["depth", "share", "basis"]
Align = Literal["none", "permutation", "activation", "transport", "rotation"]


def _layer_indices(layers: tuple[int, ...], what: str) -> None:
    if not all(type(layer) is int for layer in layers):
        raise PlanError(f"{what} is {layers!r}; layers are counted from 0 in whole numbers.")


def _one_of(value: object, allowed: object, what: str) -> None:
    if value not in get_args(allowed):
        raise PlanError(f"{what} is {value!r}; allowed: {', '.join(map(repr, get_args(allowed)))}.")


class _Edit:
    """What a plan asks of every edit."""

    layers: tuple[int, ...]
    source: Source | None
    shares: ClassVar[bool] = False
    """Whether the blocks stay where they are, and share weights."""

    def becomes(self) -> dict[int, Source | None]:
        """Layer -> where its block comes from in the result, or None for a block that is gone.

        Blocks that share weights are not in it: they stay, and a `Tie` says where their weights come from.
        """
        return dict.fromkeys(self.layers, self.source)


class _OneLayer(_Edit):
    """An edit of a block of one layer."""

    layer: int

    @property
    def layers(self) -> tuple[int, ...]:
        return (self.layer,)


@dataclass(frozen=True)
class Fuse(_Edit):
    """Several blocks become one.

    In `depth` mode the fused block runs once, at the depth of the first of `layers`, which must be neighbours.
    In `share` mode one set of weight matrices serves every one of these depths; norms and biases stay per depth, and
    so does a residual of `rank` on every matrix (Relaxed Recursive Transformers, Bae et al. 2024).
    In `basis` mode the matrices of the group are combinations, per depth, of one shared basis of `rank` vectors
    (Basis Sharing, Wang et al. 2024). A rank is for every linear map of the blocks; a map with fewer dimensions gets
    as many as it has, and then loses nothing.

    `operator` says how the weights of the group become one, save for a basis, which is made of all of them: `keep` is
    the layer that `freeze` keeps, by default the one nearest the middle; `weights` are the shares that `weighted`
    gives to the layers, which sum to one. `align` is the symmetry of the blocks that is undone before their weights
    are combined.

    Attributes:
        kind: of the blocks: `attention`, `mlp` or `conv`; or whole `layer`s.
        layers: of the original, counted from 0, in ascending order: two or more.
        mode: what runs: one block (`depth`), or all with weights in common (`share`, `basis`).
        operator: how the weights become one.
        keep: one of `layers`, for the operators `freeze` and `select`.
        weights: a share for each of `layers`, for the operator `weighted`.
        align: symmetry that is undone first.
        rank: of the residual of each depth, or size of the basis.

    Raises:
        PlanError: values that contradict each other.
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
                f"Fuse.layers is {self.layers}: in depth mode they must be neighbours, because the fused block runs "
                "once. Use mode='share' for blocks that are apart."
            )
        self._check_operator()
        self._check_rank()

    def _check_operator(self) -> None:
        if self.keep is not None and (self.operator not in ("freeze", "select") or self.keep not in self.layers):
            raise PlanError(
                f"Fuse.keep is {self.keep!r}: it names the one of layers {self.layers} that operator 'freeze' keeps, "
                f"or 'select' starts from, and the operator is {self.operator!r}."
            )
        if self.operator == "select" and self.mode != "depth":
            raise PlanError(f"operator 'select' chooses what runs once, and the mode is {self.mode!r}: use 'depth'.")
        if (self.weights is not None) != (self.operator == "weighted"):
            raise PlanError(f"Fuse.weights is {self.weights}, the operator {self.operator!r}: 'weighted' needs them.")
        if self.weights is not None and not (
            len(self.weights) == len(self.layers)
            and all(isinstance(w, float | int) and w >= 0 for w in self.weights)
            and abs(sum(self.weights) - 1) < 1e-6
        ):
            raise PlanError(f"Fuse.weights is {self.weights}: give {len(self.layers)} shares that sum to one.")

    def _check_rank(self) -> None:
        if type(self.rank) is not int or self.rank < 0:
            raise PlanError(f"Fuse.rank is {self.rank!r}: use a whole number of 0 or more.")
        if self.mode == "depth" and self.rank:
            raise PlanError(f"Fuse.rank is {self.rank} in depth mode, where nothing is shared: use mode='share'.")
        if self.mode == "basis" and not self.rank:
            raise PlanError("mode='basis' needs Fuse.rank, the number of basis vectors that the layers share.")

    @property
    def source(self) -> Source:
        """Where the weights of the fused block come from."""
        return Source(self.layers, self.operator, self.keep, self.weights)

    @property
    def shares(self) -> bool:
        return self.mode != "depth"

    def becomes(self) -> dict[int, Source | None]:
        if self.shares:
            return {}
        return dict.fromkeys(self.layers) | {self.layers[0]: self.source}


@dataclass(frozen=True)
class Drop(_OneLayer):
    """A block is removed; the residual stream passes through.

    The norm in front of the block goes with it; a norm that follows the residual sum (BERT) stays, unless the whole
    layer goes.

    Attributes:
        kind: of the block: `attention`, `mlp` or `conv`; or a whole `layer`.
        layer: of the original, counted from 0.
    """

    kind: Kind
    layer: int
    edit: ClassVar[str] = "drop"

    def __post_init__(self) -> None:
        _one_of(self.kind, Kind, "Drop.kind")
        _layer_indices(self.layers, "Drop.layer")

    @property
    def source(self) -> None:
        """None: the block is gone."""
        return None


@dataclass(frozen=True)
class Linearize(_OneLayer):
    """The MLP of a layer becomes one linear map of the stream (LayerCollapse, Shabgahi et al. 2023).

    With a `rank`, that is the product of two maps, which is smaller below half the width of the stream. An MLP of fewer
    units than that is such a product in any case.

    With `fold`, the map becomes I + A and takes the residual sum in, which is exact where a norm follows the sum
    (BERT, RoBERTa). A dropout in front of the sum has no place in it, so that such a model is to be trained before.

    Attributes:
        layer: of the original, counted from 0.
        rank: of the map; None is one full map.
        fold: the map takes in the residual sum behind it.

    Raises:
        PlanError: a rank that is no rank, or beside `fold`.
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
                f"Linearize.rank is {self.rank}, and with fold the map is the identity and more, of full rank: leave "
                "one of them out."
            )

    @property
    def source(self) -> Source:
        """Where the weights of the map come from."""
        return Source(self.layers, form=LinearForm(self.rank, self.fold))


@dataclass(frozen=True)
class Blend(_OneLayer):
    """The activation of an MLP is on its way to a line: (1 - a) act(z) + a (s z + t), with one a that is trained.

    At a = 0, where it starts, the model is the original, and at a = 1 the MLP is linear: `straighten` puts one map in
    its place. That is the homotopy of LayerCollapse (Shabgahi et al. 2023). Slope and offset of each unit come from
    calibration batches, or are 1 and 0. A `faithful` one is PReLU, as published: of a ReLU in the place of whatever
    was there, with slope 1, offset 0 and a = 0.01 at first.

    Attributes:
        layer: of the original, counted from 0.
        faithful: PReLU, as published.
    """

    layer: int
    faithful: bool = False
    kind: ClassVar[Kind] = "mlp"
    edit: ClassVar[str] = "blend"

    def __post_init__(self) -> None:
        _layer_indices(self.layers, "Blend.layer")

    @property
    def source(self) -> Source:
        """Where the weights of the MLP come from."""
        return Source(self.layers, form=BlendedForm(self.faithful))


@dataclass(frozen=True)
class MergeConvs(_Edit):
    """Convolutions start + 1 to end of a chain become one (LayerMerge, Kim et al. 2024).

    Activations between them go, and of the convolutions themselves all but those in `keep`. What is left is linear, and
    one convolution computes it, once all padding is put around the input of the first: that differs at the borders of
    images. Behind the segment comes an activation, also where there was none.

    A segment of one convolution has its batch norm folded, and nothing else changes; also the first convolution of all,
    between boundaries -1 and 0, can be one. Without any in `keep`, its one convolution is taken out, and the activation
    behind it stays.

    With `merged=False`, the convolutions in `keep` remain for now, to be trained; `merge_convs` makes them one then,
    exactly.

    Attributes:
        start: boundary in front of the segment; boundary i is behind convolution i, and -1 is the input.
        end: boundary behind it.
        keep: convolutions that it is made of, in ascending order.
        merged: whether they are one already.

    Raises:
        PlanError: no segment, or convolutions outside of it.
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
                f"MergeConvs.start is {self.start} and end {self.end}: segments are from a boundary, -1 or more, to a "
                "later one."
            )
        if (
            not (self.keep or len(self.layers) == 1)
            or list(self.keep) != sorted(set(self.keep))
            or not set(self.keep) <= set(self.layers)
        ):
            raise PlanError(
                f"MergeConvs.keep is {self.keep}: name one convolution or more of {self.start + 1} to {self.end}, in "
                "ascending order."
            )

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(range(self.start + 1, self.end + 1))

    @property
    def source(self) -> Source:
        """Where the weights of one of the convolutions come from."""
        return Source(self.layers, form=MergedForm())


Edit = Fuse | Drop | Linearize | Blend | MergeConvs
_EDITS: Mapping[str, type[Edit]] = {kind.edit: kind for kind in (Fuse, Drop, Linearize, Blend, MergeConvs)}

_RARE = frozenset({"weights", "align", "rank", "faithful", "fold", "merged"})


def write_edit(edit: Edit) -> dict[str, Any]:
    """JSON types of an edit; what few edits have, such as `rank`, is left out of those that have it not."""
    rare = {f.name: f.default for f in fields(edit) if f.name in _RARE or f.default is None}
    values = {k: v for k, v in asdict(edit).items() if k not in rare or v != rare[k]}
    return {"edit": edit.edit, **values}


def read_edit(tree: Mapping[str, Any]) -> Edit:
    """Read what `write_edit` gives.

    Raises:
        PlanError: an edit that this release does not know, or one that contradicts itself.
    """
    values = dict(tree)
    name = values.pop("edit")
    if name not in _EDITS:
        raise PlanError(f"unknown edit {name!r}; this release knows: {', '.join(_EDITS)}.")
    return _EDITS[name](**values)
