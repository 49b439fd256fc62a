"""Activations that training turns into a straight line: the homotopy of LayerCollapse (Shabgahi et al. 2023)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Homotopy(nn.Module):
    """(1 - a) act(z) + a (slope z + offset): exactly the activation at a = 0, and one line per unit at a = 1.

    With a ReLU, slope 1 and offset 0, this is PReLU.

    Attributes:
        a: Trained parameter of shape (1,), shared by all units; initially `start`.
        slope: Slope of each line, (units,).
        offset: Offset of each line, (units,).
    """

    def __init__(self, act: nn.Module, units: int, start: float = 0.0, **like: Any) -> None:
        super().__init__()
        self.act, self.start = act, start
        self.a = nn.Parameter(torch.full((1,), start, **like))
        self.register_buffer("slope", torch.ones(units, **like))
        self.register_buffer("offset", torch.zeros(units, **like))

    def forward(self, z: Tensor) -> Tensor:
        activated = self.act(z)
        return activated + self.a[0].to(z.dtype) * (self.line(z) - activated)

    def line(self, z: Tensor) -> Tensor:
        """Value of the line at z, which is the output at a = 1."""
        return self.slope.to(z.dtype) * z + self.offset.to(z.dtype)

    def __repr__(self) -> str:
        return f"Homotopy({self.act!r}, units={len(self.slope)})"
