"""Places inside a layer where hidden states are seen while it runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from ..evaluation.hooks import StopForward, watch
from ..models.architectures import LayerAdapter
from ..plan import Kind


@dataclass(frozen=True)
class Tap:
    """A place inside a layer: of the block `kind`, what its maps `read`, the `features` that enter its output
    projection, the `residual` that its output is added to, or their `sum` (before a norm or an activation that
    follows). Of convolutions also what each gives: what enters `in_norm`, and `norm`."""

    kind: Kind
    place: str


@contextmanager
def layer_hooks(
    layer: nn.Module, adapter: LayerAdapter, taps: Sequence[Tap | None]
) -> Iterator[dict[Tap | None, Tensor]]:
    """Hooks on one layer; `with` gives the dict that they fill, and ends the pass once it is full.

    Args:
        layer: Layer that runs inside the `with` block.
        adapter: Architecture table of its model.
        taps: Places to see. None stands for the output of the layer, which the hooks leave to the caller: with it, the
            layer runs to its end.
    """
    places = {tap: adapter.place(tap.kind, tap.place) for tap in taps if tap is not None}
    residuals = {Tap(tap.kind, "residual") for tap, place in places.items() if place.when == "added"}
    places |= {tap: adapter.place(tap.kind, tap.place) for tap in residuals}
    wanted = {*taps, *residuals}
    found: dict[Tap | None, Tensor] = {}

    def record(tap: Tap, tensor: Tensor) -> None:
        added = places[tap].when == "added"
        found[tap] = found[Tap(tap.kind, "residual")] + tensor if added else tensor
        if wanted <= found.keys():
            raise StopForward

    modules = {
        tap: (layer.get_submodule(place.module), "before" if place.when == "before" else "after")
        for tap, place in places.items()
    }
    with watch(modules, record):
        yield found
