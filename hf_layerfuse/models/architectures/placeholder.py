"""A placeholder for removed parts of any signature."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn


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
