"""Homotopy penalty, which moves activations to their lines during training."""

from __future__ import annotations

import torch
from torch import nn

from ..models.modules.homotopy import Homotopy
from .sharding import full_tensor, set_parameter


class HomotopyPenalty:
    """Penalty sum (1 - a)^2 on the activations of a model, decoupled from the loss and the optimiser.

    The task pushes an a by about the learning rate in each step of Adam, so that 1 - a settles near 1 / (2 strength).

    Args:
        model: Model with `Homotopy` activations.
        strength: Strength g of the penalty; 0 leaves the activations to the task.
        progressive: Whether activations move one after the other, from the last layer on, each in an equal part
            of the training, and held at their start until then. Otherwise all move together.
    """

    def __init__(self, model: nn.Module, strength: float, *, progressive: bool = False) -> None:
        self.strength, self.progressive = strength, progressive
        self.activations = {name: part for name, part in model.named_modules() if isinstance(part, Homotopy)}

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Parameters a of all activations."""
        return [homotopy.a for homotopy in self.activations.values()]

    @property
    def values(self) -> dict[str, float]:
        """Value a of each activation by its path; if sharded, all processes must call this."""
        return {name: full_tensor(homotopy.a).item() for name, homotopy in self.activations.items()}

    @torch.no_grad()
    def step(self, rate: float, share: float = 1.0) -> None:
        """Update a <- a - 2 rate g (a - 1), clamped to [0, 1], after the optimiser's step.

        Args:
            rate: Learning rate of that step.
            share: Share of the training that is done, measured by the sum of the rates.
        """
        for place, homotopy in enumerate(reversed(self.activations.values())):
            a = homotopy.a
            if self.progressive and share * len(self.activations) <= place:
                set_parameter(a, torch.full_like(a, homotopy.start))
            else:
                set_parameter(a, (a - 2 * rate * self.strength * (a - 1)).clamp(0, 1))
