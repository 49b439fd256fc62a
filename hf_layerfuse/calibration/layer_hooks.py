"""Places inside a layer where hidden states are seen while it runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from ..evaluation.hooks import StopForward, watch
from ..models.architectures import LayerArchitecture
from ..plan import Kind


@dataclass(frozen=True)
class HookPoint:
    """A place inside a layer where a hook sees the hidden states.

    Attributes:
        kind: Kind of block that the place belongs to.
        place: `read`, the input of the block's first maps; `features`, the input of its output projection; `residual`,
            the stream that its output is added to; `sum`, the result, before a norm or an activation that follows. The
            blocks of a convolutional network also have `in_norm` and `norm`, the inputs of their batch norms.
    """

    kind: Kind
    place: str


@contextmanager
def layer_hooks(
    layer: nn.Module, architecture: LayerArchitecture, points: Sequence[HookPoint | None]
) -> Iterator[dict[HookPoint | None, Tensor]]:
    """Hooks on one layer; `with` gives the dict that they fill, and ends the pass once it is full.

    Args:
        layer: Layer that runs inside the `with` block.
        architecture: Architecture table of its model.
        points: Places to see. None stands for the output of the layer, which the caller adds to the dict: with None,
            the layer runs to its end.
    """
    places = {point: architecture.place(point.kind, point.place) for point in points if point is not None}
    residuals = {HookPoint(point.kind, "residual") for point, place in places.items() if place.when == "added"}
    places |= {point: architecture.place(point.kind, point.place) for point in residuals}
    wanted = {*points, *residuals}
    found: dict[HookPoint | None, Tensor] = {}

    def record(point: HookPoint, tensor: Tensor) -> None:
        added = places[point].when == "added"
        found[point] = found[HookPoint(point.kind, "residual")] + tensor if added else tensor
        if wanted <= found.keys():
            raise StopForward

    modules = {
        point: (layer.get_submodule(place.module), "before" if place.when == "before" else "after")
        for point, place in places.items()
    }
    with watch(modules, record):
        yield found
