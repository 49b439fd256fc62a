"""Fits of a model's linear maps and norms to moments, within the freedom of their weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...math.lowrank import low_rank
from ...math.ridge import STRENGTHS, Fit, Moments, compose, fit, identity
from ...models.modules.shared_linear import BasisLinear, Relaxed, out_in, theta_of


@torch.no_grad()
def fit_map(module: nn.Module, train: Moments, selection: Moments, *, tied: bool) -> Fit:
    """Fit a map to moments, and store the fit if it beats the current map on the selection split.

    A weight that is `tied` to other depths stays as it is. The fit then sets the bias, and the residual or the
    coefficients of a shared basis. For the residual, the free fit is projected on the rank of the residual
    (reduced-rank regression).

    Args:
        module: Map to fit, changed in place.
        train: Moments of the inputs and the targets of the map. They may change, which saves the memory of copies.
        selection: Moments of the selection split, which choose the strength of the penalty. They may change too.
        tied: Whether other depths share the weight.

    Returns:
        The fit, with a strength of None if the map was left as it was.
    """
    if isinstance(module, BasisLinear):
        return _fit_coefficients(module, train, selection)
    start = theta_of(module)
    if not tied:
        if module.bias is None:
            train, selection = train.linear(consume=True), selection.linear(consume=True)
        found = fit(train, selection, start, consume=True)
        if found.strength is not None:
            store(module, found.theta)
        return found
    train, selection = train.double(), selection.double()
    every = train + selection
    before = selection.error(start)
    weight, factors, strength = start[:-1].T, None, 0.0
    if isinstance(module, Relaxed):
        free = fit(train, selection, start)
        shared = out_in(module, module.weight.detach().double())
        factors = low_rank(free.theta[:-1].T - shared, len(module.residual_in), every.centred()[0])
        weight, strength = shared + factors[0] @ factors[1], free.strength
    mean = every.xx[-1:] / every.rows
    bias = every.xy[-1:] / every.rows - mean[:, :-1] @ weight.T
    theta = torch.cat([weight.T, start[-1:] if module.bias is None else bias])
    after = selection.error(theta)
    if not after < before:
        return Fit(start, before, before, None)
    if factors is not None:
        module.residual_out.copy_(factors[0])
        module.residual_in.copy_(factors[1])
    if module.bias is not None:
        module.bias.copy_(theta[-1])
    return Fit(theta, before, after, strength)


@torch.no_grad()
def fit_linear(maps: Sequence[nn.Module], train: Moments, selection: Moments) -> Fit:
    """Fit the map, or the product of two maps, of a linearised MLP, and store the fit if it is better.

    The product of two maps is the one of their rank whose outputs are nearest to those of the free fit (`low_rank`
    with the covariance of the inputs).

    Args:
        maps: One map with a bias, or two maps of which the last has a bias.
        train: Moments of the inputs of the first map and the targets of the last.
        selection: Moments of the selection split, which choose the strength of the penalty.

    Returns:
        The fit, with a strength of None if the maps were left as they were.
    """
    *first, last = maps
    start = theta_of(last)
    if first:
        start = compose(theta_of(first[0]), start)
    found = fit(train, selection, start)
    if found.strength is None:
        return found
    if not first:
        store(last, found.theta)
        return found
    every = (train + selection).double()
    left, right = low_rank(found.theta[:-1].T, first[0].out_features, every.centred()[0])
    weight, mean = (left @ right).T, every.xx[-1:] / every.rows
    theta = torch.cat([weight, every.xy[-1:] / every.rows - mean[:, :-1] @ weight])
    after = selection.error(theta)
    if not after < found.before:
        return Fit(start, found.before, found.before, None)
    first[0].weight.copy_(right)
    store(last, torch.cat([left.T, theta[-1:]]))
    return Fit(theta, found.before, after, found.strength)


def _fit_coefficients(module: BasisLinear, train: Moments, selection: Moments) -> Fit:
    basis = torch.cat([module.basis.T.double(), module.basis.new_zeros(1, len(module.basis), dtype=torch.float64)])
    bias = theta_of(module)[-1:]
    found = fit(train.through(basis), selection.through(basis), torch.cat([module.coefficients.T.double(), bias]))
    if found.strength is not None:
        module.coefficients.copy_(found.theta[:-1].T)
        if module.bias is not None:
            module.bias.copy_(found.theta[-1])
    return found


@torch.no_grad()
def fit_gain(norm: nn.Module, readers: Sequence[tuple[nn.Module, Tensor]], train: Moments, selection: Moments) -> Fit:
    """Scale each output of a norm so that the maps that read it come nearer to their targets.

    min_s sum_maps ||W diag(s) x + b - [y, 1] aim||^2: (W^T W o x x^T) s = diag(W^T aim^T y x^T). The bias b is free if
    a map has one. The scale is folded into the norm's weight and bias if it is better on the selection split.

    Args:
        norm: Norm whose output is x.
        readers: Maps that read x, each with its aim, (in + 1, out) float64.
        train: Moments of x (in) in the student and y (in) in the original.
        selection: Moments of the selection split, which choose the strength of a penalty on s - 1.

    Returns:
        The fit, whose theta is [s, 0], (in + 1, 1).
    """
    parts = [_gain_moments(readers, part) for part in (train, selection)]
    start = torch.ones_like(parts[0].xy)
    start[-1] = 0
    found = fit(*parts, start)
    if found.strength is None:
        return found
    if not _scale(norm, found.theta[:-1, 0]):
        return Fit(start, found.before, found.before, None)
    return found


@torch.no_grad()
def fit_norm(norm: nn.Module, train: Moments, selection: Moments) -> Fit:
    """Scale and shift each output of a norm towards its target: min_{s, c} ||diag(s) x + c - y||^2, separately.

    The scale and the shift are folded into the norm's weight and bias if they are better on the selection split.

    Args:
        norm: Norm whose output is x. Without a bias, it is not shifted.
        train: Moments of x (in) in the student and y (in) in the original.
        selection: Moments of the selection split, which choose the strength of a penalty on s - 1.

    Returns:
        The fit, whose theta is diag(s) over c, (in + 1, in).
    """

    def at(part: Moments, strength: float) -> Tensor:
        xx, xy, _ = part.centred()
        held = strength * xx.diagonal().mean()
        if bias is None:
            xx, xy = part.xx[:-1, :-1], part.xy[:-1]
            held = strength * xx.diagonal().mean()
        scale = (xy.diagonal() + held) / (xx.diagonal() + held)
        shift = (part.xy[-1] - scale * part.xx[-1, :-1]) / part.rows
        shift = shift if bias is not None else torch.zeros_like(shift)
        return torch.cat([scale.diag(), shift.unsqueeze(0)])

    train, selection = train.double(), selection.double()
    start, bias = identity(train), getattr(norm, "bias", None)
    before = selection.error(start)
    after, strength = min((selection.error(at(train, strength)), strength) for strength in STRENGTHS)
    if not after < before * (1 - 1e-6):
        return Fit(start, before, before, None)
    theta = at(train + selection, strength)
    if not _scale(norm, theta[:-1].diagonal()):
        return Fit(start, before, before, None)
    if bias is not None:
        bias += theta[-1]
    return Fit(theta, before, after, strength)


def _scale(norm: nn.Module, scale: Tensor) -> bool:
    """Multiply the output of a norm by a scale per channel, in place. Returns False for a norm that cannot be.

    The weight of most norms is their gain, that of Gemma's is their gain less one.
    """
    if isinstance(norm, nn.LayerNorm | nn.BatchNorm2d):
        for tensor in norm.parameters():
            tensor.copy_(scale * tensor)
        return True
    old = copy.deepcopy(norm.state_dict())
    probe = torch.linspace(-1, 1, len(scale), dtype=norm.weight.dtype, device=norm.weight.device)
    aim = scale.to(probe) * norm(probe)
    for less in (0, 1):
        for name, tensor in norm.named_parameters():
            shift = less if name == "weight" else 0
            tensor.copy_(scale * (tensor + shift) - shift)
        if torch.allclose(norm(probe), aim, rtol=1e-2, atol=1e-2 * aim.abs().max().item()):
            return True
        norm.load_state_dict(old)
    return False


def _gain_moments(readers: Sequence[tuple[nn.Module, Tensor]], part: Moments) -> Moments:
    """The normal equations of `fit_gain`, written as the moments of a fit with one output."""
    part = part.double()
    system, right, total = torch.zeros_like(part.xx), part.xx.new_zeros(len(part.xx), 1), part.yy.new_zeros(1, 1)
    system[-1, -1] = part.xx[-1, -1]
    for module, aim in readers:
        weight, aim = theta_of(module)[:-1], aim[:-1]
        free = module.bias is not None and part.rows > 0
        xx, xy, yy = part.centred() if free else (part.xx[:-1, :-1], part.xy[:-1], part.yy)
        system[:-1, :-1] += weight @ weight.T * xx
        right[:-1, 0] += (weight @ aim.T * xy).sum(1)
        total += (aim @ aim.T * yy).sum()
    return Moments(system, right, total)


@torch.no_grad()
def fold(module: nn.Module, before: Tensor) -> None:
    """Fold an input map `before`, (in + 1, in), into a stock map, which then reads [x, 1] @ before instead of x.

    Without a bias, the constant is lost.
    """
    store(module, compose(before, theta_of(module)))


@torch.no_grad()
def store(module: nn.Module, theta: Tensor) -> None:
    """Write theta (in + 1, out) to a stock map. Without a bias, the constant is lost."""
    out_in(module, module.weight).copy_(theta[:-1].T)
    if module.bias is not None:
        module.bias.copy_(theta[-1])
