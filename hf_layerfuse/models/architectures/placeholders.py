"""Modules in place of removed parts, with which a layer runs without a block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from .layouts import JointLayout


class ZeroAttention(nn.Module):
    """Placeholder for a removed attention module: contributes nothing, attends to nothing, caches nothing."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        return torch.zeros_like(hidden_states), None


class ZeroBlock(nn.Module):
    """Placeholder for a removed MLP, or for a mixer that returns no attention weights: contributes nothing."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros_like(hidden_states)


class UnitGate(nn.Module):
    """Placeholder for the removed gate of an MLP: multiplies by one."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states.new_ones(())


class IdentityWithUnitGate(nn.Module):
    """Placeholder for the removed joint map of an MLP: returns its input, with ones in place of the gate.

    Args:
        layout: Layout of the joint map, "gate_first" or "gate_last".
    """

    def __init__(self, layout: JointLayout) -> None:
        super().__init__()
        self.layout = layout

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        ones = torch.ones_like(hidden_states)
        return torch.cat([ones, hidden_states] if self.layout == "gate_first" else [hidden_states, ones], dim=-1)


class Placeholder(nn.Module):
    """Placeholder for a removed part with any arguments and outputs. Subclasses state them.

    Attributes:
        outputs: Number of values that the part returns as a tuple; None if it returns one tensor.
        passed: Place among the outputs -> place or name of the argument that is returned there. The first output is
            zeros of the shape of the first tensor unless it is listed here; all others are None.
    """

    outputs: ClassVar[int | None] = None
    passed: ClassVar[Mapping[int, int | str]] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        def argument(key: int | str) -> Any:
            return kwargs.get(key) if isinstance(key, str) else args[key] if key < len(args) else None

        found = [argument(self.passed[place]) if place in self.passed else None for place in range(self.outputs or 1)]
        if 0 not in self.passed:
            found[0] = torch.zeros_like(next(x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)))
        return found[0] if self.outputs is None else tuple(found)
