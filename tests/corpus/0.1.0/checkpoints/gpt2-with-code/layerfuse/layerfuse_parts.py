# From hf_layerfuse 0.1.0; SPDX-License-Identifier: Apache-2.0
"""What stands where a plan has taken parts out of a module, or moved the padding of its convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from .layerfuse_math_conv import Window, around


class Parts(nn.Module):
    """Children of a module that is no more, by the names that they had, run one after the other.

    Args:
        before: the module.
        branch: names of the children that run in order; those that are None are left out.
        adds: add to what they give what the module was given, through `pad` and the child `shortcut`.
        shortcut: name of a child.
        then: name of a child that comes last, after the sum.
        pad: what is put around, or cut off, what is added.
    """

    def __init__(
        self,
        before: nn.Module,
        branch: Sequence[str],
        *,
        adds: bool = False,
        shortcut: str | None = None,
        then: str | None = None,
        pad: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.branch, self.adds, self.shortcut_name, self.then_name, self.pad = tuple(branch), adds, shortcut, then, pad
        for name in filter(None, (*branch, shortcut if adds else None, then)):
            self.add_module(name, getattr(before, name, None))

    def forward(self, hidden: Tensor, *ignored: Any) -> Tensor:
        found = hidden
        for name in self.branch:
            part = getattr(self, name)
            found = found if part is None else part(found)
        if self.adds:
            added = hidden if self.pad is None else self.pad(hidden)
            found = found + (added if self.shortcut_name is None else getattr(self, self.shortcut_name)(added))
        then = None if self.then_name is None else getattr(self, self.then_name)
        return found if then is None else then(found)


class Pad(nn.Module):
    """Zeros around images, as many as convolutions put there together, or as many less.

    Args:
        windows: of the convolutions.
        sign: 1, or -1 to cut off what they will not.
    """

    def __init__(self, windows: Sequence[Window], sign: int = 1) -> None:
        super().__init__()
        self.windows, self.sign = tuple(windows), sign

    def forward(self, images: Tensor) -> Tensor:
        return F.pad(images, [self.sign * side for side in around(self.windows, *images.shape[-2:])])


class PaddedConv2d(nn.Conv2d):
    """A convolution that pads its images by what all of a segment would have, which differs from side to side."""

    def __init__(self, *args: Any, windows: Sequence[Window], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pad = Pad(windows)

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(self.pad(images))


def convolution(like: nn.Conv2d, windows: Sequence[Window], **changes: Any) -> nn.Conv2d:
    """A convolution as another is but for some changes, with the padding of all `windows`. Its weights mean nothing."""
    names = ("in_channels", "out_channels", "kernel_size", "stride", "dilation", "groups")
    values = {name: changes.get(name, getattr(like, name)) for name in names}
    values |= {"bias": changes.get("bias", like.bias is not None)}
    values |= {"device": like.weight.device, "dtype": like.weight.dtype}
    if all(window.padding is not None for window in windows):
        left, right, top, bottom = around(windows, 0, 0)
        if (left, top) == (right, bottom):
            return nn.Conv2d(**values, padding=(top, left))
    return PaddedConv2d(**values, windows=windows)


def module_at(model: nn.Module, path: str) -> nn.Module | None:
    """What is at a path, or None where nothing is."""
    at, _, name = path.rpartition(".")
    return getattr(model.get_submodule(at), name, None)
