"""Linear maps that share weights with other depths and also have parameters of their own.

They replace the `nn.Linear`, `Conv1D` or `nn.Conv2d` of a shared block and have the same input and output shapes. They
can compute the weight of an equivalent stock module. Their own parameters are (out, in) for every stock module. A
convolution is a map of patches; its inputs are channels x height x width of its kernel.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cache
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.pytorch_utils import Conv1D

Linear = nn.Linear | Conv1D | nn.Conv2d

# parameters that each depth has for itself, although they are matrices
PER_DEPTH = frozenset({"residual_in", "residual_out", "coefficients"})


def out_in(module: nn.Module, weight: Tensor) -> Tensor:
    """View of the weight of `module` as (out, in).

    A `Conv1D`, or a module that replaces one, stores (in, out). The kernel of a convolution has more dimensions.
    """
    if isinstance(module, nn.Conv2d):
        return weight.flatten(1)
    return weight.T if isinstance(module, Conv1D) or getattr(module, "transposed", False) else weight


def as_stored(module: nn.Module, weight: Tensor) -> Tensor:
    """A weight of shape (out, in) in the layout of `module`: the inverse of `out_in`."""
    if isinstance(module, nn.Conv2d):
        return weight.unflatten(1, module.weight.shape[1:])
    return out_in(module, weight)


class Relaxed(nn.Module, ABC):
    """A linear map that shares a part of its parameters with other depths."""

    @abstractmethod
    def merged_weight(self) -> Tensor:
        """Weight of the equivalent stock module, in its layout; float64, detached."""

    @abstractmethod
    def reset(self) -> None:
        """Initialise the parameters that the stock module lacks, except those that Transformers has loaded."""


class _Residual(Relaxed):
    """x -> x (W + B A)^T + b with a shared `weight` W, `residual_out` B (out, rank) and `residual_in` A (rank, in).

    These are the layer-wise low-rank residuals of Relaxed Recursive Transformers (Bae et al. 2024).
    """

    def _take(self, stock: Linear, rank: int) -> None:
        self.weight, self.bias = stock.weight, stock.bias
        outs, ins = out_in(stock, stock.weight).shape
        self.residual_in = nn.Parameter(stock.weight.new_empty(rank, ins))
        self.residual_out = nn.Parameter(stock.weight.new_empty(outs, rank))
        self.reset()

    @property
    def whole_weight(self) -> Tensor:
        """W + B A in the layout of the stock module, with gradients."""
        return self.weight + as_stored(self, self.residual_out @ self.residual_in)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:  # training has many tokens, so forming W + B A is cheap; for one generated token it is not
            return F.linear(x, out_in(self, self.whole_weight), self.bias)
        return super().forward(x) + F.linear(F.linear(x, self.residual_in), self.residual_out)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        return self.weight.double() + as_stored(self, self.residual_out.double() @ self.residual_in.double())

    def reset(self) -> None:
        # as in LoRA: the residual is zero at first, and the gradient of B is not
        init.normal_(self.residual_in, std=self.residual_in.shape[1] ** -0.5)
        init.zeros_(self.residual_out)

    def __repr__(self) -> str:
        outs, ins = out_in(self, self.weight).shape
        return f"{type(self).__name__}({ins}, {outs}, rank={len(self.residual_in)}, bias={self.bias is not None})"


class ResidualLinear(_Residual, nn.Linear):
    """An `nn.Linear` with a residual; it uses the parameters of `stock`."""

    def __init__(self, stock: nn.Linear, rank: int) -> None:
        super().__init__(stock.in_features, stock.out_features, stock.bias is not None, device="meta")
        self._take(stock, rank)


class ResidualConv1D(_Residual, Conv1D):
    """The `Conv1D` of GPT-2 with a residual; it uses the parameters of `stock`."""

    def __init__(self, stock: Conv1D, rank: int) -> None:
        with torch.device("meta"):
            super().__init__(stock.nf, stock.nx)
        self._take(stock, rank)


class ResidualConv2d(_Residual, nn.Conv2d):
    """An `nn.Conv2d` of one group with a residual; it uses the parameters of `stock`.

    Every forward pass computes the whole kernel. This costs almost nothing, because the kernel is used at every pixel.
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
    """x -> x (C B)^T + b with a shared `basis` B (rank, in) and `coefficients` C (out, rank) (Wang et al. 2024)."""

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
        """Weight in the layout of the stock module, computed on each access: writing to it has no effect.

        Models read the data type from the weights of their maps, and GPT-2 reads the weights to initialise them.
        """
        return as_stored(self, self.coefficients @ self.basis)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.basis), self.coefficients, self.bias)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        return as_stored(self, self.coefficients.double() @ self.basis.double())

    def reset(self) -> None:
        # the product then has the variance of the weights of a new nn.Linear, 1 / (3 in)
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
    """Whether `relax` supports `module`. Subclasses may compute something else, so few are supported."""
    if isinstance(module, nn.Conv2d) and (mode == "basis" or module.groups > 1):
        return False
    return _stock(type(module)) is not None


@cache
def _stock(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The stock class of a map: its own, or `nn.Linear` for a subclass that computes the same (Falcon's)."""
    if kind in _RESIDUAL:
        return kind
    # others may leave the weight to their parent, as the output projection of nn.MultiheadAttention does
    if not issubclass(kind, nn.Linear) or "forward" not in vars(kind):
        return None
    with torch.device("cpu"), torch.no_grad():  # sizes are predicted on the meta device
        try:
            probe = kind(3, 2, dtype=torch.float64)
        except TypeError:
            return None
        values = torch.linspace(-1, 1, 8, dtype=torch.float64)
        weight, bias = values[:6].view(2, 3), values[6:]
        probe.weight.copy_(weight)
        probe.bias.copy_(bias)
        x = torch.tensor([[0.3, -0.7, 0.2], [1.5, 0.1, -0.4]], dtype=torch.float64)
        same = torch.allclose(probe(x), F.linear(x, weight, bias))
    return nn.Linear if same and set(probe.state_dict()) == {"weight", "bias"} else None


def relax(module: Linear, mode: Literal["share", "basis"], rank: int) -> Relaxed:
    """Replacement for a map: a shared weight with a residual of `rank`, or a shared basis of that size.

    In mode `share`, the replacement uses the parameters of `module` and computes the same at first. In mode `basis`, it
    uses only the bias.
    """
    return BasisLinear(module, rank) if mode == "basis" else _RESIDUAL[_stock(type(module))](module, rank)


def theta_of(module: nn.Module) -> Tensor:
    """Weight and bias of any map as theta, (in + 1, out) float64: the map computes [x, 1] @ theta."""
    weight = module.merged_weight() if isinstance(module, Relaxed) else module.weight.detach().double()
    weight = out_in(module, weight)
    bias = weight.new_zeros(len(weight)) if module.bias is None else module.bias.detach().double()
    return torch.cat([weight.T, bias.unsqueeze(0)])
