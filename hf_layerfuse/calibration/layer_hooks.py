"""Hook points: places inside a layer where its hidden states are recorded while it runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from ..evaluation.hooks import StopForward, When, watch
from ..models.architectures import LayerArchitecture, part_at
from ..plan import Kind


@dataclass(frozen=True)
class HookPoint:
    """A place inside a layer where a hook records the hidden states.

    Attributes:
        kind: Kind of the block that contains the place.
        place: Name of the place: `read`, the input of the block's first maps; `features`, the input of its output
            projection; `output`, the output of that projection; `residual`, the stream to which it is added; `sum`, the
            result of that addition, before any norm or activation. The blocks of a convolutional network also have
            `in_norm` and `norm`, the inputs of their batch norms.
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
    sides = {"before": "before", "after": "after", "added": "after"}
    modules: dict[HookPoint | Literal["input"], tuple[nn.Module, When]] = {}
    for point, place in places.items():
        module = part_at(layer, place.module)
        # a removed block adds nothing to the input of the layer
        modules[point] = (layer, "before") if module is None else (module, sides[place.when])
    added = {point for point, place in places.items() if place.when == "added" and modules[point][0] is not layer}
    if added:
        modules["input"] = layer, "before"
    found: dict[HookPoint | None, Tensor] = {}
    start: list[Tensor] = []

    def record(point: HookPoint | Literal["input"], tensor: Tensor) -> None:
        if point == "input":
            start.append(tensor)
            return
        if point in added:
            found[point] = start[0] + tensor
        else:  # Falcon adds the output of one block to that of the other in place
            found[point] = tensor.clone() if modules[point][1] == "after" else tensor
        if found.keys() >= set(points):
            raise StopForward

    with watch(modules, record):
        yield found
