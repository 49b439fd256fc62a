# From hf_layerfuse 0.1.0; SPDX-License-Identifier: Apache-2.0
"""Convolutions as kernels that can be folded, composed and added exactly (LayerMerge, Kim et al. 2024, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .layerfuse_errors import LayerFuseError

Sides = tuple[int, int, int, int]
"""Left, right, top, bottom: the order of `F.pad`."""


class Window(NamedTuple):
    """What a convolution looks at, along one side of an image.

    Attributes:
        size: of its kernel, gaps of a dilation included.
        stride: pixels from one to the next.
        padding: zeros before and behind; None is as many as TensorFlow's SAME puts there, by the size of the image.
    """

    size: int
    stride: int = 1
    padding: tuple[int, int] | None = None

    def around(self, length: int) -> tuple[int, int]:
        """Zeros before and behind a side of some length."""
        if self.padding is not None:
            return self.padding
        total = max(self.size - (length % self.stride or self.stride), 0)
        return total // 2, total - total // 2


def around(windows: Sequence[Window], height: int, width: int) -> Sides:
    """Zeros that convolutions in a row put around an image together, if the first of them puts them all.

    p1 + s1 p2 + s1 s2 p3 + ..., on each side (LayerMerge, Kim et al. 2024, appendix A). Without a `Window` that goes by
    the size of the image, that does not matter.
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
    """A convolution with zeros around its input, without groups or dilation; float64.

    Attributes:
        weight: (out, in, height, width).
        bias: (out,).
        stride: down and right.
        padding: zeros on each side of the input; fewer than none cut it.
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
        """The same as a convolution with groups and dilation, written out.

        Args:
            weight: (out, in / groups, height, width).
            bias: (out,); None is 0.
            stride: down and right, and so is `dilation`.
            padding: zeros on each side.
            groups: of channels.
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
        """What gives its input, on the device of a tensor."""
        eye = torch.eye(channels, dtype=torch.float64, device=like.device)
        return cls(eye[:, :, None, None], torch.zeros_like(eye[0]))

    def __call__(self, x: Tensor) -> Tensor:
        """Of images (batch, in, height, width) float64."""
        return F.conv2d(F.pad(x, self.padding), self.weight, self.bias, self.stride)

    def folded(self, mean: Tensor, variance: Tensor, gain: Tensor, shift: Tensor, epsilon: float) -> Kernel:
        """With the batch norm that follows it: W <- g W, b <- g (b - mean) + shift, g = gain / sqrt(var + epsilon)."""
        mean, variance, gain, shift = (tensor.detach().double() for tensor in (mean, variance, gain, shift))
        scale = gain / (variance + epsilon).sqrt()
        return replace(self, weight=scale[:, None, None, None] * self.weight, bias=scale * (self.bias - mean) + shift)

    def then(self, other: Kernel) -> Kernel:
        """The one kernel that does this and then the other.

        W[o, c, u] = sum_m sum_v W2[o, m, v] W1[m, c, u - s1 v], stride s1 s2, padding p1 + s1 p2. It is what the two do
        where all zeros are put around the input of the first; between them, the second would put zeros around what the
        first gives there, which is not zero.
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
        """The one kernel that gives the sum of this and another, such as the identity of a skip, for the same input.

        Raises:
            LayerFuseError: what they give is not of one size.
        """
        left, _, top, _ = (max(sides) for sides in zip(self.padding, other.padding, strict=True))
        height = max(top - kernel.padding[2] + kernel.weight.shape[2] for kernel in (self, other))
        width = max(left - kernel.padding[0] + kernel.weight.shape[3] for kernel in (self, other))
        ours, theirs = (kernel._grown(left, top, height, width) for kernel in (self, other))
        if (ours.stride, ours.padding, len(ours.bias)) != (theirs.stride, theirs.padding, len(theirs.bias)):
            raise LayerFuseError(
                f"kernels of {len(self.bias)} and {len(other.bias)} channels, strides {self.stride} and {other.stride} "
                f"and padding {self.padding} and {other.padding} do not give images of one size, and have no sum."
            )
        return replace(ours, weight=ours.weight + theirs.weight, bias=ours.bias + theirs.bias)

    def _grown(self, left: int, top: int, height: int, width: int) -> Kernel:
        """The same, with taps of zero around: so much padding before, and so large."""
        before = left - self.padding[0], top - self.padding[2]
        after = width - before[0] - self.weight.shape[3], height - before[1] - self.weight.shape[2]
        taps = (before[0], after[0], before[1], after[1])
        sides = tuple(side + tap for side, tap in zip(self.padding, taps, strict=True))
        return replace(self, weight=F.pad(self.weight, taps), padding=sides)

    def in_groups(self, groups: int) -> Tensor:
        """The weight of a convolution with groups, (out, in / groups, height, width).

        Raises:
            LayerFuseError: a weight between two groups is not zero.
        """
        blocks = self.weight.unflatten(0, (groups, -1)).unflatten(2, (groups, -1))
        kept = blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0)
        if kept.count_nonzero() != self.weight.count_nonzero():
            raise LayerFuseError(f"a kernel of shape {tuple(self.weight.shape)} mixes channels of {groups} groups.")
        return kept.flatten(0, 1)
