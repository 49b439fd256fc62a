"""Operator `mix` in training: each step draws every element of a fused weight from one of its source layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class Mixture(nn.Module):
    """Source weights that a model's fused weights are mixed from (O'Neill et al. 2021, section 3).

    Training updates these parts. Each step takes every element of a fused weight from a random part, and that part gets
    its gradient. Outside training, and at the end, the weight is the mean of its parts.

    Args:
        model: Model with the mixed parameters; shared ones are mixed once.
        parts: Tensors of each mixed parameter by its name, one per fused block, in its shape.
    """

    def __init__(self, model: PreTrainedModel, parts: Mapping[str, Sequence[Tensor]]) -> None:
        super().__init__()
        found = {}
        for name, tensors in parts.items():
            target = model.get_parameter(name)
            found.setdefault(id(target), (target, [tensor.detach().to(target).clone() for tensor in tensors]))
        self._targets = tuple(
            target for target, _ in found.values()
        )  # a tuple, so that they are not parameters of this
        self.parts = nn.ModuleList(nn.ParameterList(tensors) for _, tensors in found.values())
        self._picks: list[Tensor] = []
        self.average()

    @property
    def targets(self) -> tuple[nn.Parameter, ...]:
        """The mixed parameters of the model."""
        return self._targets

    @torch.no_grad()
    def draw(self) -> None:
        """Mix the weights anew, before a step."""
        self._picks = []
        for target, parts in zip(self._targets, self.parts, strict=True):
            picks = torch.randint(len(parts), target.shape, device=target.device)
            target.copy_(torch.stack(list(parts)).gather(0, picks.unsqueeze(0)).squeeze(0))
            self._picks.append(picks)

    @torch.no_grad()
    def scatter_gradients(self) -> None:
        """Give the gradient of each element to the part that it was taken from, after the backward pass."""
        for target, parts, picks in zip(self._targets, self.parts, self._picks, strict=True):
            for place, part in enumerate(parts):
                part.grad = torch.where(picks == place, target.grad, 0)
            target.grad = None

    @torch.no_grad()
    def average(self) -> None:
        """Make each weight the mean of its parts, outside training."""
        for target, parts in zip(self._targets, self.parts, strict=True):
            target.copy_(torch.stack(list(parts)).double().mean(0))
