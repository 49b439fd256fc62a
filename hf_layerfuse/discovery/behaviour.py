"""The behaviour of a module, found by running it: a map, a norm, an activation, or nothing at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .stacks import RAISED, first_tensor

Behaviour = Literal["inert", "norm", "activation", "linear", "other"]


@torch.no_grad()
def behaviour_of(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Behaviour:
    """Behaviour of a module on random inputs of the shape that the model gives it.

    Args:
        module: Module without hooks, in eval mode.
        args: Its positional arguments in the model.
        kwargs: Its keyword arguments in the model.
        output: Its output in the model.

    Returns:
        `inert`: the output is the input. `linear`: an affine map with a matrix named `weight`. `norm`: the output does
        not depend on the length of the input. `activation`: one function for each element, without parameters. `other`:
        anything else, such as a module that takes several tensors.
    """
    given = [leaf for leaf in tree_leaves((args, dict(kwargs))) if isinstance(leaf, Tensor)]
    if len(given) != 1 or not isinstance(output, Tensor) or not given[0].is_floating_point():
        return "other"
    if len(args) != 1 or kwargs:
        return "other"
    generator = torch.Generator().manual_seed(0)

    def random() -> Tensor:
        return torch.randn(given[0].shape, generator=generator).to(given[0])

    try:
        return _behaviour(module, module, random(), random())
    except RAISED:
        return "other"


def _behaviour(module: nn.Module, of: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Behaviour:
    at_x = of(x)
    if _close(at_x, x):
        return "inert"
    sizes = [parameter.ndim for parameter in module.parameters()]
    if sizes and max(sizes) >= 2:
        if len(list(module.modules())) > 1 or len(sizes) > 2:
            return "other"
        zero = of(torch.zeros_like(x))
        if _close(of(x + y) - zero, (at_x - zero) + (of(y) - zero)):
            return "linear" if isinstance(getattr(module, "weight", None), Tensor) else "other"
    if at_x.shape != x.shape:
        return "other"
    if _close(of(2 * x), at_x):
        return "norm"
    if not sizes:
        half = x.shape[-1] // 2
        mixed = of(torch.cat([y[..., :half], x[..., half:]], -1))
        if _close(mixed[..., half:], at_x[..., half:]) and _close(of(x.flip(-1)), at_x.flip(-1)):
            return "activation"
    return "other"


def _close(ours: Tensor, theirs: Tensor) -> bool:
    allowed = 1e-3 if theirs.dtype in (torch.float32, torch.float64) else 5e-2
    return ours.shape == theirs.shape and torch.allclose(
        ours, theirs, rtol=allowed, atol=0.1 * allowed * (1 + theirs.abs().max().item())
    )


@torch.no_grad()
def mixes_tokens(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a token of the output of a module depends on other tokens of its input.

    Args:
        module: Module in eval mode.
        args: Its positional arguments in the model. The first tensor of numbers is its input, (batch, tokens, ...,
            width).
        kwargs: Its keyword arguments in the model.
    """
    states = next(
        (t for t in tree_leaves((args, dict(kwargs))) if isinstance(t, Tensor) and t.is_floating_point()), None
    )
    if states is None or states.ndim < 3:
        return False
    other = states.clone()
    noise = torch.randn(other[:, 0].shape, generator=torch.Generator().manual_seed(0))
    other[:, 0] += noise.to(other)

    def run(value: Tensor) -> Tensor | None:
        def swapped(given: Any) -> Any:
            return value if given is states else given

        return first_tensor(module(*map(swapped, args), **{name: swapped(arg) for name, arg in kwargs.items()}))

    try:
        before, after = run(states), run(other)
    except RAISED:
        return False
    if before is None or before.ndim < 3:
        return False
    return (after - before)[:, 1:].abs().max().item() > 1e-6 * before.abs().max().item()
