"""Tensors on disk: activations on calibration data, and the weights of a model."""

from __future__ import annotations

import io
import tempfile
import weakref
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn


class PerBatch(Protocol):
    """One tensor per batch, by batch index."""

    def __getitem__(self, index: int) -> Tensor: ...


class _Place(NamedTuple):
    start: int
    shape: torch.Size
    dtype: torch.dtype


class StoredTensors:
    """Tensors in one temporary file, by index. Each is read afresh, so that only the tensors in use take memory.

    Mapped files would stay in the memory of the process after their use.
    """

    def __init__(self) -> None:
        self._places: list[_Place] = []
        self._file = tempfile.TemporaryFile(prefix="layerfuse-", buffering=0)  # noqa: SIM115  # as long as self
        weakref.finalize(self, self._file.close)

    def append(self, tensor: Tensor) -> None:
        self._places.append(_Place(self._file.seek(0, io.SEEK_END), tensor.shape, tensor.dtype))
        left = _bytes_of(tensor.detach().cpu().contiguous())
        while len(left):
            left = left[self._file.write(left) :]

    def __getitem__(self, index: int) -> Tensor:
        start, shape, dtype = self._places[index]
        found = torch.empty(shape, dtype=dtype)
        left = _bytes_of(found)
        self._file.seek(start)
        while len(left):  # Linux reads at most two GiB at once
            if not (read := self._file.readinto(left)):
                raise OSError(f"{self._file.name}, a temporary file of activations, was cut short: check the disk.")
            left = left[read:]
        return found

    def __len__(self) -> int:
        return len(self._places)


class WeightSnapshot:
    """Copy of a model's weights on disk, to restore them later."""

    def __init__(self, model: nn.Module) -> None:
        self._states = StoredTensors()
        for tensor in model.state_dict().values():
            self._states.append(tensor)

    @torch.no_grad()
    def restore(self, model: nn.Module) -> None:
        """Copy the weights back to the same model, or to one with the same shapes."""
        for place, tensor in enumerate(model.state_dict().values()):
            tensor.copy_(self._states[place])


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else memoryview(b"")
