"""All decisions of one compression, and the shape of its result."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import PlanError
from .edit import Edit
from .edit_json import read_edit, write_edit
from .layout import Layout, Slot, Source, Tie
from .notes import PlanNotes

FORMAT_VERSION = 1

TRANSFORMER = ("attention", "mlp")
"""Kinds of blocks in a transformer layer."""

DECODER = ("attention", "cross", "mlp")
"""Kinds of blocks in a transformer layer that also attends to the states of an encoder."""

CONV_GRAPH_KINDS = ("convolution",)
"""Kinds of blocks in a plan that merges convolutions: each convolution is a layer of one block."""


@dataclass(frozen=True)
class Plan:
    """All decisions of one compression: `edits` on a model of `num_layers` layers of architecture `model_type`.

    `notes` records the basis of the edits (recipe, distances, scores). Applying the plan does not read it.

    Attributes:
        model_type: `config.model_type` of the original.
        num_layers: Number of layers of the original; for a conv graph, number of its convolutions.
        edits: Edits of the blocks. Blocks without an edit stay as they are.
        notes: Recipe and measurements behind the edits. A mapping of JSON types is converted.
        kinds: Kinds of blocks in a layer, in the order in which they run: `("attention", "mlp")`,
            `("attention", "cross", "mlp")`, `("conv",)`, or for a conv graph `("convolution",)`. A plan of the first
            kinds for a stack with cross-attention moves the cross-attention with its layer.
        stack: Name of the stack of layers in models that have several, such as `decoder`; empty in others.

    Raises:
        PlanError: An edit names a layer or a kind of block that does not exist, two edits claim the same block, the
            edits remove all blocks of a kind, or the notes cannot be read.
    """

    model_type: str
    num_layers: int
    edits: tuple[Edit, ...] = ()
    notes: PlanNotes = field(default_factory=PlanNotes, compare=False)
    kinds: tuple[str, ...] = TRANSFORMER
    stack: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "edits", tuple(self.edits))
        object.__setattr__(self, "kinds", tuple(self.kinds))
        if not isinstance(self.notes, PlanNotes):
            object.__setattr__(self, "notes", PlanNotes.from_dict(self.notes))
        claimed: dict[tuple[str, int], Edit] = {}
        for edit in self.edits:
            for layer in edit.layers:
                if not 0 <= layer < self.num_layers:
                    raise PlanError(f"{edit} names layer {layer}; the model has layers 0 to {self.num_layers - 1}.")
                for kind in self._kinds(edit):
                    if (kind, layer) in claimed:
                        raise PlanError(
                            f"{edit} and {claimed[kind, layer]} both claim the {kind} block of layer {layer}: "
                            "keep one edit."
                        )
                    claimed[kind, layer] = edit
        slots = self.layout().slots
        for kind in self.kinds:
            if not any(slot.source(kind) for slot in slots):
                raise PlanError(f"the plan removes every {kind} block: keep at least one.")

    def layout(self) -> Layout:
        """The shape of the result. A layer without any remaining block is removed."""
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
        """Kinds of the blocks that an edit changes."""
        if edit.kind != "layer" and edit.kind not in self.kinds:
            raise PlanError(
                f"{edit} has a kind that layers of {self.model_type!r} do not have: use 'layer', or one of "
                f"{', '.join(self.kinds)}."
            )
        return self.kinds if edit.kind == "layer" else (edit.kind,)

    def to_dict(self, *, notes: bool = True) -> dict[str, Any]:
        """The plan as JSON types.

        Args:
            notes: Whether to include the notes.
        """
        tree = {
            "format_version": FORMAT_VERSION,
            "model_type": self.model_type,
            "num_layers": self.num_layers,
            **({} if self.kinds == TRANSFORMER else {"kinds": list(self.kinds)}),
            **({"stack": self.stack} if self.stack else {}),
            "edits": [write_edit(edit) for edit in self.edits],
        }
        return {**tree, "notes": self.notes.to_dict()} if notes else tree

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Plan:
        """Read a plan from JSON types.

        Raises:
            PlanError: The JSON is not a valid plan, or its format is newer than this release.
        """
        if not isinstance(tree, Mapping) or "format_version" not in tree:
            raise PlanError(f"not a plan: {str(tree)[:80]!r} has no format_version.")
        if tree["format_version"] != FORMAT_VERSION:
            raise PlanError(
                f"the plan has format version {tree['format_version']!r}, and this release of hf_layerfuse reads "
                f"version {FORMAT_VERSION}: for a newer one, upgrade with `pip install -U hf-layerfuse`."
            )
        try:
            edits = tuple(read_edit(edit) for edit in tree["edits"])
            kinds = tree.get("kinds", TRANSFORMER)
            notes, stack = tree.get("notes", {}), str(tree.get("stack", ""))
            return cls(str(tree["model_type"]), int(tree["num_layers"]), edits, notes, kinds, stack)
        except PlanError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise PlanError(f"not a readable plan: {type(error).__name__}: {error}.") from error

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan from JSON text, as `to_json` returns it.

        Raises:
            PlanError: The text is not JSON or not a valid plan, or its format is newer than this release.
        """
        try:
            return cls.from_dict(json.loads(text))
        except json.JSONDecodeError as error:
            raise PlanError(f"not JSON: {error}.") from error

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a `plan.json`.

        Raises:
            PlanError: The file does not exist, is not text, JSON or a valid plan, or its format is newer than this
                release.
        """
        path = Path(path)
        if not path.is_file():
            raise PlanError(f"no plan at {path}: give the path of a plan.json that fuse.py wrote.")
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise PlanError(f"{path} is not text: give the path of a plan.json that fuse.py wrote.") from error
