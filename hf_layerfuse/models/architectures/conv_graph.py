"""Module paths of the convolutions that can be merged: one sequence from input to output, with skips."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ...errors import UnsupportedModelError
from .base import Architecture
from .segments import ConvGraph, ConvNode


@dataclass(frozen=True)
class Unit:
    """One convolution of a conv graph, with the norm and activation after it, by live module paths.

    Attributes:
        conv: Path of an `nn.Conv2d`.
        norm: Path of the batch norm after it, or None.
        act: Path of the activation at the boundary after it, or the path where one would be. If a skip ends there, the
            activation follows its sum.
        layer: Path of a module that runs its children `conv`, `norm` and `act` in order, or None.
    """

    conv: str
    norm: str | None
    act: str
    layer: str | None = None

    @classmethod
    def of(cls, layer: str, act: str | None = None) -> Unit:
        """The unit of a Transformers layer with children `convolution`, `normalization` and `activation`.

        Args:
            layer: Path of the layer.
            act: Path of the activation, if it is not the child of the layer.
        """
        return cls(f"{layer}.convolution", f"{layer}.normalization", act or f"{layer}.activation", layer)


@dataclass(frozen=True)
class Skip:
    """A residual block: the state at boundary `start` is added at boundary `end`.

    Attributes:
        start: Boundary whose state is added.
        end: Boundary at which it is added.
        path: Live path of the block.
        branch: Names of its children between the two boundaries, in execution order.
        shortcut: Name of the child that transforms the added state; None if it is added unchanged.
        act: Name of the child that follows the sum, or would follow it.
    """

    start: int
    end: int
    path: str
    branch: tuple[str, ...]
    shortcut: str | None
    act: str


@dataclass(frozen=True)
class Convolutions:
    """The conv graph of a model, by module paths.

    Attributes:
        units: Convolutions 0 to L.
        skips: Residual blocks, each from a boundary to a later one.
        barriers: Boundaries that a merged segment must not cross.
    """

    units: Sequence[Unit]
    skips: Sequence[Skip]
    barriers: frozenset[int] = frozenset()

    def graph(self, model: PreTrainedModel) -> ConvGraph:
        """The conv graph of `model`: kernels, strides, channels and weight norms."""
        nodes = []
        for unit in self.units:
            conv = model.get_submodule(unit.conv)
            size = (conv.kernel_size[0] - 1) * conv.dilation[0] + 1
            weight = 0.0 if conv.weight.is_meta else conv.weight.detach().abs().sum().item()
            depthwise = conv.groups == conv.in_channels == conv.out_channels
            nodes.append(ConvNode(size, conv.stride[0], conv.in_channels, conv.out_channels, depthwise, weight))
        return ConvGraph(nodes, [(skip.start, skip.end) for skip in self.skips], self.barriers)


class ConvGraphArchitecture(Architecture, ABC):
    """A network of convolutions; each segment of it can become one convolution."""

    @abstractmethod
    def convolutions(self, model: PreTrainedModel) -> Convolutions:
        """The conv graph of a stock model."""

    @abstractmethod
    def activation(self, config: PreTrainedConfig) -> nn.Module:
        """Activation after a merged segment that had none at its end."""

    def same_padding(self, config: PreTrainedConfig) -> bool:
        """Whether the padding depends on the size of the image, as TensorFlow's SAME padding does."""
        return False

    def check_conv_graph(self, model: PreTrainedModel) -> None:
        """Raise `UnsupportedModelError` unless every part of the conv graph can be merged."""
        for unit in self.convolutions(model).units:
            conv = model.get_submodule(unit.conv)
            norm = None if unit.norm is None else model.get_submodule(unit.norm)
            plain = isinstance(norm, nn.BatchNorm2d | None) and (norm is None or norm.running_mean is not None)
            if not (is_square(conv) and plain):
                raise UnsupportedModelError(
                    f"{unit.conv} is {conv} followed by {norm}: only a square Conv2d with zero padding can "
                    "be merged, alone or followed by a BatchNorm2d with running statistics."
                )


def is_square(conv: nn.Module) -> bool:
    """Whether a module is a convolution with equal height and width settings and equal zero padding on all sides."""
    return (
        isinstance(conv, nn.Conv2d)
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and all(len(set(each)) == 1 for each in (conv.kernel_size, conv.stride, conv.dilation, conv.padding))
    )
