"""Layouts of joint maps, found by symmetries: scaling parts of the output that cancel leaves a layer as it is.

In an attention block, a factor on the queries and its inverse on their keys cancel in the scores. A factor on values and
its inverse on the columns of `out` that read them cancel in the output. This also holds for rotary positions, position
biases and shared keys, and only if the rows of the joint map are divided correctly.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from .stacks import LayerCall, first_tensor, near

_FACTOR = 2.0

Rows = tuple[Tensor, Tensor, Tensor]
"""Rows of queries (heads, width), keys (groups, width) and values (groups, width) in a joint map."""


def qkv_rows(layout: str, rows: int, heads: int, groups: int) -> Rows | None:
    """Rows of each head in a joint map.

    Args:
        layout: `parts`, all queries, then all keys, then all values; `heads`, queries, keys and values of each head;
            or `groups`, the queries, the key and the value of each group of heads.
        rows: Rows of the map.
        heads: Number of query heads.
        groups: Number of key-value heads.

    Returns:
        The rows, or None if the map does not divide in this way.
    """
    every, slots = torch.arange(rows), heads + 2 * groups
    if rows % slots:
        return None
    width = rows // slots
    if layout == "parts":
        return tuple(part.view(-1, width) for part in every.split([heads * width, groups * width, groups * width]))
    if layout == "heads" and groups != heads:
        return None
    each = every.view(groups, heads // groups + 2, width)
    return each[:, :-2].reshape(heads, width), each[:, -2], each[:, -1]


@torch.no_grad()
def qkv_layout(layer: nn.Module, call: LayerCall, qkv: str, out: str, config: PreTrainedConfig) -> tuple[str, int] | None:
    """Layout of a joint map of queries, keys and values, verified on a call of its layer.

    Args:
        layer: Layer of the map.
        call: Call of the layer.
        qkv: Path of the joint map.
        out: Path of the output projection.
        config: Config with the numbers of heads.

    Returns:
        Layout as in `qkv_rows` and the number of key-value heads; None if none of them leaves the output as it is.
    """
    heads = getattr(config, "num_attention_heads", None)
    if heads is None:
        return None
    expected = first_tensor(call.run(layer))
    size = _rows_of(layer.get_submodule(qkv))
    stated = getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None)
    for groups in dict.fromkeys([stated or heads, heads, 1]):
        for layout in ("parts", "heads", "groups"):
            rows = qkv_rows(layout, size, heads, groups)
            if rows is not None and _cancels(layer, call, qkv, out, rows, expected):
                return layout, groups
    return None


def _cancels(layer: nn.Module, call: LayerCall, qkv: str, out: str, rows: Rows, expected: Tensor) -> bool:
    """Whether factors on the parts of one group cancel, and whether each factor alone has an effect."""
    q, k, v = rows
    per, width = len(q) // len(k), q.shape[1]
    group = len(k) - 1
    own = slice(group * per, (group + 1) * per)
    columns = torch.arange(len(q) * width).view(len(q), width)[own].flatten()

    def run(parts: list[tuple[Tensor, float]], outputs: float) -> Tensor:
        joint, projection = layer.get_submodule(qkv), layer.get_submodule(out)

        def scale_rows(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            return _scaled(output, parts)

        def scale_columns(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (_scaled(args[0], [(columns, outputs)]), *args[1:])

        with ExitStack() as hooks:
            hooks.callback(joint.register_forward_hook(scale_rows).remove)
            hooks.callback(projection.register_forward_pre_hook(scale_columns).remove)
            return first_tensor(call.run(layer))

    up, down = _FACTOR, 1 / _FACTOR
    try:
        scores = run([(q[own].flatten(), up), (k[group], down)], 1.0)
        values = run([(v[group], up)], down)
        alone = run([(v[group], up)], 1.0)
    except (IndexError, RuntimeError):
        return False
    return near(scores, expected) and near(values, expected) and not near(alone, expected)


def _scaled(states: Tensor, parts: list[tuple[Tensor, float]]) -> Tensor:
    states = states.clone()
    for columns, factor in parts:
        states[..., columns.to(states.device)] *= factor
    return states


@torch.no_grad()
def gate_layout(layer: nn.Module, call: LayerCall, gate_in: str, activation: str | None) -> str | None:
    """Layout of a joint map of gate and input: `gate first`, `gate last` or `alternating`; None if unknown.

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
    halves = {"gate first": first, "gate last": last, "alternating": seen["joint"][..., ::2]}
    return next((name for name, half in halves.items() if near(half, seen["gate"])), None)


def _rows_of(module: nn.Module) -> int:
    """Number of output features of a map."""
    return getattr(module, "out_features", None) or getattr(module, "nf", None) or module.weight.shape[0]
