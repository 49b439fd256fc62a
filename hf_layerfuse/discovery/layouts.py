"""Layouts of a block's maps, found by symmetries: changes to the outputs of maps that leave a layer as it is.

In an attention block, a factor on the queries and its inverse on their keys cancel in the scores. A factor on values
and its inverse on the columns of `out` that read them cancel in the output. Both also hold for rotary positions,
position biases and shared keys, and only if the rows of a joint map are divided correctly. Heads can change places
unless each has its own position bias. A rotation of all queries and keys cancels only if it commutes with the rotation
by position.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from .stacks import RAISED, LayerCall, first_tensor, near

_FACTOR = 2.0
_ANGLE = 0.7

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class AttentionLayout:
    """Layout of an attention block.

    Attributes:
        joint: Layout of a joint map of queries, keys and values: `parts` or `groups`; None without such a map.
        pairing: Coordinates of a head that rotate together: `halves` or `neighbours`; None without rotary positions.
        bound_heads: Whether heads cannot change places.
    """

    joint: str | None
    pairing: str | None
    bound_heads: bool


@torch.no_grad()
def attention_layout(
    layer: nn.Module, call: LayerCall, roles: Mapping[str, str], config: PreTrainedConfig
) -> AttentionLayout | str:
    """Find the layout of an attention block, or say why it is unknown.

    Args:
        layer: Layer of the block.
        call: Call of the layer.
        roles: Role -> path, with `out`, and `qkv` or `q`, `k` and `v`.
        config: Config that states the heads.

    Returns:
        The layout, or the reason why none is found.
    """
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        return "the config states no num_attention_heads"
    block = _Attention(layer, call, roles, heads)
    stated = getattr(config, "num_key_value_heads", None) or heads
    for groups in dict.fromkeys([stated, getattr(config, "num_kv_heads", None) or heads, heads, 1]):
        for joint in ("parts", "groups") if "qkv" in roles else (None,):
            rows = block.rows(joint, groups)
            if rows is not None and block.is_divided_into(rows):
                pairing = block.pairing(rows, config)
                if pairing == "unknown":
                    return "its rotary positions pair the coordinates of a head in an unknown way"
                if groups != stated:
                    return (
                        f"they share {groups} keys and values, which num_key_value_heads of the config does not state"
                    )
                return AttentionLayout(joint, pairing, not block.can_exchange(rows))
    return "no known division into heads leaves the output as it is"


Rows = dict[str, Tensor]
"""Rows of each head in the output of its map, (heads, width), of `q`, `k` and `v`."""


class _Attention:
    """An attention block whose maps can be changed for one run of its layer."""

    def __init__(self, layer: nn.Module, call: LayerCall, roles: Mapping[str, str], heads: int) -> None:
        self.layer, self.call, self.roles, self.heads = layer, call, roles, heads
        self.sizes: dict[str, int] = {}
        self.expected = self.run({role: self._measure(role) for role in roles if role != "norm"})

    def _measure(self, role: str) -> Change:
        def measure(states: Tensor) -> Tensor:
            self.sizes[role] = states.shape[-1]
            return states

        return measure

    def run(self, changes: Mapping[str, Change]) -> Tensor:
        """Output of the layer with changed outputs of some maps; `out` stands for the input of that map."""
        with ExitStack() as hooks:
            for role, change in changes.items():
                module = self.layer.get_submodule(self.roles[role])

                def after(_: nn.Module, args: Any, output: Tensor, change: Change = change) -> Tensor:
                    return change(output)

                def before(_: nn.Module, args: tuple[Any, ...], change: Change = change) -> tuple[Any, ...]:
                    return (change(args[0]), *args[1:])

                add = module.register_forward_pre_hook if role == "out" else module.register_forward_hook
                hooks.callback(add(before if role == "out" else after).remove)
            return first_tensor(self.call.run(self.layer))

    def rows(self, joint: str | None, groups: int) -> Rows | None:
        """Rows of each head, or None if the maps do not divide in this way."""
        sizes = self.sizes
        if joint is None:
            counts = {"q": self.heads, "k": groups, "v": groups}
            if any(role not in sizes or sizes[role] % count for role, count in counts.items()):
                return None
            return {role: torch.arange(sizes[role]).view(count, -1) for role, count in counts.items()}
        slots, every = self.heads + 2 * groups, torch.arange(sizes["qkv"])
        if len(every) % slots or self.heads % groups:
            return None
        width = len(every) // slots
        if joint == "parts":
            parts = every.split([self.heads * width, groups * width, groups * width])
            return {role: part.view(-1, width) for role, part in zip("qkv", parts, strict=True)}
        each = every.view(groups, -1, width)
        return {"q": each[:, :-2].reshape(self.heads, width), "k": each[:, -2], "v": each[:, -1]}

    def is_divided_into(self, rows: Rows) -> bool:
        """Whether factors on the parts of the last group cancel, and do not without each other."""
        per = self.heads // len(rows["k"])
        queries, key, value = rows["q"][-per:].flatten(), rows["k"][-1], rows["v"][-1]
        columns = self._columns(rows)[-per:].flatten()
        up, down = _FACTOR, 1 / _FACTOR
        try:
            scores = self.run(self._on_rows({"q": _scaled(queries, up), "k": _scaled(key, down)}, wide_norms=True))
            values = self.run({**self._on_rows({"v": _scaled(value, up)}), "out": _scaled(columns, down)})
            alone = self.run(self._on_rows({"v": _scaled(value, up)}))
        except RAISED:
            return False
        return near(scores, self.expected) and near(values, self.expected) and not near(alone, self.expected)

    def can_exchange(self, rows: Rows) -> bool:
        """Whether the first and the last group of heads can change places, or two heads of a single group."""
        groups = len(rows["k"])
        per = self.heads // groups
        if self.heads == 1:
            return True
        ends = (slice(0, per), slice(self.heads - per, None)) if groups > 1 else (slice(0, 1), slice(-1, None))
        changes = {"q": _exchanged(*(rows["q"][end].flatten() for end in ends))}
        if groups > 1:
            changes |= {role: _exchanged(rows[role][0], rows[role][-1]) for role in "kv"}
        columns = self._columns(rows)
        moved = {"out": _exchanged(*(columns[end].flatten() for end in ends))}
        return near(self.run({**self._on_rows(changes, wide_norms=True), **moved}), self.expected)

    def pairing(self, rows: Rows, config: PreTrainedConfig) -> str | None:
        """Coordinates that rotate together; None without rotary positions, `unknown` if no rotation cancels."""
        rope = getattr(config, "rope_parameters", None)
        if not rope:
            return None
        width = rows["q"].shape[1]
        stated = {
            float(each.get("partial_rotary_factor", 1.0)) for each in (rope, *rope.values()) if isinstance(each, dict)
        }
        for rotary in sorted({int(width * share) for share in stated}):
            half = rotary // 2
            pairs = {
                "halves": (torch.arange(half), torch.arange(half, 2 * half)),
                "neighbours": (torch.arange(0, 2 * half, 2), torch.arange(1, 2 * half, 2)),
            }
            for name, planes in pairs.items():
                turns = self._on_rows({role: _turned(rows[role], planes) for role in "qk"})
                for role in "qk":
                    if (normed := self.sizes.get(f"{role}_norm")) is not None:  # the positions come after the norm
                        turns.pop(role, None)
                        turns[f"{role}_norm"] = _turned(torch.arange(normed).view(-1, width), planes)
                if "q_norm" in turns:
                    turns.pop("qkv", None)
                if near(self.run(turns), self.expected):
                    return name
        return "unknown"

    def _columns(self, rows: Rows) -> Tensor:
        """Columns of `out` that read each head."""
        return torch.arange(self.heads * rows["v"].shape[1]).view(self.heads, -1)

    def _on_rows(self, changes: Mapping[str, Change], wide_norms: bool = False) -> dict[str, Change]:
        """Changes of `q`, `k` and `v` as changes of the maps, or of norms of all heads behind them."""
        if "qkv" in self.roles:

            def joint(states: Tensor) -> Tensor:
                for change in changes.values():
                    states = change(states)
                return states

            return {"qkv": joint}
        found = {}
        for role, change in changes.items():
            wide = wide_norms and self.sizes.get(f"{role}_norm") == self.sizes[role]
            found[f"{role}_norm" if wide else role] = change
        return found


def _scaled(columns: Tensor, factor: float) -> Change:
    def change(states: Tensor) -> Tensor:
        states = states.clone()
        states[..., columns.to(states.device)] *= factor
        return states

    return change


def _exchanged(first: Tensor, second: Tensor) -> Change:
    def change(states: Tensor) -> Tensor:
        changed = states.clone()
        here, there = first.to(states.device), second.to(states.device)
        changed[..., here], changed[..., there] = states[..., there], states[..., here]
        return changed

    return change


def _turned(rows: Tensor, planes: tuple[Tensor, Tensor]) -> Change:
    """The same rotation of every head, in all planes."""
    x, y = (rows[:, plane].flatten() for plane in planes)

    def change(states: Tensor) -> Tensor:
        changed = states.clone()
        at_x, at_y = states[..., x.to(states.device)], states[..., y.to(states.device)]
        changed[..., x.to(states.device)] = math.cos(_ANGLE) * at_x - math.sin(_ANGLE) * at_y
        changed[..., y.to(states.device)] = math.sin(_ANGLE) * at_x + math.cos(_ANGLE) * at_y
        return changed

    return change


@torch.no_grad()
def gate_layout(layer: nn.Module, call: LayerCall, gate_in: str, activation: str | None) -> str | None:
    """Layout of a joint map of gate and input: `gate_first` or `gate_last`; None if it is neither.

    Args:
        layer: Layer of the map.
        call: Call of the layer.
        gate_in: Path of the joint map.
        activation: Path of the activation that reads the gate.
    """
    if activation is None:
        return None
    seen: dict[str, Tensor] = {}
    with ExitStack() as hooks:

        def after(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            seen["joint"] = output

        def before(_: nn.Module, args: tuple[Any, ...]) -> None:
            seen["gate"] = args[0]

        hooks.callback(layer.get_submodule(gate_in).register_forward_hook(after).remove)
        hooks.callback(layer.get_submodule(activation).register_forward_pre_hook(before).remove)
        call.run(layer)
    first, last = seen["joint"].chunk(2, -1)
    return next((n for n, half in {"gate_first": first, "gate_last": last}.items() if near(half, seen["gate"])), None)
