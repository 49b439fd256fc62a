"""The shape of a plan's result: its layers, and the source of each block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Operator = Literal["mean", "weighted", "freeze", "mix", "telescope", "select"]


@dataclass(frozen=True)
class LinearForm:
    """Form of a linearised block: one map, or with a `rank` a product of two; with `fold`, the map includes the
    residual sum."""

    rank: int | None = None
    fold: bool = False


@dataclass(frozen=True)
class BlendedForm:
    """Form of an MLP whose activation moves towards a line; with `faithful`, from a ReLU, as published."""

    faithful: bool = False


@dataclass(frozen=True)
class MergedForm:
    """Form of a convolution that is merged with others of its segment."""


@dataclass(frozen=True)
class Source:
    """Origin of one block of the result: the original layers, the operator that combines their weights, and the new
    `form` of the block, if its form changes."""

    layers: tuple[int, ...]
    operator: Operator = "freeze"
    keep: int | None = None
    weights: tuple[float, ...] | None = None
    form: LinearForm | BlendedForm | MergedForm | None = None

    @property
    def linear(self) -> LinearForm | None:
        """The form of a linearised block; None for any other block."""
        return self.form if isinstance(self.form, LinearForm) else None

    @property
    def kept(self) -> int:
        """The layer that `freeze` keeps: `keep`, or the layer nearest the middle (the later of two)."""
        return self.layers[len(self.layers) // 2] if self.keep is None else self.keep


@dataclass(frozen=True)
class Slot:
    """One layer of the result.

    Attributes:
        layers: Original depths that this layer replaces.
        blocks: Source of each block, by kind, in the order in which the blocks run; None for a removed block.
    """

    layers: tuple[int, ...]
    blocks: Mapping[str, Source | None]

    def source(self, kind: str | None) -> Source | None:
        """Source of the block `kind`; None stands for modules outside the blocks."""
        if kind is not None:
            return self.blocks.get(kind)
        return self.whole or Source(self.layers[:1])

    @property
    def whole(self) -> Source | None:
        """Common source of all blocks; None if their sources differ or a block is removed."""
        first, *others = self.blocks.values()
        return first if all(other == first for other in others) else None


@dataclass(frozen=True)
class Tie:
    """Blocks of the result, by position, that share one set of weight matrices made from `source`.

    In mode `share` with a `rank`, each depth adds a residual of that rank. In mode `basis`, the matrices are
    combinations of a shared basis of `rank` vectors.
    """

    kind: Literal["attention", "cross", "mlp", "conv"]
    slots: tuple[int, ...]
    source: Source
    mode: Literal["share", "basis"] = "share"
    rank: int = 0


@dataclass(frozen=True)
class Layout:
    """The shape of a plan's result: its layers, and the blocks that share weights."""

    slots: tuple[Slot, ...]
    ties: tuple[Tie, ...]

    @property
    def is_stock(self) -> bool:
        """Whether the stock class with fewer layers fits: no block is removed, changes its form or shares weights."""
        sources = [source for slot in self.slots for source in slot.blocks.values()]
        return not self.ties and all(source is not None and source.form is None for source in sources)
