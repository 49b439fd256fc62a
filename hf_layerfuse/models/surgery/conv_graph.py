"""Merging the convolutions of a conv graph (LayerMerge, Kim et al. 2024): the shape of the model, and its weights.

Compressing and loading both use `reshape_conv_graph`. `layers.reshape` is the counterpart for layers.
"""

from __future__ import annotations

from collections.abc import Collection
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...errors import PlanError
from ...math.conv import Kernel, Sides, Window
from ...plan import MergeConvs, Plan
from ..architectures import ConvGraphArchitecture, Convolutions, Skip
from ..modules.conv import Pad, Parts, convolution, module_at
from .weights import untied_state


def check_merges(model: PreTrainedModel, architecture: ConvGraphArchitecture, plan: Plan) -> None:
    """Raise unless a plan of merges fits the shapes of a model that `check_model` accepts.

    Raises:
        PlanError: The plan is for another architecture or number of convolutions, an edit does not match a segment, or
            an edit leaves out a convolution that must stay.
        UnsupportedModelError: The convolutions of the model cannot be merged.
    """
    architecture.check_conv_graph(model)
    if plan.model_type != architecture.model_type:
        raise PlanError(
            f"the plan is for {plan.model_type!r}, the model is {architecture.model_type!r}: make a new plan."
        )
    convs = architecture.convolutions(model)
    if plan.num_layers != len(convs.units):
        raise PlanError(
            f"the plan is for {plan.num_layers} convolutions, the model has {len(convs.units)}: make a new plan."
        )
    graph = convs.graph(model)
    segments = {*graph.segments(), (-1, 0)}
    for edit in plan.edits:
        if not isinstance(edit, MergeConvs):
            raise PlanError(f"{edit} is an edit of layers in a plan for convolutions: use MergeConvs.")
        if (edit.start, edit.end) not in segments:
            raise PlanError(
                f"{edit}: convolutions {edit.start + 1} to {edit.end} cannot become one, because a stride, a pooling "
                "or the end of a skip is between them: use a segment without these."
            )
        for skip in _inner(convs, edit):
            if not _adds_linearly(_shortcut(model, skip)):
                raise PlanError(
                    f"{edit}: the shortcut of {skip.path} is neither the identity nor a 1 x 1 convolution with an "
                    "optional batch norm, so a kernel cannot include it: end the segment before it."
                )
        lost = [place for place in edit.layers if graph.nodes[place].fixed and place not in edit.keep]
        if lost:
            raise PlanError(f"{edit} leaves out convolution {lost[0]}, which changes the shape: keep it.")


def windows_of(model: PreTrainedModel, architecture: ConvGraphArchitecture, convs: Convolutions) -> list[Window]:
    """Window of each convolution of a stock model: kernel size, stride and padding."""
    same, found = architecture.same_padding(model.config), []
    for unit in convs.units:
        conv = model.get_submodule(unit.conv)
        padding = None if same else (conv.padding[0],) * 2
        found.append(Window((conv.kernel_size[0] - 1) * conv.dilation[0] + 1, conv.stride[0], padding))
    return found


def reshape_conv_graph(model: PreTrainedModel, architecture: ConvGraphArchitecture, plan: Plan) -> None:
    """Give a stock model the shape that its plan of merges defines, in place. New weights are arbitrary."""
    convs = architecture.convolutions(model)
    windows = windows_of(model, architecture, convs)
    shapes = {edit: merged_shape(model, convs, edit) for edit in plan.edits if edit.keep}
    for edit in plan.edits:
        _linearize(model, architecture, convs, windows, edit)
        _replace(model, convs, windows, edit, shapes.get(edit))
    gone = {edit.end for edit in plan.edits if not edit.keep}
    for skip in convs.skips:
        if gone >= set(range(skip.start + 1, skip.end + 1)):  # otherwise the skip would add its input to itself
            model.set_submodule(skip.path, Parts(model.get_submodule(skip.path), skip.branch, then=skip.act))


def _linearize(
    model: PreTrainedModel,
    architecture: ConvGraphArchitecture,
    convs: Convolutions,
    windows: list[Window],
    edit: MergeConvs,
) -> None:
    """Remove the activations inside a segment, add one after it, and crop, pad or remove its skips."""
    for place in edit.layers:
        unit = convs.units[place]
        if unit.layer is not None:
            parts = (unit.conv, unit.norm, unit.act)
            names = [path.rpartition(".")[2] for path in parts if path and path.startswith(f"{unit.layer}.")]
            model.set_submodule(unit.layer, Parts(model.get_submodule(unit.layer), names))
        if place < edit.end and module_at(model, unit.act) is not None:
            model.set_submodule(unit.act, nn.Identity())
    for skip in _inner(convs, edit):
        branch = [windows[place] for place in edit.keep if skip.start < place <= skip.end]
        behind = [windows[place] for place in edit.keep if place > skip.end]
        padded = any(place <= skip.start for place in edit.keep)
        adds = bool(branch) and not edit.merged  # an empty branch must not add its input to itself
        pad = None
        if adds and (padded or behind):
            pad = Pad(branch, -1) if padded else Pad(behind)
        block = model.get_submodule(skip.path)
        parts = Parts(block, skip.branch, adds=adds, shortcut=skip.shortcut, then=skip.act, pad=pad)
        model.set_submodule(skip.path, parts)
    last = convs.units[edit.end].act
    if len(edit.layers) > 1 and module_at(model, last) is None:
        for skip in convs.skips:
            block = model.get_submodule(skip.path)
            if skip.end == edit.end and not isinstance(block, Parts):
                parts = Parts(block, skip.branch, adds=True, shortcut=skip.shortcut, then=skip.act)
                model.set_submodule(skip.path, parts)
        path, _, name = last.rpartition(".")
        setattr(model.get_submodule(path), name, architecture.activation(model.config))


def _replace(
    model: PreTrainedModel, convs: Convolutions, windows: list[Window], edit: MergeConvs, shape: dict[str, Any] | None
) -> None:
    """Replace a segment with one convolution at its start.

    If the segment stays open, move all padding to the first convolution that stays.
    """
    total = [windows[place] for place in edit.keep]
    for place in edit.layers:
        unit = convs.units[place]
        conv = model.get_submodule(unit.conv)
        if edit.merged and shape is not None and place == edit.start + 1:
            new = convolution(conv, total, **shape)
        elif edit.merged or place not in edit.keep:
            new = nn.Identity()
        else:
            new = convolution(conv, total if place == edit.keep[0] else [Window(1, 1, (0, 0))])
        model.set_submodule(unit.conv, new)
        if unit.norm is not None and (edit.merged or place not in edit.keep):
            model.set_submodule(unit.norm, nn.Identity())


def merged_shape(model: PreTrainedModel, convs: Convolutions, edit: MergeConvs) -> dict[str, Any]:
    """Arguments of `convolution` for the merged convolution of a segment of a stock model."""
    kept = [model.get_submodule(convs.units[place].conv) for place in edit.keep]
    size, stride = 1, 1
    for conv in kept:
        size, stride = size + (conv.kernel_size[0] - 1) * conv.dilation[0] * stride, stride * conv.stride[0]
    dense = any(
        not isinstance(_shortcut(model, skip), nn.Identity | None)
        for skip in _inner(convs, edit)
        if any(skip.start < place <= skip.end for place in edit.keep)
    )
    return {
        "in_channels": kept[0].in_channels,
        "out_channels": kept[-1].out_channels,
        "kernel_size": (size, size),
        "stride": (stride, stride),
        "dilation": (1, 1),
        "groups": 1 if dense else gcd(*(conv.groups for conv in kept)),
        "bias": True,
    }


def merged_weights(
    model: PreTrainedModel,
    stock: PreTrainedModel,
    architecture: ConvGraphArchitecture,
    plan: Plan,
    names: Collection[str],
) -> dict[str, Tensor]:
    """Weights of the merged model, by name.

    Args:
        model: Model with the weights: a stock model, or a fused one with open segments.
        stock: Model of the stock shape. Only its shape is read.
        architecture: Architecture table of the model.
        plan: Plan whose edits are all merges.
        names: Names of all tensors of the result.
    """
    composer = Composer(model, stock, architecture)
    weights = {name: tensor.detach().clone() for name, tensor in untied_state(model).items() if name in names}
    for edit in plan.edits:
        if edit.merged and edit.keep:
            path, like = (composer.convs.units[place].conv for place in (edit.start + 1, edit.keep[0]))
            kernel, groups = composer.kernel(edit), merged_shape(stock, composer.convs, edit)["groups"]
            found = {"weight": kernel.in_groups(groups), "bias": kernel.bias}
            like = model.get_submodule(like).weight
            weights |= {f"{path}.{name}": tensor.to(like).contiguous() for name, tensor in found.items()}
    return weights


class Composer:
    """Composes the kernel of a segment.

    Args:
        model: Model with the weights.
        stock: Model of the stock shape. Only its shape is read.
        architecture: Architecture table of the model.
    """

    def __init__(self, model: PreTrainedModel, stock: PreTrainedModel, architecture: ConvGraphArchitecture) -> None:
        self.model, self.stock = model, stock
        self.convs = architecture.convolutions(stock)
        self.windows = windows_of(stock, architecture, self.convs)

    def kernel(self, edit: MergeConvs) -> Kernel:
        """Kernel of a segment: the convolutions that stay, composed with the skips inside the segment."""
        return self._between(edit, edit.start, edit.end)

    def _between(self, edit: MergeConvs, at: int, end: int, inside: Skip | None = None) -> Kernel | None:
        """Kernel between two boundaries, or of the branch of skip `inside`; None if no convolution there stays."""
        found: Kernel | None = None
        skips = {skip.start: skip for skip in _inner(self.convs, edit) if skip.end <= end and skip is not inside}
        while at < end:
            if at in skips:
                step, after = self._between(edit, at, skips[at].end, skips[at]), skips[at].end
                if step is not None:
                    step = step.plus(self._added(skips[at], step))
            else:
                after = at + 1
                step = self._kept(after) if after in edit.keep else None
            if step is not None:
                found = step if found is None else found.then(step)
            at = after
        return found

    def _kept(self, place: int) -> Kernel:
        """Kernel of a convolution with its batch norm folded in."""
        unit = self.convs.units[place]
        # padding that depends on the image size matters only inside skips, where the stride is 1
        sides = self.windows[place].around(0) * 2
        norm = None if unit.norm is None else self.model.get_submodule(unit.norm)
        return self._folded(unit.conv, sides, norm)

    def _folded(self, path: str, sides: Sides, norm: nn.BatchNorm2d | None) -> Kernel:
        conv, shape = self.model.get_submodule(path), self.stock.get_submodule(path)
        kernel = Kernel.of(conv.weight, conv.bias, shape.stride, sides, shape.dilation, shape.groups)
        if norm is None:
            return kernel
        ones = torch.ones_like(norm.running_mean)
        gain, shift = (ones, 0 * ones) if norm.weight is None else (norm.weight, norm.bias)
        return kernel.folded(norm.running_mean, norm.running_var, gain, shift, norm.eps)

    def _added(self, skip: Skip, branch: Kernel) -> Kernel:
        """Kernel that a skip adds to its branch: the identity, or a projection."""
        shortcut = _shortcut(self.model, skip)
        if isinstance(shortcut, nn.Identity | None):
            return Kernel.identity(len(branch.bias), branch.weight)
        [conv] = [name for name, module in shortcut.named_modules() if isinstance(module, nn.Conv2d)]
        norms = [module for module in shortcut.modules() if isinstance(module, nn.BatchNorm2d)]
        return self._folded(f"{skip.path}.{skip.shortcut}.{conv}", (0, 0, 0, 0), norms[0] if norms else None)


def _inner(convs: Convolutions, edit: MergeConvs) -> list[Skip]:
    """The skips that begin and end inside a segment."""
    return [skip for skip in convs.skips if edit.start <= skip.start and skip.end <= edit.end]


def _adds_linearly(shortcut: nn.Module | None) -> bool:
    """Whether a shortcut is the identity, or a 1 x 1 convolution with an optional batch norm after it."""
    if isinstance(shortcut, nn.Identity | None):
        return True
    inside = [module for module in shortcut.modules() if not list(module.children())]
    first, *others = inside
    return (
        isinstance(first, nn.Conv2d)
        and first.kernel_size == (1, 1)
        and first.padding == (0, 0)
        and len(others) <= 1
        and all(isinstance(other, nn.BatchNorm2d) and other.running_mean is not None for other in others)
    )


def _shortcut(model: PreTrainedModel, skip: Skip) -> nn.Module | None:
    return None if skip.shortcut is None else model.get_submodule(f"{skip.path}.{skip.shortcut}")
