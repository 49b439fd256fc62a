"""Hook points: places inside a layer where its hidden states are recorded while it runs."""

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
    """A place inside a layer where a hook records the hidden states.

    Attributes:
        kind: Kind of the block that contains the place.
        place: Name of the place: `read`, the input of the block's first maps; `features`, the input of its output
            projection; `residual`, the stream to which its output is added; `sum`, the result of that addition, before
            any norm or activation. The blocks of a convolutional network also have `in_norm` and `norm`, the inputs of
            their batch norms.
    """

    kind: Kind
    place: str


@contextmanager
def layer_hooks(
    layer: nn.Module, architecture: LayerArchitecture, points: Sequence[HookPoint | None]
) -> Iterator[dict[HookPoint | None, Tensor]]:
    """Record the hidden states at hook points of one layer, in the dict that `with` returns.

    The forward pass stops once the dict has all points.

    Args:
        layer: Layer that runs inside the `with` block.
        architecture: Architecture table of its model.
        points: Hook points to record. None stands for the output of the layer. The caller adds the output to the dict,
            so that with None the layer runs to its end.
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
