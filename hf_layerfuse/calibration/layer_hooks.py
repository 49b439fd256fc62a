"""Places inside a layer where hidden states are seen while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..models.architectures import LayerAdapter, Place
from ..plan import Kind


@dataclass(frozen=True)
class Tap:
    """A place inside a layer: of the block `kind`, what its maps `read`, the `features` that enter its output
    projection, the `residual` that its output is added to, or their `sum` (before a norm or an activation that
    follows). Of convolutions also what each gives: what enters `in_norm`, and `norm`."""

    kind: Kind
    place: str


class Seen(Exception):
    """Everything asked for was seen: the rest of the layer need not run."""


class Taps:
    """Hooks on one layer; `with` gives the dict that they fill."""

    def __init__(self, layer: nn.Module, adapter: LayerAdapter, taps: Sequence[Tap | None]) -> None:
        self.layer, self.adapter, self.wanted = layer, adapter, set(taps)
        self.found: dict[Tap | None, Tensor] = {}
        self.handles: list[Any] = []

    def __enter__(self) -> dict[Tap | None, Tensor]:
        places = {tap: self.adapter.place(tap.kind, tap.place) for tap in self.wanted - {None}}
        residuals = {Tap(tap.kind, "residual") for tap, place in places.items() if place.when == "added"}
        places |= {tap: self.adapter.place(tap.kind, tap.place) for tap in residuals}
        self.wanted |= residuals
        for tap, place in places.items():
            self._hook(tap, place)
        return self.found

    def _hook(self, tap: Tap, place: Place) -> None:
        def before(module: nn.Module, args: tuple) -> None:
            self._keep(tap, args[0])

        def after(module: nn.Module, args: tuple, output: Tensor) -> None:
            self._keep(tap, output if place.when == "after" else self.found[Tap(tap.kind, "residual")] + output)

        module = self.layer.get_submodule(place.module)
        hook = module.register_forward_pre_hook(before) if place.when == "before" else None
        self.handles.append(hook or module.register_forward_hook(after))

    def _keep(self, tap: Tap, tensor: Tensor) -> None:
        self.found[tap] = tensor
        if self.wanted <= self.found.keys():
            raise Seen

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()
