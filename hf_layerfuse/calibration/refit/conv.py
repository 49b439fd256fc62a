"""Closed-form repair of residual convolutional layers: statistics of batch norms, and the convolution that writes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...evaluation.batches import tokens_of
from ...math.lowrank import low_rank
from ...math.ridge import Moments, chain, fit, identity
from ...models.modules.shared_linear import Relaxed, ResidualConv2d, as_stored, out_in, theta_of
from ...plan import Slot
from ..layer_hooks import HookPoint
from ..mmap import MappedActivations
from .base import Repair
from .linear import fit_norm

SUM = HookPoint("conv", "sum")


class ConvRepair(Repair):
    """Repairs layers in three steps, each on what those before it have led to.

    The first batch norm takes the statistics of what it reads now (REPAIR, Jordan et al. 2023, section 4). Then the
    second convolution and its norm are led to the original's sum, before the last activation, at the end of the slot:
    all weights of the convolution, where they belong to this depth alone, by a ridge fit as a linear map of patches;
    else the gain and the bias of the norm, and the residual of this depth, if it has one.
    """

    def _wanted(self, slot: Slot) -> set[tuple[int, HookPoint]]:
        return {(slot.layers[-1], SUM)}

    @torch.no_grad()
    def _repair(self, index: int, slot: Slot, seen: Mapping[tuple[int, HookPoint], MappedActivations]) -> None:
        table, layer = self.student.architecture.table("conv"), self.student.layers[index]
        target = seen[slot.layers[-1], SUM]
        conv, norm = layer.get_submodule(table["out"]), layer.get_submodule(table["norm"])
        if self.method == "linear":
            if len(slot.layers) > 1:
                self._fit_outputs(index, conv, norm, target)
            return
        self._take_statistics(layer.get_submodule(table["in_norm"]), "in_norm")
        if (index, "conv") in self.tied:
            self._take_statistics(norm, "norm")
            moments = self._moments(norm, HookPoint("conv", "norm"), target, norm)
            found = fit_norm(norm, *moments)
            self._note(index, "conv", "norm", found.before, found.after)
            if isinstance(conv, Relaxed):
                self._fit_residual(index, conv, norm, target)
            return
        moments = self._moments(norm, HookPoint("conv", "features"), target, lambda x: _patches(conv, x))
        found = fit(*moments, _theta(conv, norm))
        self._note(index, "conv", "out", found.before, found.after)
        if found.strength is not None:
            every = moments[0] + moments[1]
            _store(conv, norm, found.theta, every)

    def _fit_residual(self, index: int, conv: ResidualConv2d, norm: nn.BatchNorm2d, target: MappedActivations) -> None:
        """Refit what this depth adds to the shared convolution: the fit of all weights, projected on its rank."""
        train, held_out = self._moments(norm, HookPoint("conv", "features"), target, lambda x: _patches(conv, x))
        start, every = _theta(conv, norm), train + held_out
        gain = _gain(norm)
        # a channel that is switched off could have no residual of its own
        gain = torch.where(gain.abs() < 1e-3 * gain.abs().mean(), 1e-3 * gain.abs().mean(), gain).unsqueeze(1)
        shared = gain * out_in(conv, conv.weight.double())
        free = fit(train, held_out, start).theta[:-1].T
        left, right = low_rank(free - shared, len(conv.residual_in), every.centred()[0])
        weight = shared + left @ right
        bias = (every.xy[-1] - weight @ every.xx[-1, :-1]) / every.rows
        theta = torch.cat([weight.T, bias.unsqueeze(0)])
        before, after = held_out.error(start), held_out.error(theta)
        self._note(index, "conv", "residual", before, min(before, after))
        if after < before:
            conv.residual_out.copy_(left / gain)
            conv.residual_in.copy_(right)
            _set_norm(conv, norm, theta, gain.squeeze(1), every)

    def _fit_outputs(self, index: int, conv: nn.Conv2d, norm: nn.BatchNorm2d, target: MappedActivations) -> None:
        """Refit what the layer adds to the stream by one map of it, folded into the convolution (ReplaceMe)."""
        moments = self._moments(norm, HookPoint("conv", "norm"), target, norm)
        found = fit(*moments, identity(moments[0]))
        self._note(index, "conv", "linear", found.before, found.after)
        if found.strength is not None:
            theta = _theta(conv, norm)
            patches = self._moments(norm, HookPoint("conv", "features"), target, lambda x: _patches(conv, x))
            _store(conv, norm, chain(theta, found.theta), patches[0] + patches[1])

    def _moments(self, norm: nn.BatchNorm2d, point: HookPoint, target: MappedActivations, inputs) -> list[Moments]:
        """Moments of `inputs` of what is seen at a point, and of what the layer has to add to the stream."""

        def rows(index: int, total: Tensor, given: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
            residual = total - norm(given)
            return tokens_of(inputs(seen)), tokens_of(target[index].to(residual.device) - residual)

        return self.student.moments(rows, SUM, HookPoint("conv", "norm"), point)

    def _take_statistics(self, norm: nn.BatchNorm2d, place: str) -> None:
        """Let a batch norm have the mean and the variance of what it reads, as it would in training."""
        moments = None
        for x in self._read(place):
            moments = moments or Moments.empty(x.shape[1], 0, x.device)
            moments.add(x, x[:, :0])
        mean = moments.xx[-1, :-1] / moments.rows
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(moments.centred()[0].diagonal() / moments.rows)

    def _read(self, place: str) -> Iterator[Tensor]:
        point = HookPoint("conv", place)
        for index, seen in self.student.look(point):
            yield self.student.rows(index, seen[point])


def _patches(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """What each output of a convolution reads, (batch, outputs, channels x height x width of the kernel)."""
    return F.unfold(x, conv.kernel_size, conv.dilation, conv.padding, conv.stride).transpose(1, 2)


def _gain(norm: nn.BatchNorm2d) -> Tensor:
    """What a batch norm multiplies each channel by in evaluation."""
    return norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()


def _theta(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    """A convolution and the batch norm behind it as a map of patches, (in + 1, out) float64."""
    theta, gain = theta_of(conv), _gain(norm)
    constant = norm.bias.double() + gain * (theta[-1] - norm.running_mean.double())
    return torch.cat([theta[:-1] * gain, constant.unsqueeze(0)])


def _store(conv: nn.Conv2d, norm: nn.BatchNorm2d, theta: Tensor, every: Moments) -> None:
    """Write a map of patches to a convolution and the batch norm behind it.

    The weight keeps its size, by which its steps in training are scaled.
    """
    weight, old = theta[:-1].T, conv.weight.double().flatten(1)
    scale = (weight.norm() / old.norm().clamp_min(1e-30)).clamp_min(1e-30)
    _set_norm(conv, norm, theta, scale.expand(len(weight)), every)
    conv.weight.copy_(as_stored(conv, weight / scale))


def _set_norm(conv: nn.Conv2d, norm: nn.BatchNorm2d, theta: Tensor, gain: Tensor, every: Moments) -> None:
    """Let a batch norm make `theta` of a convolution whose weight is that of theta divided by `gain` (out).

    It has the statistics of what the convolution gives for the patches that `every` was taken of, so that training and
    evaluation agree.
    """
    weight = theta[:-1].T / gain.unsqueeze(1)
    variance = (weight @ every.centred()[0] * weight).sum(1) / every.rows
    centre = weight @ (every.xx[-1, :-1] / every.rows)
    bias = 0 if conv.bias is None else conv.bias.double()
    norm.weight.copy_(gain * (variance + norm.eps).sqrt())
    norm.bias.copy_(theta[-1] + gain * centre)
    norm.running_mean.copy_(centre + bias)
    norm.running_var.copy_(variance)
