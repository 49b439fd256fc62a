"""Where the convolutions of an architecture live that can become fewer: one chain from input to output."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ...errors import UnsupportedModelError
from .base import Architecture
from .segments import Chain, Link


@dataclass(frozen=True)
class Unit:
    """One convolution of a chain with what follows it, by live module paths.

    Attributes:
        conv: an `nn.Conv2d`.
        norm: the batch norm that follows; None where there is none.
        act: the activation at the boundary behind it, or where one would be; after the sum of a skip that ends there.
        layer: a module that runs `conv`, `norm` and `act`, its children, in order, where there is one.
    """

    conv: str
    norm: str | None
    act: str
    layer: str | None = None

    @classmethod
    def of(cls, layer: str, act: str | None = None) -> Unit:
        """A layer of transformers, whose children are `convolution`, `normalization` and `activation`.

        Args:
            layer: its path.
            act: of the activation, if it is another one.
        """
        return cls(f"{layer}.convolution", f"{layer}.normalization", act or f"{layer}.activation", layer)


@dataclass(frozen=True)
class Skip:
    """A residual block: what is at boundary `start` is added at boundary `end`.

    Attributes:
        start: the boundary whose state is added.
        end: the boundary where it is added.
        path: live path of the block.
        branch: names of its children between the two, in the order in which they run.
        shortcut: name of the child that what is added goes through; None where it is added as it is.
        act: name of the child that follows the sum, or would.
    """

    start: int
    end: int
    path: str
    branch: tuple[str, ...]
    shortcut: str | None
    act: str


@dataclass(frozen=True)
class Convolutions:
    """All that is to be known of a chain to merge its convolutions.

    Attributes:
        units: 0 to L.
        skips: each from a boundary to a later one.
        barriers: boundaries across which nothing is merged.
    """

    units: Sequence[Unit]
    skips: Sequence[Skip]
    barriers: frozenset[int] = frozenset()

    def chain(self, model: PreTrainedModel) -> Chain:
        """Kernels, strides, channels and norms of the weights, as `model` has them."""
        links = []
        for unit in self.units:
            conv = model.get_submodule(unit.conv)
            size = (conv.kernel_size[0] - 1) * conv.dilation[0] + 1
            weight = 0.0 if conv.weight.is_meta else conv.weight.detach().abs().sum().item()
            depthwise = conv.groups == conv.in_channels == conv.out_channels
            links.append(Link(size, conv.stride[0], conv.in_channels, conv.out_channels, depthwise, weight))
        return Chain(links, [(skip.start, skip.end) for skip in self.skips], self.barriers)


class ConvGraphArchitecture(Architecture, ABC):
    """A network of convolutions, whose segments can become one convolution each."""

    @abstractmethod
    def convolutions(self, model: PreTrainedModel) -> Convolutions:
        """The chain of a stock model."""

    @abstractmethod
    def activation(self, config: PreTrainedConfig) -> nn.Module:
        """What a merged segment ends with where there was no activation."""

    def same(self, config: PreTrainedConfig) -> bool:
        """Whether what is around an image depends on its size, as TensorFlow's SAME padding does."""
        return False

    def check_chain(self, model: PreTrainedModel) -> None:
        """Raise `UnsupportedModelError` unless every part of the chain is of a kind that can be merged."""
        for unit in self.convolutions(model).units:
            conv = model.get_submodule(unit.conv)
            norm = None if unit.norm is None else model.get_submodule(unit.norm)
            plain = isinstance(norm, nn.BatchNorm2d | None) and (norm is None or norm.running_mean is not None)
            if not (is_square(conv) and plain):
                raise UnsupportedModelError(
                    f"{unit.conv} is {conv} followed by {norm}: what can be merged are square Conv2d with zeros "
                    "around, and BatchNorm2d with running statistics."
                )


def is_square(conv: nn.Module) -> bool:
    """Whether a module is a convolution that is the same down and right, with as many zeros on each side."""
    return (
        isinstance(conv, nn.Conv2d)
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and all(len(set(each)) == 1 for each in (conv.kernel_size, conv.stride, conv.dilation, conv.padding))
    )
