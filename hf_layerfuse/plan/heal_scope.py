"""What healing needs to know of the plan of a fused model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .match import Match


@dataclass(frozen=True)
class HealScope:
    """Parts of a fused model that `heal` compares, freezes and mixes; `heal_scope` finds them by the plan.

    Attributes:
        matches: Pairs of modules that `hidden_weight` and `attention_weight` compare, such as `layer_map` finds.
        frozen: Names of parameters that are not trained, such as `fused_parameters` finds.
        mixed: Source tensors of mixed parameters, by name, such as `mixed_weights` finds.
        threshold: Threshold of the later `linearize_mlps`, for `Blend` edits. Checkpoints with any a < 1 - threshold
            are not eligible as best.
    """

    matches: Sequence[Match] = ()
    frozen: Collection[str] = ()
    mixed: Mapping[str, Sequence[Any]] | None = None  # tensors, which this folder does not import
    threshold: float | None = None
