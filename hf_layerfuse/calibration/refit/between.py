"""What lies between an output projection and the residual sum: nothing, a factor, or a norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...models.architectures import Block, TransformerArchitecture
from ...plan import Kind
from ..layer_hooks import HookPoint
from ..layerwise import LayerwiseForward

_SMALLEST = 1e-3
"""Smallest factor that aims are divided by, relative to the largest one."""

_TOKENS = 4096
"""Number of tokens that are enough to measure the size of outputs."""


class Between:
    """The aims of an output projection, given what has to reach the residual sum.

    A factor divides the aims. Behind a norm, only the direction of an output matters, so the aims get the size that
    the outputs have now.

    Args:
        layerwise: Layer-wise forward of the student, at the layer of the block.
        block: Block of the student.

    Attributes:
        norm: The norm, or None.
    """

    def __init__(self, layerwise: LayerwiseForward, block: Block) -> None:
        found = _between(layerwise.layers[block.layer], layerwise.architecture, block.kind)
        self.norm = found if isinstance(found, nn.Module) else None
        self._factor: Tensor | None = None
        self._size: float | None = None
        if self.norm is not None:
            self._factor = gain_of(self.norm)
            # an MLP that is about to become linear has no outputs yet; any size does
            self._size = _size(layerwise, HookPoint(block.kind, "output")) or 1.0
        elif found is not None:
            self._factor = torch.as_tensor(found).detach()
        if self._factor is not None:
            least = _SMALLEST * self._factor.abs().max().clamp_min(1e-12)
            small = self._factor.abs() < least
            self._factor = torch.where(small, least.copysign(self._factor), self._factor)

    def aims(self, added: Tensor) -> Tensor:
        """Outputs of the projection for which `added`, (..., width), reaches the sum."""
        if self._factor is None:
            return added
        aims = added / self._factor.to(added)
        if self._size is None:
            return aims
        return aims * (self._size / aims.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12))

    @torch.no_grad()
    def normed(self, output: Tensor) -> Tensor:
        """Output of the norm for outputs of the projection, (..., width) float32."""
        return self.norm(output.to(self.norm.weight.dtype)).float()


@torch.no_grad()
def through(layer: nn.Module, architecture: TransformerArchitecture, kind: Kind, output: Tensor) -> Tensor:
    """What reaches the residual sum of an output of the output projection, (..., width)."""
    found = _between(layer, architecture, kind)
    if isinstance(found, nn.Module):
        return found(output.to(next(found.parameters(), output).dtype))
    return output if found is None else output * found


def _between(layer: nn.Module, architecture: TransformerArchitecture, kind: Kind) -> nn.Module | Tensor | float | None:
    path = architecture.between.get(kind)
    if path is None:
        return None
    found: Any = layer
    for name in path.split("."):
        found = getattr(found, name)
    return found


@torch.no_grad()
def gain_of(norm: nn.Module) -> Tensor:
    """Factor by which a norm multiplies what it has normalised, (width,) float32, whatever its weight stands for."""
    weight = norm.weight
    probe = torch.ones(len(weight), dtype=weight.dtype, device=weight.device)
    probe[::2] = -1  # of mean zero and variance one
    bias = getattr(norm, "bias", None)
    return ((norm(probe) - (0 if bias is None else bias)) * probe).float()


def _size(layerwise: LayerwiseForward, point: HookPoint) -> float:
    """Root of the mean square of the states at a hook point."""
    total = count = 0.0
    for index, seen in layerwise.look(point, tokens=_TOKENS):
        rows = layerwise.rows(index, seen[point])
        total, count = total + rows.square().sum().item(), count + rows.numel()
    return (total / max(count, 1.0)) ** 0.5
