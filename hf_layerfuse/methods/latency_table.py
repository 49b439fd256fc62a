"""Latencies of a model, of its parts and of the models of plans, in a measurement cache."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..evaluation.batches import model_inputs
from ..evaluation.cache import MeasurementCache
from ..evaluation.modes import eval_mode
from ..evaluation.timing import time_missing, timed_on
from ..models.apply import applied
from ..plan import Plan
from .candidates import Candidate


class LatencyTable(ABC):
    """Latencies in milliseconds. Each is measured once, in turn with the original model.

    Args:
        model: Stock model.
        inputs: Batch of the size in use.
        path: Measurement cache; None keeps the measurements in memory.
        repeats: Number of timed rounds.
        warmup: Number of untimed rounds before them.

    Attributes:
        original: Latency of the whole model.
        rest: Latency outside the blocks that candidates change.

    Raises:
        LayerFuseError: Measurement cache of another device or model.
    """

    rest: float
    calls_on_gpu: ClassVar[int] = 1
    """Number of consecutive calls per timing on a GPU."""

    def __init__(
        self,
        model: PreTrainedModel,
        inputs: Mapping[str, Tensor],
        path: Path | None = None,
        *,
        repeats: int = 10,
        warmup: int = 3,
    ) -> None:
        self.model, self.inputs = model, model_inputs(inputs, model)
        self.repeats, self.warmup = repeats, warmup
        self.cache = MeasurementCache(path, timed_on(model, self.inputs))

    @property
    def original(self) -> float:
        return self.cache.values["original"]["ms"]

    @abstractmethod
    def of(self, candidate: Candidate) -> float:
        """Return the latency of the blocks of a candidate after its edit, inside a model."""

    def model_of(self, plan: Plan) -> float:
        """Return the latency of the model of a plan, which is measured on first use."""
        self._measure_models([plan])
        return self.cache.values[self._key(plan)]["ms"]

    @abstractmethod
    def _key(self, plan: Plan) -> str:
        """Return the key of a plan in the cache. Plans with one key have the same latency."""

    def _measure_models(self, plans: Iterable[Plan]) -> None:
        missing = {key: plan for plan in plans if (key := self._key(plan)) not in self.cache.values}
        self._time({key: self._call(plan) for key, plan in missing.items()})

    def _call(self, plan: Plan) -> Callable[[], object]:
        return partial(applied(self.model, plan).eval(), **self.inputs)

    def _time(self, calls: Mapping[str, Callable[[], object]]) -> None:
        """Time the calls that the cache lacks."""
        device, calls = self.model.device, {"original": partial(self.model, **self.inputs), **calls}
        row = self.calls_on_gpu if device.type == "cuda" else 1
        with eval_mode(self.model), torch.inference_mode():
            time_missing(self.cache, calls, device, repeats=self.repeats, warmup=self.warmup, row=row)
