"""Fingerprints of models and data."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of the names, types, shapes and bytes of a model's parameters and buffers; the same on every machine."""
    return digest([model.state_dict()])


def digest(batches: Iterable[Mapping[str, Tensor]]) -> str:
    """SHA-256 of batches of named tensors, as in `fingerprint`."""
    found = hashlib.sha256()
    for batch in batches:
        for name, tensor in batch.items():
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()
