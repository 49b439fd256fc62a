"""Places inside a layer where hidden states are seen while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .adapters import LayerAdapter
from .plan import Kind


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
        if not self.adapter.post_norm:  # nothing but the addition itself sees the sum
            sums = [tap for tap in self.wanted if tap and tap.place == "sum" and tap.kind != "conv"]
            self.wanted |= {Tap(tap.kind, "residual") for tap in sums}
        for tap in self.wanted - {None}:
            self._hook(tap)
        return self.found

    def _hook(self, tap: Tap) -> None:
        """Where a place can be seen: what enters a module, or what leaves it."""
        table = self.adapter.table(tap.kind)
        if tap.kind == "conv":
            self._before(tap, table["act" if tap.place == "sum" else "out" if tap.place == "features" else tap.place])
            return
        post, attention = self.adapter.post_norm, self.adapter.attention
        if tap.place == "features":
            self._before(tap, table["out"])
        elif tap.place == "sum":
            self._before(tap, table["norm"]) if post else self._added(tap, table["out"])
        elif tap.place == "read" and not post:
            self._after(tap, table["norm"])
        elif tap.kind == "attention":
            self._before(tap, "")
        elif post:
            self._after(tap, attention["norm"])
        else:
            self._before(tap, table["norm"])

    def _before(self, tap: Tap, path: str) -> None:
        module = self.layer.get_submodule(path)
        self.handles.append(module.register_forward_pre_hook(lambda module, args: self._keep(tap, args[0])))

    def _after(self, tap: Tap, path: str) -> None:
        module = self.layer.get_submodule(path)
        self.handles.append(module.register_forward_hook(lambda module, args, output: self._keep(tap, output)))

    def _added(self, tap: Tap, path: str) -> None:
        def add(module: nn.Module, args: tuple, output: Tensor) -> None:
            self._keep(tap, self.found[Tap(tap.kind, "residual")] + output)

        self.handles.append(self.layer.get_submodule(path).register_forward_hook(add))

    def _keep(self, tap: Tap, tensor: Tensor) -> None:
        self.found[tap] = tensor
        if self.wanted <= self.found.keys():
            raise Seen

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()
