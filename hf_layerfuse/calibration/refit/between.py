"""Fits of output projections that a factor or a norm separates from the residual sum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...models.architectures import Block, TransformerArchitecture
from ...plan import Kind
from ..layerwise import LayerwiseForward

_SMALLEST = 1e-3
"""Smallest factor that aims are divided by, relative to the largest one."""


class Between:
    """The aims of an output projection, given what has to reach the residual sum.

    A factor divides the aims. A norm divides each token by a size of its own. The fit takes this size as it is now, and
    counts each token by its inverse, so that the error is that of the sum.

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
        if self.norm is not None:
            self._factor = gain_of(self.norm)
        elif found is not None:
            self._factor = torch.as_tensor(found).detach()
        if self._factor is not None:
            least = _SMALLEST * self._factor.abs().max().clamp_min(1e-12)
            small = self._factor.abs() < least
            self._factor = torch.where(small, least.copysign(self._factor), self._factor)

    def aims(self, added: Tensor, output: Tensor | None) -> Tensor:
        """Outputs that the projection should have.

        Args:
            added: What has to reach the residual sum, (..., width).
            output: Current output of the projection, (..., width). Only blocks with a norm need it.

        Returns:
            The aims, (..., width).
        """
        if self._factor is None:
            return added
        aims = added / self._factor.to(added)
        return aims if self.norm is None else aims * _size(output)

    def weights(self, output: Tensor) -> tuple[Tensor, ...]:
        """Weights of the tokens in a fit of the aims: none, or one tensor (..., 1) for blocks with a norm.

        Args:
            output: Current output of the projection, (..., width).
        """
        return () if self.norm is None else (1 / _size(output),)

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


def _size(output: Tensor) -> Tensor:
    """Root of the mean square of each token, (..., 1); one for an MLP that is about to become linear, which is zero."""
    size = output.square().mean(-1, keepdim=True).sqrt()
    return torch.where(size > 0, size, torch.ones_like(size))
