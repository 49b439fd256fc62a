"""What draws activations to their lines while a model is trained."""

from __future__ import annotations

import torch
from torch import nn

from ..models.modules.homotopy import Homotopy
from .sharding import whole, write


class Pull:
    """Draws the activations of a model to their lines: sum (1 - a)^2, decoupled from the loss and the optimiser.

    The task pushes an a by about the learning rate in each step of Adam, so that 1 - a settles near 1 / (2 strength).

    Args:
        model: whose homotopies are pulled, see `Homotopy`.
        strength: g; 0 leaves them to the task.
        progressive: one after the other, from the last layer on, each in an equal part of the training; until then it
            is held where it starts. Otherwise all together.
    """

    def __init__(self, model: nn.Module, strength: float, *, progressive: bool = False) -> None:
        self.strength, self.progressive = strength, progressive
        self.activations = {name: part for name, part in model.named_modules() if isinstance(part, Homotopy)}

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Every a."""
        return [homotopy.a for homotopy in self.activations.values()]

    @property
    def values(self) -> dict[str, float]:
        """The a of each activation, by its path; where they are sharded, all processes ask."""
        return {name: whole(homotopy.a).item() for name, homotopy in self.activations.items()}

    @torch.no_grad()
    def step(self, rate: float, share: float = 1.0) -> None:
        """a <- a - 2 rate g (a - 1), and no further than 0 or 1; after the optimiser's step, with its learning rate.

        Args:
            rate: of that step.
            share: of the training that is done, as the sum of the rates tells.
        """
        for place, homotopy in enumerate(reversed(self.activations.values())):
            a = homotopy.a
            if self.progressive and share * len(self.activations) <= place:
                write(a, torch.full_like(a, homotopy.start))
            else:
                write(a, (a - 2 * rate * self.strength * (a - 1)).clamp(0, 1))
