"""Memory-mapped tensors: activations on calibration data, and the weights of a model."""

from __future__ import annotations

import tempfile
from typing import Protocol

import torch
from torch import Tensor, nn


class PerBatch(Protocol):
    """One tensor per batch, by batch index."""

    def __getitem__(self, index: int) -> Tensor: ...


class MappedActivations:
    """Memory-mapped activations, one tensor per batch. Their data is in files, and not in the process's memory."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []

    def append(self, tensor: Tensor) -> None:
        with tempfile.NamedTemporaryFile(prefix="layerfuse-") as file:  # the mapping outlives the file name
            kept = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
        self._tensors.append(kept.view(tensor.shape).copy_(tensor))

    def __getitem__(self, index: int) -> Tensor:
        return self._tensors[index]

    def __len__(self) -> int:
        return len(self._tensors)


class WeightSnapshot:
    """Memory-mapped copy of a model's weights, to restore them later."""

    def __init__(self, model: nn.Module) -> None:
        self._states = MappedActivations()
        for tensor in model.state_dict().values():
            self._states.append(tensor)

    @torch.no_grad()
    def restore(self, model: nn.Module) -> None:
        """Copy the weights back to the same model, or to one with the same shapes."""
        for place, tensor in enumerate(model.state_dict().values()):
            tensor.copy_(self._states[place])
