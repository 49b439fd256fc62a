"""Modules for merged convolutions: a placeholder for a module with removed parts, and explicit padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ...math.conv import Window, around


class Parts(nn.Module):
    """Placeholder for a module with removed parts: runs the remaining children, under their names, in order.

    Args:
        before: Module to replace.
        branch: Names of the children to run, in order. Children that are None are skipped.
        adds: Whether to add the input, after `pad` and `shortcut`, to the output of the branch.
        shortcut: Name of the child that transforms the added input; by default, the input is added unchanged.
        then: Name of the child that runs last, after the sum.
        pad: Module that pads or crops the added input.
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
    """Zero padding equal to the total padding of several convolutions, or a crop by the same amount.

    Args:
        windows: Windows of the convolutions.
        sign: Direction: 1 pads, -1 crops.
    """

    def __init__(self, windows: Sequence[Window], sign: int = 1) -> None:
        super().__init__()
        self.windows, self.sign = tuple(windows), sign

    def forward(self, images: Tensor) -> Tensor:
        return F.pad(images, [self.sign * side for side in around(self.windows, *images.shape[-2:])])


class PaddedConv2d(nn.Conv2d):
    """A convolution with the total padding of a segment, which may differ between the sides."""

    def __init__(self, *args: Any, windows: Sequence[Window], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pad = Pad(windows)

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(self.pad(images))


def convolution(like: nn.Conv2d, windows: Sequence[Window], **changes: Any) -> nn.Conv2d:
    """A convolution like another one except for `changes`, with the total padding of `windows`.

    Its weights are arbitrary and must be loaded.
    """
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
    """Module at a path, or None."""
    at, _, name = path.rpartition(".")
    return getattr(model.get_submodule(at), name, None)
