# From hf_layerfuse 0.1.0; SPDX-License-Identifier: Apache-2.0
"""Linear maps that share weights with other depths and keep parameters of their own beside them.

They stand where the `nn.Linear`, `Conv1D` or `nn.Conv2d` of a shared block was, take and give the same shapes, and know
the weight of the stock module that computes the same. Their own parameters are (out, in) whatever the stock module
stores; a convolution is a map of patches, whose inputs are channels x height x width of its kernel.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.pytorch_utils import Conv1D

Linear = nn.Linear | Conv1D | nn.Conv2d

# what each depth keeps to itself, although these are matrices
PER_DEPTH = frozenset({"residual_in", "residual_out", "coefficients"})


def out_in(module: nn.Module, weight: Tensor) -> Tensor:
    """The weight of `module`, seen as (out, in).

    A `Conv1D`, and what stands for one, has (in, out); the kernel of a convolution has more dimensions.
    """
    if isinstance(module, nn.Conv2d):
        return weight.flatten(1)
    return weight.T if isinstance(module, Conv1D) or getattr(module, "transposed", False) else weight


def as_stored(module: nn.Module, weight: Tensor) -> Tensor:
    """A weight (out, in) as `module` stores it: what `out_in` is the way back from."""
    if isinstance(module, nn.Conv2d):
        return weight.unflatten(1, module.weight.shape[1:])
    return out_in(module, weight)


class Relaxed(nn.Module, ABC):
    """A linear map of which a part is shared with other depths."""

    @abstractmethod
    def merged_weight(self) -> Tensor:
        """The weight of the stock module that computes the same, in its orientation; float64, detached."""

    @abstractmethod
    def reset(self) -> None:
        """Draw the parameters that the stock module has not, those excepted that transformers has loaded."""


class _Residual(Relaxed):
    """x -> x (W + B A)^T + b: `weight` is W, which is shared, `residual_out` B (out, rank), `residual_in` A (rank, in).

    Layer-wise low-rank residuals of Relaxed Recursive Transformers (Bae et al. 2024).
    """

    def _take(self, stock: Linear, rank: int) -> None:
        self.weight, self.bias = stock.weight, stock.bias
        outs, ins = out_in(stock, stock.weight).shape
        self.residual_in = nn.Parameter(stock.weight.new_empty(rank, ins))
        self.residual_out = nn.Parameter(stock.weight.new_empty(outs, rank))
        self.reset()

    @property
    def whole_weight(self) -> Tensor:
        """W + B A as the stock module stores it, with gradients."""
        return self.weight + as_stored(self, self.residual_out @ self.residual_in)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:  # of many tokens: the product is the smaller part, not so for each one that is generated
            return F.linear(x, out_in(self, self.whole_weight), self.bias)
        return super().forward(x) + F.linear(F.linear(x, self.residual_in), self.residual_out)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        return self.weight.double() + as_stored(self, self.residual_out.double() @ self.residual_in.double())

    def reset(self) -> None:
        # as LoRA: nothing is added at first, and the gradient of B is not zero
        init.normal_(self.residual_in, std=self.residual_in.shape[1] ** -0.5)
        init.zeros_(self.residual_out)

    def __repr__(self) -> str:
        outs, ins = out_in(self, self.weight).shape
        return f"{type(self).__name__}({ins}, {outs}, rank={len(self.residual_in)}, bias={self.bias is not None})"


class ResidualLinear(_Residual, nn.Linear):
    """An `nn.Linear` with a residual; it takes over the parameters of `stock`."""

    def __init__(self, stock: nn.Linear, rank: int) -> None:
        super().__init__(stock.in_features, stock.out_features, stock.bias is not None, device="meta")
        self._take(stock, rank)


class ResidualConv1D(_Residual, Conv1D):
    """The `Conv1D` of GPT-2 with a residual; it takes over the parameters of `stock`."""

    def __init__(self, stock: Conv1D, rank: int) -> None:
        with torch.device("meta"):
            super().__init__(stock.nf, stock.nx)
        self._take(stock, rank)


class ResidualConv2d(_Residual, nn.Conv2d):
    """An `nn.Conv2d` of one group with a residual.

    The kernel is made whole each time, which costs next to nothing: it is used at every pixel.
    """

    def __init__(self, stock: nn.Conv2d, rank: int) -> None:
        super().__init__(
            stock.in_channels,
            stock.out_channels,
            stock.kernel_size,
            stock.stride,
            stock.padding,
            stock.dilation,
            bias=stock.bias is not None,
            padding_mode=stock.padding_mode,
            device="meta",
        )
        self._take(stock, rank)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.whole_weight, self.bias)


class BasisLinear(Relaxed):
    """x -> x (C B)^T + b: `basis` is B (rank, in), which is shared, `coefficients` C (out, rank) (Wang et al. 2024)."""

    def __init__(self, stock: Linear, rank: int) -> None:
        super().__init__()
        self.out_features, self.in_features = out_in(stock, stock.weight).shape
        self.transposed = isinstance(stock, Conv1D)
        self.basis = nn.Parameter(stock.weight.new_empty(rank, self.in_features))
        self.coefficients = nn.Parameter(stock.weight.new_empty(self.out_features, rank))
        self.register_parameter("bias", stock.bias)
        self.reset()

    @property
    def weight(self) -> Tensor:
        """The weight as the stock module stores it, made anew: writing to it changes nothing.

        Models look at the weights of their maps for a data type, and GPT-2 where it initialises them.
        """
        return as_stored(self, self.coefficients @ self.basis)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.basis), self.coefficients, self.bias)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        return as_stored(self, self.coefficients.double() @ self.basis.double())

    def reset(self) -> None:
        # so that the product has the variance that nn.Linear gives its weights, 1 / (3 in)
        init.normal_(self.basis, std=self.in_features**-0.5)
        init.normal_(self.coefficients, std=(3 * len(self.basis)) ** -0.5)

    def __repr__(self) -> str:
        rank = len(self.basis)
        return f"BasisLinear({self.in_features}, {self.out_features}, rank={rank}, bias={self.bias is not None})"


_RESIDUAL: dict[type[nn.Module], type[_Residual]] = {
    nn.Linear: ResidualLinear,
    Conv1D: ResidualConv1D,
    nn.Conv2d: ResidualConv2d,
}


def can_relax(module: nn.Module, mode: Literal["share", "basis"]) -> bool:
    """Whether `relax` knows what `module` computes: a subclass may compute something else."""
    if isinstance(module, nn.Conv2d) and (mode == "basis" or module.groups > 1):
        return False
    return type(module) in _RESIDUAL


def relax(module: Linear, mode: Literal["share", "basis"], rank: int) -> Relaxed:
    """What stands in place of a map whose weight is shared with a residual of `rank`, or is a basis of that size.

    In mode `share` it goes on with the parameters of `module`, and computes the same at first; in mode `basis` with
    its bias only.
    """
    return BasisLinear(module, rank) if mode == "basis" else _RESIDUAL[type(module)](module, rank)


def theta_of(module: nn.Module) -> Tensor:
    """What a map computes, [x, 1] @ theta: (in + 1, out) float64, whatever its orientation and parts."""
    weight = module.merged_weight() if isinstance(module, Relaxed) else module.weight.detach().double()
    weight = out_in(module, weight)
    bias = weight.new_zeros(len(weight)) if module.bias is None else module.bias.detach().double()
    return torch.cat([weight.T, bias.unsqueeze(0)])
