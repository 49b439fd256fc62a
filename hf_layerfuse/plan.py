"""A plan: which blocks of a model become what. Readable JSON, no torch, no parameter names."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from .errors import PlanError

FORMAT_VERSION = 1

Kind = Literal["layer", "attention", "mlp", "conv"]
TRANSFORMER = ("attention", "mlp")
"""The kinds of blocks that a layer of a transformer has."""

Mode = Literal["depth", "share", "basis"]
Operator = Literal["mean", "weighted", "freeze", "mix", "telescope", "select"]
Align = Literal["none", "permutation", "activation", "transport", "rotation"]


def _layer_indices(layers: tuple[int, ...], what: str) -> None:
    if not all(type(layer) is int for layer in layers):
        raise PlanError(f"{what} is {layers!r}; layers are counted from 0 in whole numbers.")


def _one_of(value: object, allowed: object, what: str) -> None:
    if value not in get_args(allowed):
        raise PlanError(f"{what} is {value!r}; allowed: {', '.join(map(repr, get_args(allowed)))}.")


@dataclass(frozen=True)
class Fuse:
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


@dataclass(frozen=True)
class Drop:
    """A block is removed; the residual stream passes through.

    The norm in front of the block goes with it; a norm that follows the residual sum (BERT) stays, unless the whole
    layer goes.
    """

    kind: Kind
    layer: int
    edit: ClassVar[str] = "drop"

    def __post_init__(self) -> None:
        _one_of(self.kind, Kind, "Drop.kind")
        _layer_indices(self.layers, "Drop.layer")

    @property
    def layers(self) -> tuple[int, ...]:
        return (self.layer,)


Edit = Fuse | Drop
_EDITS: Mapping[str, type[Edit]] = {kind.edit: kind for kind in (Fuse, Drop)}


@dataclass(frozen=True)
class Source:
    """The original layers whose blocks make one block of the result, and how their weights become one."""

    layers: tuple[int, ...]
    operator: Operator = "freeze"
    keep: int | None = None
    weights: tuple[float, ...] | None = None

    @property
    def kept(self) -> int:
        """The layer that `freeze` keeps: `keep`, or the one nearest the middle, the later of two."""
        return self.layers[len(self.layers) // 2] if self.keep is None else self.keep


@dataclass(frozen=True)
class Slot:
    """One layer of the result.

    Attributes:
        layers: the original depths it stands for.
        blocks: kind -> where that block comes from, in the order in which they run; None is a block that is gone.
    """

    layers: tuple[int, ...]
    blocks: Mapping[str, Source | None]

    def source(self, kind: str | None) -> Source | None:
        """Where the block `kind` comes from; None asks for what belongs to no block, such as cross-attention."""
        if kind is not None:
            return self.blocks.get(kind)
        return self.whole or Source(self.layers[:1])

    @property
    def whole(self) -> Source | None:
        """Where all blocks come from; None where they come from different layers, or one is gone."""
        first, *others = self.blocks.values()
        return first if all(other == first for other in others) else None


@dataclass(frozen=True)
class Tie:
    """Blocks of the result, by position, that share one set of weight matrices made from `source`.

    With mode `share` and a `rank`, each depth adds a residual of that rank; with mode `basis`, the matrices are
    combinations of a shared basis of `rank` vectors.
    """

    kind: Literal["attention", "mlp", "conv"]
    slots: tuple[int, ...]
    source: Source
    mode: Literal["share", "basis"] = "share"
    rank: int = 0


@dataclass(frozen=True)
class Layout:
    """The shape of the model that a plan leads to."""

    slots: tuple[Slot, ...]
    ties: tuple[Tie, ...]

    @property
    def is_stock(self) -> bool:
        """Whether the stock class with fewer layers can hold it: every layer whole, nothing shared."""
        return not self.ties and all(source for slot in self.slots for source in slot.blocks.values())


@dataclass(frozen=True)
class Plan:
    """All decisions of one compression: `edits` on a model of `num_layers` layers of architecture `model_type`.

    `kinds` are the blocks of a layer, in the order in which they run. `notes` holds what the edits were decided from
    (recipe, distances, scores); nothing reads it to apply the plan.

    Raises:
        PlanError: an edit names a layer or a kind of block that is not there, two edits claim the same block, or
            nothing is left.
    """

    model_type: str
    num_layers: int
    edits: tuple[Edit, ...] = ()
    notes: Mapping[str, Any] = field(default_factory=dict, compare=False)
    kinds: tuple[str, ...] = TRANSFORMER

    def __post_init__(self) -> None:
        object.__setattr__(self, "edits", tuple(self.edits))
        object.__setattr__(self, "kinds", tuple(self.kinds))
        claimed: dict[tuple[str, int], Edit] = {}
        for edit in self.edits:
            for layer in edit.layers:
                if not 0 <= layer < self.num_layers:
                    raise PlanError(f"{edit} names layer {layer}; the model has layers 0 to {self.num_layers - 1}.")
                for kind in self._kinds(edit):
                    if (kind, layer) in claimed:
                        raise PlanError(
                            f"{edit} and {claimed[kind, layer]} both claim the {kind} block of layer {layer}: "
                            "keep one of them."
                        )
                    claimed[kind, layer] = edit
        slots = self.layout().slots
        for kind in self.kinds:
            if not any(slot.source(kind) for slot in slots):
                raise PlanError(f"the plan removes every {kind} block: keep at least one.")

    def layout(self) -> Layout:
        """The shape of the result. A layer that loses all of its blocks is removed as a whole."""
        blocks: dict[str, list[Source | None]] = {
            kind: [Source((layer,)) for layer in range(self.num_layers)] for kind in self.kinds
        }
        for kind, edit in self._by_block():
            if isinstance(edit, Drop):
                blocks[kind][edit.layer] = None
            elif edit.mode == "depth":
                blocks[kind][edit.layers[0]] = edit.source
                for layer in edit.layers[1:]:
                    blocks[kind][layer] = None

        kept = [i for i in range(self.num_layers) if any(sources[i] for sources in blocks.values())]
        ends = [*kept[1:], self.num_layers]
        slots = tuple(
            Slot(tuple(range(start, end)), {kind: sources[start] for kind, sources in blocks.items()})
            for start, end in zip(kept, ends, strict=True)
        )
        ties = tuple(
            Tie(kind, tuple(kept.index(layer) for layer in edit.layers), edit.source, edit.mode, edit.rank)
            for kind, edit in self._by_block()
            if isinstance(edit, Fuse) and edit.mode != "depth"
        )
        return Layout(slots, ties)

    def _by_block(self) -> Iterator[tuple[Any, Edit]]:
        for edit in self.edits:
            for kind in self._kinds(edit):
                yield kind, edit

    def _kinds(self, edit: Edit) -> tuple[str, ...]:
        """The kinds of blocks that an edit is of."""
        if edit.kind != "layer" and edit.kind not in self.kinds:
            raise PlanError(
                f"{edit} is of a kind that layers of {self.model_type!r} do not have: use 'layer', or one of "
                f"{', '.join(self.kinds)}."
            )
        return self.kinds if edit.kind == "layer" else (edit.kind,)

    def to_dict(self, *, notes: bool = True) -> dict[str, Any]:
        """The plan as JSON types, `notes` included or not."""
        tree = {
            "format_version": FORMAT_VERSION,
            "model_type": self.model_type,
            "num_layers": self.num_layers,
            **({} if self.kinds == TRANSFORMER else {"kinds": list(self.kinds)}),
            "edits": [_write_edit(edit) for edit in self.edits],
        }
        return {**tree, "notes": dict(self.notes)} if notes else tree

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Plan:
        """Read a plan from JSON types.

        Raises:
            PlanError: written by a newer format, or not a plan.
        """
        if not isinstance(tree, Mapping) or "format_version" not in tree:
            raise PlanError(f"not a plan: {str(tree)[:80]!r} has no format_version.")
        if tree["format_version"] != FORMAT_VERSION:
            raise PlanError(
                f"the plan has format version {tree['format_version']!r}, this release of hf_layerfuse reads "
                f"{FORMAT_VERSION}: for a newer one, upgrade with `pip install -U hf-layerfuse`."
            )
        try:
            edits = tuple(_read_edit(edit) for edit in tree["edits"])
            kinds = tree.get("kinds", TRANSFORMER)
            return cls(str(tree["model_type"]), int(tree["num_layers"]), edits, tree.get("notes", {}), kinds)
        except PlanError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise PlanError(f"not a readable plan: {type(error).__name__}: {error}.") from error

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read what `to_json` wrote. Raises `PlanError` as `from_dict` does."""
        try:
            return cls.from_dict(json.loads(text))
        except json.JSONDecodeError as error:
            raise PlanError(f"not JSON: {error}.") from error

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a `plan.json`. Raises `PlanError` as `from_dict` does, or when there is no such file."""
        path = Path(path)
        if not path.is_file():
            raise PlanError(f"no plan at {path}: give the path of a plan.json that fuse.py wrote.")
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise PlanError(f"{path} is not text: give the path of a plan.json that fuse.py wrote.") from error


def _write_edit(edit: Edit) -> dict[str, Any]:
    """JSON types of an edit; what few edits have, such as `rank`, is left out of those that have it not."""
    rare = {f.name: f.default for f in fields(edit) if f.name in ("keep", "weights", "align", "rank")}
    values = {k: v for k, v in asdict(edit).items() if k not in rare or v != rare[k]}
    return {"edit": edit.edit, **values}


def _read_edit(tree: Mapping[str, Any]) -> Edit:
    values = dict(tree)
    name = values.pop("edit")
    if name not in _EDITS:
        raise PlanError(f"unknown edit {name!r}; this release knows: {', '.join(_EDITS)}.")
    return _EDITS[name](**values)
