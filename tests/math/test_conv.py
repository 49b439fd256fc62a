"""Kernels compared with the convolutions, norms and sums that they replace."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from hf_layerfuse import LayerFuseError
from hf_layerfuse.math.conv import Kernel


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(ours, theirs):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-10 * theirs.abs().max()


sizes = st.tuples(st.integers(1, 4), st.integers(1, 4))
strides = st.tuples(st.integers(1, 3), st.integers(1, 3))
sides = st.tuples(*[st.integers(0, 3)] * 4)


@st.composite
def kernels(draw, ins, outs, strides=strides, sides=sides):
    seed = draw(st.integers(0, 99))
    weight = randn(outs, ins, *draw(sizes), seed=seed)
    return Kernel(weight, randn(outs, seed=seed + 1), draw(strides), draw(sides))


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([1, 2, 4]), st.tuples(st.integers(1, 3), st.integers(1, 2)), sizes, strides, st.booleans())
def test_groups_and_dilation_are_written_out(groups, dilation, size, stride, bias):
    """The dense kernel equals torch's grouped or dilated convolution, and can be split into groups again."""
    conv = nn.Conv2d(4, 8, size, stride, 2, dilation, groups, bias).double()
    kernel = Kernel.of(conv.weight, conv.bias, conv.stride, (2, 2, 2, 2), dilation, groups)
    x = randn(2, 4, 15, 13)
    close(kernel(x), conv(x).detach())
    if dilation == (1, 1):
        assert torch.equal(kernel.in_groups(groups), conv.weight.detach())


def test_groups_of_many_channels_come_back():
    """Splitting into groups works for any order of summation over many channels."""
    weight = randn(96, 1, 3, 3)
    assert torch.equal(Kernel.of(weight, groups=96).in_groups(96), weight)


def test_channels_that_are_mixed_are_not_split():
    with pytest.raises(LayerFuseError, match="mixes channels of 2 groups"):
        Kernel.of(randn(4, 4, 3, 3)).in_groups(2)


def test_norms_are_folded_with_their_own_epsilon():
    """In eval mode, a convolution and the batch norm after it equal one kernel."""
    conv, norm = nn.Conv2d(3, 5, 3, bias=False).double(), nn.BatchNorm2d(5, eps=0.1).double().eval()
    for place, tensor in enumerate((norm.weight, norm.bias, norm.running_mean)):
        tensor.data.copy_(randn(5, seed=place))
    norm.running_var.copy_(randn(5, seed=4).square())
    kernel = Kernel.of(conv.weight).folded(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)
    x = randn(2, 3, 8, 8)
    close(kernel(x), norm(conv(x)).detach())


@settings(deadline=None, max_examples=100)
@given(kernels(2, 3), kernels(3, 4), kernels(4, 2), st.integers(40, 48), st.integers(40, 48))
def test_kernels_in_a_row_are_one(first, second, third, height, width):
    """With all padding in front, a chain equals one kernel, composed from either end."""
    merged = first.then(second).then(third)
    x = F.pad(randn(1, 2, height, width), merged.padding)
    for kernel in (first, second, third):
        x = F.conv2d(x, kernel.weight, kernel.bias, kernel.stride)
    close(merged(randn(1, 2, height, width)), x)
    other = first.then(second.then(third))
    close(other.weight, merged.weight)
    assert (other.stride, other.padding) == (merged.stride, merged.padding)


@settings(deadline=None, max_examples=60)
@given(kernels(3, 4), kernels(4, 3), st.integers(30, 33))
def test_padding_within_changes_nothing_but_the_border(first, second, size):
    """Merged and unmerged outputs differ only at the border, as far as the padding reaches."""
    merged, x = first.then(second), randn(1, 3, size, size)
    ours, theirs = merged(x), second(first(x))
    assert ours.shape == theirs.shape
    rim = 4  # padding of the second convolution, up to 3
    assume(min(ours.shape[2:]) > 2 * rim)
    close(ours[..., rim:-rim, rim:-rim], theirs[..., rim:-rim, rim:-rim])


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3), st.integers(9, 12))
def test_a_skip_is_one_more_tap(left, top, more, size):
    """x + conv(x) is one kernel, with the centre anywhere; and so is a sum with a larger kernel."""
    height, width = top + 1 + more, left + 2
    kernel = Kernel(randn(3, 3, height, width), randn(3), padding=(left, 1, top, more))
    x = randn(2, 3, size, size)
    skipped = kernel.plus(Kernel.identity(3, x))
    close(skipped(x), x + kernel(x))
    close(Kernel.identity(3, x).plus(kernel)(x), x + kernel(x))
    larger = Kernel(randn(3, 3, 7, 5, seed=1), randn(3, seed=2), padding=(2, 2, 3, 3))
    close(skipped.plus(larger)(x), x + kernel(x) + larger(x))


@pytest.mark.parametrize("size", [32, 33])
def test_a_projection_is_added_where_its_pixel_is(size):
    """The branch of a strided ResNet layer and its 1 x 1 shortcut equal one kernel of the same stride."""
    branch = Kernel(randn(5, 3, 3, 3), randn(5), (2, 2), (1, 1, 1, 1)).then(Kernel(randn(4, 5, 1, 1), randn(4)))
    shortcut = Kernel(randn(4, 3, 1, 1, seed=1), randn(4, seed=2), (2, 2))
    x = randn(2, 3, size, size)
    close(branch.plus(shortcut)(x), branch(x) + shortcut(x))


def test_a_branch_in_a_row_is_one_kernel():
    """conv, then x + branch(x), then conv equal one kernel. With all padding in front, the skip is cropped to the
    output of the branch."""
    first, second, third, last = (
        Kernel(randn(4, 4, 3, 3, seed=seed), randn(4, seed=seed), padding=(1, 1, 1, 1)) for seed in range(4)
    )
    branch = second.then(third)
    merged = first.then(branch.plus(Kernel.identity(4, first.weight))).then(last)
    x = randn(1, 4, 10, 11)
    assert merged.padding == (4, 4, 4, 4)
    bare = [Kernel(kernel.weight, kernel.bias) for kernel in (first, second, third, last)]
    hidden = bare[0](F.pad(x, merged.padding))
    close(merged(x), bare[3](hidden[..., 2:-2, 2:-2] + bare[2](bare[1](hidden))))


@pytest.mark.parametrize(
    "other",
    [
        Kernel(randn(3, 3, 1, 1), randn(3), (2, 2)),
        Kernel(randn(3, 3, 3, 3), randn(3)),
        Kernel(randn(2, 3, 1, 1), randn(2)),
    ],
)
def test_sums_of_images_of_two_sizes_are_refused(other):
    with pytest.raises(LayerFuseError, match="cannot be added"):
        Kernel.identity(3, torch.zeros(1)).plus(other)
