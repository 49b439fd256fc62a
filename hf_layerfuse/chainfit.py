"""Closed-form repair of convolutions that became one: front to back, the original as teacher."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .adapters import ChainAdapter, Convolutions, adapter_for
from .calibration import Sample
from .math.ridge import Moments, fit
from .parts import PaddedConv2d, module_at
from .plan import MergeConvs

ROWS = 24
"""Patches that a fit reads for each number that it looks for in an output, at most."""


class _Done(Exception):
    """All that was asked for was seen."""


class Place(NamedTuple):
    """Where something is seen: what enters a module or leaves it."""

    path: str
    when: Literal["before", "after"]


def before_activation(model: PreTrainedModel, convs: Convolutions, boundary: int) -> Place:
    """Where a boundary of a chain is seen, before its activation if it has one."""
    unit = convs.units[boundary]
    if module_at(model, unit.act) is not None:
        return Place(unit.act, "before")
    for skip in convs.skips:
        if skip.end == boundary:
            return Place(skip.path, "after")
    return Place(unit.norm or unit.conv, "after")


@torch.no_grad()
def see(model: PreTrainedModel, batch: Mapping[str, Tensor], places: Sequence[Place]) -> list[Tensor]:
    """What a model has at some places for a batch, without running what comes behind them."""
    found: dict[Place, Tensor] = {}

    def keep(place: Place, tensor: Tensor) -> None:
        found[place] = tensor.clone()  # transformers adds to it in place
        if len(found) == len(set(places)):
            raise _Done

    with ExitStack() as stack:
        for place in set(places):
            module = model.get_submodule(place.path)
            if place.when == "before":
                hook = module.register_forward_pre_hook(lambda _, args, place=place: keep(place, args[0]))
            else:
                hook = module.register_forward_hook(lambda _, args, output, place=place: keep(place, output))
            stack.callback(hook.remove)
        with suppress(_Done):
            model(**{name: tensor.to(model.device) for name, tensor in batch.items()})
    return [found[place] for place in places]


def repair(
    student: PreTrainedModel, teacher: PreTrainedModel, edits: Sequence[MergeConvs], sample: Sample
) -> list[dict[str, Any]]:
    """Fit the one convolution of each segment, in place, so that the segment ends where it did.

    A ridge fit of the original's state behind the segment, before its activation, less what a skip adds there, by the
    patches that the convolution reads now; it is held towards the kernel as it is. One channel group is fitted after
    the other.

    Args:
        student: in eval mode, in which the segments are one convolution each.
        teacher: the original.
        edits: segments, front to back.
        sample: calibration images.

    Returns:
        For each convolution that was fitted, `segment` and its mean squared error on held-out images `before`, `after`.
    """
    convs = adapter_for(teacher, ChainAdapter).convolutions(teacher)
    rows = []
    for edit in tqdm(edits, "Fitting convolutions", disable=None, leave=False):
        conv = student.get_submodule(convs.units[edit.start + 1].conv)
        train, held_out = _moments(student, teacher, convs, edit, sample)
        before = after = 0.0
        for group, parts in enumerate(zip(train, held_out, strict=True)):
            found = fit(*parts, _theta(conv, group))
            before, after = before + found.before, after + found.after
            if found.strength is not None:
                _store(conv, group, found.theta)
        rows.append({"segment": [edit.start, edit.end], "before": before, "after": after})
    return rows


def _moments(
    student: PreTrainedModel, teacher: PreTrainedModel, convs: Convolutions, edit: MergeConvs, sample: Sample
) -> tuple[list[Moments], list[Moments]]:
    """Moments of patches and of what is wanted of them, for each group: of images that are fitted, and that choose."""
    conv = student.get_submodule(convs.units[edit.start + 1].conv)
    inputs, outs = conv.weight[0].numel(), conv.out_channels // conv.groups
    found = [[Moments.empty(inputs, outs, conv.weight.device) for _ in range(conv.groups)] for _ in range(2)]
    images = sum(len(mask) for mask in sample.judges)
    for index, (patches, aim) in enumerate(_rows(student, teacher, convs, edit, sample)):
        # (images, positions, groups, in) and (images, positions, groups, out)
        each = max(1, -(-ROWS * (inputs + 1) // images))
        chosen = torch.arange(0, patches.shape[1], max(1, patches.shape[1] // each), device=patches.device)
        choosers = sample.choosers[index].to(patches.device)
        judges = sample.judges[index].to(patches.device)
        if not choosers.any() and not any(mask.any() for mask in sample.choosers):
            choosers = torch.arange(len(choosers), device=patches.device) % 2 == 1
        for part, mask in enumerate((~judges & ~choosers, choosers)):
            x, y = (rows[mask][:, chosen].flatten(0, 1).movedim(1, 0) for rows in (patches, aim))
            for moments, *pair in zip(found[part], x, y, strict=True):
                moments.add(*pair)
    return found[0], found[1]


def _rows(
    student: PreTrainedModel, teacher: PreTrainedModel, convs: Convolutions, edit: MergeConvs, sample: Sample
) -> Iterator[tuple[Tensor, Tensor]]:
    path = convs.units[edit.start + 1].conv
    conv = student.get_submodule(path)
    places = [Place(path, "before"), Place(path, "after"), Place(convs.units[edit.end].act, "before")]
    target = [before_activation(teacher, convs, edit.end)]
    for batch in sample.batches:
        read, given, total = see(student, batch, places)
        [wanted] = see(teacher, batch, target)
        yield _patches(conv, read), _by_group(wanted - (total - given), conv.groups)


def _patches(conv: nn.Conv2d, images: Tensor) -> Tensor:
    """What each output of each group reads, (images, positions, groups, in x height x width)."""
    padded = conv.pad(images) if isinstance(conv, PaddedConv2d) else images
    padding = 0 if isinstance(conv, PaddedConv2d) else conv.padding
    columns = F.unfold(padded, conv.kernel_size, conv.dilation, padding, conv.stride)
    return columns.transpose(1, 2).unflatten(2, (conv.groups, -1))


def _by_group(images: Tensor, groups: int) -> Tensor:
    return images.flatten(2).transpose(1, 2).unflatten(2, (groups, -1))


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
