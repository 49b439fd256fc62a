"""All decisions of one compression, and the shape that they lead to."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import PlanError
from .edit import Edit, read_edit, write_edit
from .layout import Layout, Slot, Source, Tie

FORMAT_VERSION = 1

TRANSFORMER = ("attention", "mlp")
"""The kinds of blocks that a layer of a transformer has."""

CHAIN = ("convolution",)
"""What a plan that merges convolutions is of: its layers are the convolutions of a chain, each one block."""


@dataclass(frozen=True)
class Plan:
    """All decisions of one compression: `edits` on a model of `num_layers` layers of architecture `model_type`.

    `kinds` are the blocks of a layer, in the order in which they run. `notes` holds what the edits were decided from
    (recipe, distances, scores); nothing reads it to apply the plan.

    Attributes:
        model_type: `config.model_type` of the original.
        num_layers: of the original; for a chain, its convolutions.
        edits: what becomes of which blocks.
        notes: JSON types.
        kinds: `("attention", "mlp")`, `("conv",)`, or of a chain `("convolution",)`.

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
            for layer, source in edit.becomes().items():
                blocks[kind][layer] = source

        kept = [i for i in range(self.num_layers) if any(sources[i] for sources in blocks.values())]
        ends = [*kept[1:], self.num_layers]
        slots = tuple(
            Slot(tuple(range(start, end)), {kind: sources[start] for kind, sources in blocks.items()})
            for start, end in zip(kept, ends, strict=True)
        )
        ties = tuple(
            Tie(kind, tuple(kept.index(layer) for layer in edit.layers), edit.source, edit.mode, edit.rank)
            for kind, edit in self._by_block()
            if edit.shares
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
            "edits": [write_edit(edit) for edit in self.edits],
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
            edits = tuple(read_edit(edit) for edit in tree["edits"])
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
