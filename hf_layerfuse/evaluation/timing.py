"""Interleaved timing: other load on the machine slows all calls alike."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .cache import MeasurementCache

_Name = TypeVar("_Name", bound=Hashable)


class Timed(NamedTuple):
    """Milliseconds: the median, and the distance between the quartiles."""

    median: float
    spread: float


def device_name(device: torch.device) -> str:
    """Name of a device in a measurement cache."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {platform.machine()}"


def timed_on(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """Conditions that determine the latency of a forward pass, as JSON types."""
    config = {name: value for name, value in model.config.to_dict().items() if name != "transformers_version"}
    return {
        "config": hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:16],
        "device": device_name(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "inputs": {name: list(tensor.shape) for name, tensor in inputs.items()},
        "torch": torch.__version__,
    }


def interleaved(
    runs: Mapping[_Name, Callable[[], Any]], device: torch.device, *, repeats: int, warmup: int, row: int = 1
) -> dict[_Name, Timed]:
    """Time some calls: all of them once, all of them again, and so on.

    Args:
        runs: Calls by name.
        device: Device of the calls, which is synchronised.
        repeats: Number of timed rounds.
        warmup: Number of untimed rounds before those.
        row: Number of consecutive calls to average. A GPU queues many operations before it finishes the first, so a
            single synchronised call takes longer than it does among others.
    """
    rounds = [
        {name: _milliseconds(call, device, row) for name, call in runs.items()}
        for _ in tqdm(range(warmup + repeats), "Timing", unit="round", disable=None, leave=False)
    ]
    found = {}
    for name in runs:
        low, median, high = np.percentile([times[name] for times in rounds[warmup:]], (25, 50, 75))
        found[name] = Timed(float(median), float(high - low))
    return found


def time_missing(
    cache: MeasurementCache,
    runs: Mapping[str, Callable[[], Any]],
    device: torch.device,
    *,
    repeats: int,
    warmup: int,
    row: int = 1,
) -> None:
    """Time the calls that a measurement cache lacks, and store `ms` and `spread_ms`.

    Later timings are scaled by the latency of the original at that time.

    Args:
        cache: Measurement cache of milliseconds.
        runs: Calls by name; the original is one of them, and is timed each time.
        device, repeats, warmup, row: Arguments of `interleaved`.
    """
    todo = {name: call for name, call in runs.items() if name not in cache.values}
    if not todo:
        return
    timed = interleaved({"original": runs["original"], **todo}, device, repeats=repeats, warmup=warmup, row=row)
    known = cache.values.get("original")
    pace = known["ms"] / timed["original"].median if known else 1.0
    fresh = {name: {"ms": value.median * pace, "spread_ms": value.spread * pace} for name, value in timed.items()}
    cache.put(fresh | ({"original": known} if known else {}))


def _milliseconds(call: Callable[[], Any], device: torch.device, row: int) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(row):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) * 1000 / row
