"""Closed-form repair of merged convolutions, front to back, with the original as teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ...evaluation.batches import model_inputs
from ...evaluation.divergence import calibration_loss
from ...evaluation.hooks import StopForward, watch
from ...evaluation.modes import eval_mode
from ...math.ridge import Moments, fit
from ...models.architectures import ConvGraphArchitecture, Convolutions, Place, architecture_for
from ...models.modules.conv import PaddedConv2d, module_at
from ...plan import MergeConvs, Plan
from ..samples import Sample
from .base import RefitReport, unless_worse

ROWS = 24
"""Approximate number of patches per weight of one output channel."""

PIXELS = 2**24
"""Largest number of values in the patches that are held at once."""


def before_activation(model: PreTrainedModel, convs: Convolutions, boundary: int) -> Place:
    """The place of a boundary of a conv graph: before its activation if it has one, else after its last module."""
    unit = convs.units[boundary]
    if module_at(model, unit.act) is not None:
        return Place("before", unit.act)
    for skip in convs.skips:
        if skip.end == boundary:
            return Place("after", skip.path)
    return Place("after", unit.norm or unit.conv)


@torch.no_grad()
def see(model: PreTrainedModel, batch: Mapping[str, Tensor], places: Sequence[Place]) -> list[Tensor]:
    """Record the tensors of a model at some places for one batch. The forward pass stops after the last place.

    Args:
        model: Model in eval mode.
        batch: Model inputs.
        places: Places before or after modules, by the modules' paths in the model.

    Returns:
        One tensor per place.
    """
    found: dict[Place, Tensor] = {}

    def keep(place: Place, tensor: Tensor) -> None:
        found[place] = tensor.clone()  # transformers modifies the tensor in place
        if len(found) == len(set(places)):
            raise StopForward

    with watch({place: (model.get_submodule(place.module), place.when) for place in places}, keep):
        model(**model_inputs(batch, model))
    return [found[place] for place in places]


def refit_conv_graph(
    student: PreTrainedModel, teacher: PreTrainedModel, plan: Plan, sample: Sample, *, fitted: bool = True
) -> RefitReport:
    """Fit all merged convolutions of a student, in place, and undo the fit if the calibration loss rises.

    Args:
        student: Result of `apply(teacher, plan)`.
        teacher: Original model.
        plan: Plan whose edits are all merges.
        sample: Calibration images.
        fitted: Whether to fit; False only measures the calibration loss.

    Returns:
        The calibration loss before and after, and the errors of each merged convolution.
    """
    edits = [edit for edit in plan.edits if edit.merged and len(edit.layers) > 1]

    def carry_out() -> tuple[list[dict[str, Any]], float]:
        return repair(student, teacher, edits, sample), calibration_loss(student, teacher, sample.held_out_batches)

    with eval_mode(student, teacher):
        before = calibration_loss(student, teacher, sample.held_out_batches)
        if not (fitted and edits):
            return RefitReport(before, before, kept=False)
        return unless_worse(student, before, carry_out)


def repair(
    student: PreTrainedModel, teacher: PreTrainedModel, edits: Sequence[MergeConvs], sample: Sample
) -> list[dict[str, Any]]:
    """Fit the merged convolution of each segment, in place, so that the segment gives the original's output.

    The inputs of this ridge fit are the patches that the convolution reads in the student. The targets are the
    original's states after the segment, before its activation and without the sum of a skip. The penalty holds the fit
    towards the current kernel. Channel groups are fitted one after another.

    Args:
        student: Model in eval mode, whose segments are one convolution each.
        teacher: Original model.
        edits: Segments, front to back.
        sample: Calibration images.

    Returns:
        One row per fitted convolution: its `segment`, and its mean squared error on the selection split, `before` and
        `after`.
    """
    convs = architecture_for(teacher, ConvGraphArchitecture).convolutions(teacher)
    rows = []
    for edit in tqdm(edits, "Fitting convolutions", unit="convolution", disable=None, leave=False):
        conv = student.get_submodule(convs.units[edit.start + 1].conv)
        train, selection = _moments(student, teacher, convs, edit, sample)
        before = after = 0.0
        for group, parts in enumerate(zip(train, selection, strict=True)):
            found = fit(*parts, _theta(conv, group))
            before, after = before + found.before, after + found.after
            if found.strength is not None:
                _store(conv, group, found.theta)
        rows.append({"segment": [edit.start, edit.end], "before": before, "after": after})
    return rows


def _moments(
    student: PreTrainedModel, teacher: PreTrainedModel, convs: Convolutions, edit: MergeConvs, sample: Sample
) -> tuple[list[Moments], list[Moments]]:
    """Moments of patches and their targets, for each group: one list of the training images, one of the selection
    split."""
    path = convs.units[edit.start + 1].conv
    conv = student.get_submodule(path)
    places = [Place("before", path), Place("after", path), Place("before", convs.units[edit.end].act)]
    target = [before_activation(teacher, convs, edit.end)]
    sums = [_Sums(conv), _Sums(conv)]
    each = -(-ROWS * (conv.weight[0].numel() + 1) // sum(len(mask) for mask in sample.held_out))
    no_selection = not any(mask.any() for mask in sample.selection)
    for batch, held_out, selection in zip(sample.batches, sample.held_out, sample.selection, strict=True):
        if no_selection:
            selection = torch.arange(len(held_out)) % 2 == 1
        read, given, total = see(student, batch, places)
        [wanted] = see(teacher, batch, target)
        for part, mask in enumerate((~held_out & ~selection, selection & ~held_out)):
            chosen = mask.to(read.device)
            sums[part].add(read[chosen], (wanted - (total - given))[chosen], each)
    return sums[0].moments(), sums[1].moments()


class _Sums:
    """Sums over the patches that a convolution reads, for each of its groups of channels."""

    def __init__(self, conv: nn.Conv2d) -> None:
        self.conv = conv
        inputs, outs = conv.weight[0].numel() + 1, conv.out_channels // conv.groups
        make = {"dtype": torch.float64, "device": conv.weight.device}
        sizes = (inputs, inputs), (inputs, outs), (outs, outs)
        self.parts = [torch.zeros(conv.groups, *size, **make) for size in sizes]

    def add(self, images: Tensor, wanted: Tensor, each: int) -> None:
        """Add about `each` evenly spread patches of every image. To limit memory, a few images are unfolded at a time.

        Args:
            images: Inputs of the convolution.
            wanted: Target outputs of the convolution.
            each: Approximate number of patches per image.
        """
        conv = self.conv
        pixels = wanted.shape[2] * wanted.shape[3] * conv.weight[0].numel() * conv.groups
        if not len(images):
            return
        for some, aims in zip(*(tensor.split(max(1, PIXELS // pixels)) for tensor in (images, wanted)), strict=True):
            padded = conv.pad(some) if isinstance(conv, PaddedConv2d) else some
            padding = 0 if isinstance(conv, PaddedConv2d) else conv.padding
            x = F.unfold(padded, conv.kernel_size, conv.dilation, padding, conv.stride)
            y = aims.flatten(2)
            step = max(1, x.shape[2] // each)
            x, y = (
                rows[..., ::step].unflatten(1, (conv.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2) for rows in (x, y)
            )
            x = torch.cat([x, torch.ones_like(x[..., :1])], dim=2)
            for total, product in zip(self.parts, (x.mT @ x, x.mT @ y, y.mT @ y), strict=True):
                total += product

    def moments(self) -> list[Moments]:
        return [Moments(*parts) for parts in zip(*self.parts, strict=True)]


def _channels(conv: nn.Conv2d, group: int) -> slice:
    width = conv.out_channels // conv.groups
    return slice(group * width, (group + 1) * width)


def _theta(conv: nn.Conv2d, group: int) -> Tensor:
    part = _channels(conv, group)
    return torch.cat([conv.weight[part].detach().double().flatten(1).T, conv.bias[part].detach().double()[None]])


@torch.no_grad()
def _store(conv: nn.Conv2d, group: int, theta: Tensor) -> None:
    part = _channels(conv, group)
    conv.weight[part] = theta[:-1].T.reshape_as(conv.weight[part]).to(conv.weight)
    conv.bias[part] = theta[-1].to(conv.bias)
