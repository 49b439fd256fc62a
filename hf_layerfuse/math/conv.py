"""Convolutions as kernels that can be folded, composed and added exactly (LayerMerge, Kim et al. 2024, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import LayerFuseError

Sides = tuple[int, int, int, int]
"""Left, right, top, bottom: the order of `F.pad`."""


class Window(NamedTuple):
    """Window of a convolution along one side of an image.

    Attributes:
        size: Size of the kernel, gaps of a dilation included.
        stride: Step in pixels.
        padding: Zeros before and after the side; None is TensorFlow's SAME padding, which depends on the image size.
    """

    size: int
    stride: int = 1
    padding: tuple[int, int] | None = None

    def around(self, length: int) -> tuple[int, int]:
        """Return the zeros before and after a side of a length."""
        if self.padding is not None:
            return self.padding
        total = max(self.size - (length % self.stride or self.stride), 0)
        return total // 2, total - total // 2


def around(windows: Sequence[Window], height: int, width: int) -> Sides:
    """Return the padding of consecutive convolutions, if all of it moves in front of the first one.

    It is p1 + s1 p2 + s1 s2 p3 + ..., on each side (LayerMerge, Kim et al. 2024, appendix A). It depends on the image
    size only if a `Window` does.
    """
    found: list[int] = []
    for length in (width, height):
        before, behind, scale = 0, 0, 1
        for window in windows:
            first, last = window.around(length)
            before, behind, scale = before + scale * first, behind + scale * last, scale * window.stride
            length = (length + first + last - window.size) // window.stride + 1
        found += [before, behind]
    left, right, top, bottom = found
    return left, right, top, bottom


@dataclass(frozen=True, eq=False)
class Kernel:
    """A convolution with zero padding, without groups or dilation; float64.

    Attributes:
        weight: Weight, (out, in, height, width).
        bias: Bias, (out,).
        stride: Vertical and horizontal stride.
        padding: Zeros on each side of the input; negative values crop it.
    """

    weight: Tensor
    bias: Tensor
    stride: tuple[int, int] = (1, 1)
    padding: Sides = (0, 0, 0, 0)

    @classmethod
    def of(
        cls,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: tuple[int, int] = (1, 1),
        padding: Sides = (0, 0, 0, 0),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
    ) -> Kernel:
        """Write a convolution with groups and dilation as a dense kernel.

        Args:
            weight: Weight, (out, in / groups, height, width).
            bias: Bias, (out,); None is 0.
            stride: Vertical and horizontal stride.
            padding: Zeros on each side.
            dilation: Vertical and horizontal dilation.
            groups: Number of channel groups.
        """
        weight = weight.detach().double()
        outs, ins, *size = weight.shape
        dense = weight.new_zeros(groups, outs // groups, groups, ins, *size)
        dense[range(groups), :, range(groups)] = weight.unflatten(0, (groups, -1))
        dense = dense.flatten(0, 1).flatten(1, 2)
        apart = dense.new_zeros(*dense.shape[:2], *((n - 1) * step + 1 for n, step in zip(size, dilation, strict=True)))
        apart[..., :: dilation[0], :: dilation[1]] = dense
        bias = weight.new_zeros(outs) if bias is None else bias.detach().double()
        return cls(apart, bias, tuple(stride), tuple(padding))

    @classmethod
    def identity(cls, channels: int, like: Tensor) -> Kernel:
        """Return the identity kernel, on the device of a tensor."""
        eye = torch.eye(channels, dtype=torch.float64, device=like.device)
        return cls(eye[:, :, None, None], torch.zeros_like(eye[0]))

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the kernel to images (batch, in, height, width) float64."""
        return F.conv2d(F.pad(x, self.padding), self.weight, self.bias, self.stride)

    def folded(self, mean: Tensor, variance: Tensor, gain: Tensor, shift: Tensor, epsilon: float) -> Kernel:
        """Fold the next batch norm: W <- g W, b <- g (b - mean) + shift, g = gain / sqrt(var + epsilon)."""
        mean, variance, gain, shift = (tensor.detach().double() for tensor in (mean, variance, gain, shift))
        scale = gain / (variance + epsilon).sqrt()
        return replace(self, weight=scale[:, None, None, None] * self.weight, bias=scale * (self.bias - mean) + shift)

    def then(self, other: Kernel) -> Kernel:
        """Return the single kernel that applies this kernel and then the other.

        W[o, c, u] = sum_m sum_v W2[o, m, v] W1[m, c, u - s1 v], stride s1 s2, padding p1 + s1 p2. It equals the two
        kernels if all padding is in front of the first. Padding between them would replace outputs of the first kernel,
        which are not zero there, with zeros.
        """
        down, right = self.stride
        steps = (right, right, down, down)
        sides = tuple(own + step * side for own, step, side in zip(self.padding, steps, other.padding, strict=True))
        return Kernel(
            F.conv_transpose2d(other.weight, self.weight, stride=self.stride),
            other.bias + other.weight.sum((2, 3)) @ self.bias,
            (down * other.stride[0], right * other.stride[1]),
            sides,
        )

    def plus(self, other: Kernel) -> Kernel:
        """Return the single kernel that gives the sum of this kernel and another, such as the identity of a skip.

        Raises:
            LayerFuseError: Kernels whose outputs differ in size.
        """
        left, _, top, _ = (max(sides) for sides in zip(self.padding, other.padding, strict=True))
        height = max(top - kernel.padding[2] + kernel.weight.shape[2] for kernel in (self, other))
        width = max(left - kernel.padding[0] + kernel.weight.shape[3] for kernel in (self, other))
        ours, theirs = (kernel._grown(left, top, height, width) for kernel in (self, other))
        if (ours.stride, ours.padding, len(ours.bias)) != (theirs.stride, theirs.padding, len(theirs.bias)):
            raise LayerFuseError(
                f"kernels of {len(self.bias)} and {len(other.bias)} channels, strides {self.stride} and {other.stride} "
                f"and padding {self.padding} and {other.padding} have outputs of different sizes: they cannot be added."
            )
        return replace(ours, weight=ours.weight + theirs.weight, bias=ours.bias + theirs.bias)

    def _grown(self, left: int, top: int, height: int, width: int) -> Kernel:
        """Pad the weight with zeros, to a padding of `left` and `top` and a size of `height` and `width`."""
        before = left - self.padding[0], top - self.padding[2]
        after = width - before[0] - self.weight.shape[3], height - before[1] - self.weight.shape[2]
        taps = (before[0], after[0], before[1], after[1])
        sides = tuple(side + tap for side, tap in zip(self.padding, taps, strict=True))
        return replace(self, weight=F.pad(self.weight, taps), padding=sides)

    def in_groups(self, groups: int) -> Tensor:
        """Return the weight of a convolution with groups, (out, in / groups, height, width).

        Raises:
            LayerFuseError: Nonzero weight between two groups.
        """
        blocks = self.weight.unflatten(0, (groups, -1)).unflatten(2, (groups, -1))
        kept = blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0)
        if kept.count_nonzero() != self.weight.count_nonzero():
            raise LayerFuseError(f"a kernel of shape {tuple(self.weight.shape)} mixes channels of {groups} groups.")
        return kept.flatten(0, 1)
