# From hf_layerfuse 0.1.0; SPDX-License-Identifier: Apache-2.0
"""The shape of the model that a plan leads to: which layers there are, and where their blocks come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Operator = Literal["mean", "weighted", "freeze", "mix", "telescope", "select"]


@dataclass(frozen=True)
class LinearForm:
    """What a block is that has become linear: one map, or with a `rank` the product of two; with `fold`, the one map
    also gives what the residual sum would add to it."""

    rank: int | None = None
    fold: bool = False


@dataclass(frozen=True)
class BlendedForm:
    """What an MLP is whose activation is on its way to a line; `faithful` as published, from a ReLU."""

    faithful: bool = False


@dataclass(frozen=True)
class MergedForm:
    """What a convolution is that is one with others of its segment."""


@dataclass(frozen=True)
class Source:
    """The original layers whose blocks make one block of the result, how their weights become one, and the `form` that
    the block has then, if it is another than it had."""

    layers: tuple[int, ...]
    operator: Operator = "freeze"
    keep: int | None = None
    weights: tuple[float, ...] | None = None
    form: LinearForm | BlendedForm | MergedForm | None = None

    @property
    def linear(self) -> LinearForm | None:
        """The form of a block that has become linear."""
        return self.form if isinstance(self.form, LinearForm) else None

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
        """Whether the stock class with fewer layers can hold it: every layer whole and of its form, nothing shared."""
        sources = [source for slot in self.slots for source in slot.blocks.values()]
        return not self.ties and all(source is not None and source.form is None for source in sources)
