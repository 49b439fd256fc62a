# From hf_layerfuse 0.1.0; SPDX-License-Identifier: Apache-2.0
"""Activations on their way to a straight line: the homotopy of LayerCollapse (Shabgahi et al. 2023)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Homotopy(nn.Module):
    """(1 - a) act(z) + a (slope z + offset): at a = 0 the activation, to the bit, and at a = 1 a line for each unit.

    Of a ReLU, with slope 1 and offset 0, it is PReLU.

    Attributes:
        a: (1,), trained, `start` at first; one for all units.
        slope: (units,), of the lines.
        offset: (units,).
    """

    def __init__(self, act: nn.Module, units: int, start: float = 0.0, **like: Any) -> None:
        super().__init__()
        self.act, self.start = act, start
        self.a = nn.Parameter(torch.full((1,), start, **like))
        self.register_buffer("slope", torch.ones(units, **like))
        self.register_buffer("offset", torch.zeros(units, **like))

    def forward(self, z: Tensor) -> Tensor:
        bent = self.act(z)
        return bent + self.a[0].to(z.dtype) * (self.line(z) - bent)

    def line(self, z: Tensor) -> Tensor:
        """What the activation becomes."""
        return self.slope.to(z.dtype) * z + self.offset.to(z.dtype)

    def __repr__(self) -> str:
        return f"Homotopy({self.act!r}, units={len(self.slope)})"
