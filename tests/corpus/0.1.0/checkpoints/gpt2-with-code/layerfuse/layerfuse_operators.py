# From hf_layerfuse 0.1.0; SPDX-License-Identifier: Apache-2.0
"""What the tensors of several layers become: one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .layerfuse_plan import Source


def combine(tensors: Sequence[Tensor], source: Source, *, seed: int = 0) -> Tensor:
    """One tensor from those of a group, all of one shape; computed in float64, cast once.

    `freeze` takes the kept layer's, and so does `select`, until the refit chooses; `mean` averages, `weighted` by the
    shares of the source; `mix` takes each element from one of the layers, drawn with equal chances (O'Neill et al.
    2021); `telescope` is theta_0 + sum_k (theta_k - theta_0) (LaCo, Yang et al. 2024, eq. 1).

    Args:
        tensors: one per layer of the source, in its order.
        source: the layers and the operator.
        seed: of the draws of `mix`.
    """
    first = tensors[0].detach()
    if source.operator in ("freeze", "select"):
        return tensors[source.layers.index(source.kept)].detach().clone()
    if len(tensors) == 1 or not first.is_floating_point():
        return first.clone()
    stack = torch.stack([tensor.detach().double() for tensor in tensors])
    if source.operator == "mix":
        generator = torch.Generator().manual_seed(seed)
        pick = torch.randint(len(tensors), first.shape, generator=generator).to(first.device)
        return stack.gather(0, pick.unsqueeze(0)).squeeze(0).to(first.dtype)
    if source.operator == "telescope":
        return (stack.sum(0) - (len(tensors) - 1) * stack[0]).to(first.dtype)
    if source.operator == "mean":
        return stack.mean(0).to(first.dtype)
    shares = torch.tensor(source.weights, dtype=torch.float64, device=first.device)
    return torch.tensordot(shares, stack, 1).to(first.dtype)
