"""Candidate edits of consecutive blocks, which compete for a latency budget, and their importance."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedModel

from ..evaluation.cache import MeasurementCache
from ..evaluation.fingerprint import fingerprint
from ..math.knapsack import Option
from ..plan import Edit


@dataclass(frozen=True)
class Candidate:
    """Candidate edit of the blocks between two boundaries.

    Attributes:
        start: Boundary before the blocks.
        end: Boundary after the blocks.
        edit: Edit of the blocks; None keeps them.
    """

    start: int
    end: int
    edit: Edit | None

    @property
    def changes(self) -> bool:
        """Whether the blocks change."""
        return self.edit is not None

    def overlaps(self, other: Candidate) -> bool:
        """Return whether both candidates are for a common block."""
        return self.start < other.end and other.start < self.end

    def includes(self, other: Candidate) -> bool:
        """Return whether this edit includes the other, so that its loss is expected to be at least as large."""
        return self.changes and other.changes and self != other and self.edit.includes(other.edit)


def edits_of(candidates: Iterable[Candidate]) -> tuple[Edit, ...]:
    """Return the edits of some candidates, front to back."""
    return tuple(each.edit for each in sorted(candidates, key=lambda each: each.start) if each.changes)


def options_of(values: Mapping[Candidate, float], cost: Callable[[Any], float]) -> dict[tuple[int, int], list[Option]]:
    """Return the options of a knapsack between each pair of boundaries: candidates with their values and costs."""
    options: dict[tuple[int, int], list[Option]] = {}
    for candidate, value in values.items():
        option = Option(cost(candidate), value, candidate)
        options.setdefault((candidate.start, candidate.end), []).append(option)
    return options


def loss_cache(model: PreTrainedModel, path: Path | None, **conditions: Any) -> MeasurementCache:
    """Open the measurement cache of calibration losses; `conditions` are the data and the fit, as JSON types."""
    about = {"weights": fingerprint(model), "dtype": str(model.dtype).removeprefix("torch."), **conditions}
    return MeasurementCache(path, about | {"transformers": transformers.__version__})
