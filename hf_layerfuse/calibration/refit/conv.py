"""Closed-form repair of residual convolutional layers: batch-norm statistics, and the output convolution."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...evaluation.batches import tokens_of
from ...math.lowrank import low_rank
from ...math.ridge import Moments, compose, fit, identity
from ...models.modules.shared_linear import Relaxed, ResidualConv2d, as_stored, out_in, theta_of
from ...plan import Slot
from ..disk import StoredTensors
from ..layer_hooks import HookPoint
from .base import Repair
from .linear import fit_norm

SUM = HookPoint("conv", "sum")


class ConvRepair(Repair):
    """Repair of residual layers, in steps that each use the results of the steps before.

    The first batch norm takes the statistics of its new inputs (REPAIR, Jordan et al. 2023, section 4). Then the second
    convolution and its norm are fitted to the original's sum, before the last activation, at the end of the slot. A
    convolution that belongs to this depth alone is refitted as a whole, by a ridge fit as a linear map of patches. For
    a shared convolution, the fit sets the gain and the bias of the norm, and the residual of this depth, if it has one.
    """

    def _wanted(self, slot: Slot) -> set[tuple[int, HookPoint]]:
        return {(slot.layers[-1], SUM)}

    @torch.no_grad()
    def _repair(self, index: int, slot: Slot, seen: Mapping[tuple[int, HookPoint], StoredTensors]) -> None:
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

    def _fit_residual(self, index: int, conv: ResidualConv2d, norm: nn.BatchNorm2d, target: StoredTensors) -> None:
        """Refit the residual of this depth on the shared convolution: the free fit of all weights, projected on its
        rank."""
        train, selection = self._moments(norm, HookPoint("conv", "features"), target, lambda x: _patches(conv, x))
        start, every = _theta(conv, norm), train + selection
        gain = _gain(norm)
        # the residual is divided by the gain, which is 0 for a channel that is switched off
        gain = torch.where(gain.abs() < 1e-3 * gain.abs().mean(), 1e-3 * gain.abs().mean(), gain).unsqueeze(1)
        shared = gain * out_in(conv, conv.weight.double())
        free = fit(train, selection, start).theta[:-1].T
        left, right = low_rank(free - shared, len(conv.residual_in), every.centred()[0])
        weight = shared + left @ right
        bias = (every.xy[-1] - weight @ every.xx[-1, :-1]) / every.rows
        theta = torch.cat([weight.T, bias.unsqueeze(0)])
        before, after = selection.error(start), selection.error(theta)
        self._note(index, "conv", "residual", before, min(before, after))
        if after < before:
            conv.residual_out.copy_(left / gain)
            conv.residual_in.copy_(right)
            _set_norm(conv, norm, theta, gain.squeeze(1), every)

    def _fit_outputs(self, index: int, conv: nn.Conv2d, norm: nn.BatchNorm2d, target: StoredTensors) -> None:
        """Refit the layer's output by one linear map, folded into the convolution (ReplaceMe)."""
        moments = self._moments(norm, HookPoint("conv", "norm"), target, norm)
        found = fit(*moments, identity(moments[0]))
        self._note(index, "conv", "linear", found.before, found.after)
        if found.strength is not None:
            theta = _theta(conv, norm)
            patches = self._moments(norm, HookPoint("conv", "features"), target, lambda x: _patches(conv, x))
            _store(conv, norm, compose(theta, found.theta), patches[0] + patches[1])

    def _moments(self, norm: nn.BatchNorm2d, point: HookPoint, target: StoredTensors, inputs) -> list[Moments]:
        """Moments of `inputs` of the states at a hook point, and of the layer's target output."""

        def rows(index: int, total: Tensor, given: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
            residual = total - norm(given)
            return tokens_of(inputs(seen)), tokens_of(target[index].to(residual.device) - residual)

        return self.student.moments(rows, SUM, HookPoint("conv", "norm"), point)

    def _take_statistics(self, norm: nn.BatchNorm2d, place: str) -> None:
        """Set the statistics of a batch norm to the mean and the variance of its inputs, as training would."""
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
    """The input patch of each output of a convolution, (batch, outputs, channels x height x width of the kernel)."""
    return F.unfold(x, conv.kernel_size, conv.dilation, conv.padding, conv.stride).transpose(1, 2)


def _gain(norm: nn.BatchNorm2d) -> Tensor:
    """The factor by which a batch norm multiplies each channel in eval mode."""
    return norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()


def _theta(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    """A convolution and the batch norm after it as one linear map of patches, (in + 1, out) float64."""
    theta, gain = theta_of(conv), _gain(norm)
    constant = norm.bias.double() + gain * (theta[-1] - norm.running_mean.double())
    return torch.cat([theta[:-1] * gain, constant.unsqueeze(0)])


def _store(conv: nn.Conv2d, norm: nn.BatchNorm2d, theta: Tensor, every: Moments) -> None:
    """Write a linear map of patches to a convolution and the batch norm after it.

    The weight keeps its norm, because the norm scales the steps of later training.
    """
    weight, old = theta[:-1].T, conv.weight.double().flatten(1)
    scale = (weight.norm() / old.norm().clamp_min(1e-30)).clamp_min(1e-30)
    _set_norm(conv, norm, theta, scale.expand(len(weight)), every)
    conv.weight.copy_(as_stored(conv, weight / scale))


def _set_norm(conv: nn.Conv2d, norm: nn.BatchNorm2d, theta: Tensor, gain: Tensor, every: Moments) -> None:
    """Set a batch norm so that it and its convolution give `theta`; the convolution's weight is theta's over `gain`.

    The norm takes the statistics of the convolution's outputs on the patches in `every`, so that training and
    evaluation agree.

    Args:
        conv: Convolution before the norm.
        norm: Batch norm to set.
        theta: Linear map of patches, (in + 1, out) float64.
        gain: Factor of each channel between the convolution's weight and that of theta, (out,).
        every: Moments of the patches.
    """
    weight = theta[:-1].T / gain.unsqueeze(1)
    variance = (weight @ every.centred()[0] * weight).sum(1) / every.rows
    centre = weight @ (every.xx[-1, :-1] / every.rows)
    bias = 0 if conv.bias is None else conv.bias.double()
    norm.weight.copy_(gain * (variance + norm.eps).sqrt())
    norm.bias.copy_(theta[-1] + gain * centre)
    norm.running_mean.copy_(centre + bias)
    norm.running_var.copy_(variance)
