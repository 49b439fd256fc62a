"""Maps of the coordinates of a head that leave the function of its block unchanged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Planes:
    """A rotation in each of some planes, and any orthogonal map of the other coordinates.

    Attributes:
        first: First coordinate of each plane.
        second: Second coordinate of each plane.
    """

    first: tuple[int, ...]
    second: tuple[int, ...]

    def free(self, dim: int) -> list[int]:
        """Coordinates of a head of width `dim` that are in no plane."""
        return sorted(set(range(dim)) - {*self.first, *self.second})


Turn = Literal["none", "any"] | Planes
"""The identity only, any orthogonal map, or rotations in planes."""
