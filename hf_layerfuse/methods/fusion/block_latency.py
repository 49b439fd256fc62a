"""The latency of each block of a model, as it is and when it is linear."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...evaluation.cache import MeasurementCache
from ...evaluation.eval_mode import eval_mode
from ...evaluation.timing import time_missing, timed_on
from ...models.apply import applied
from ...models.architectures import architecture_for
from ...models.surgery.checks import can_be, shapes_of
from ...plan import Drop, Edit, Linearize, Plan


class BlockTimes:
    """Latency of each block of a model, in milliseconds, measured inside the whole model.

    Layers of one shape and type have the same latency: the time that the model saves per removed layer. It is measured
    by running variants and the original in turn: without such layers, without their attention or MLPs, and with
    linear MLPs. The latency of a layer is divided between its two blocks in proportion to their own savings.

    Args:
        model: Stock model.
        inputs: Batch of the size in use.
        path: Measurement cache; None keeps the measurements in memory.
        repeats: Number of timed rounds.
        warmup: Number of untimed rounds before them.

    Attributes:
        original: Latency of the whole model, in milliseconds.
        rest: Latency outside the layers, such as embeddings and the head, in milliseconds.

    Raises:
        LayerFuseError: Measurement cache of another device or model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        inputs: Mapping[str, Tensor],
        path: Path | None = None,
        *,
        repeats: int = 10,
        warmup: int = 3,
    ) -> None:
        self.model, self.architecture = model, architecture_for(model)
        self.inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        self.repeats, self.warmup = repeats, warmup
        self.table = MeasurementCache(path, timed_on(model, self.inputs))
        layers = self.architecture.layer_list(model)
        types = getattr(model.config, "layer_types", None) or [None] * len(layers)
        alike: dict[tuple, list[int]] = {}
        for index, layer in enumerate(layers):
            alike.setdefault((types[index], shapes_of(layer)), []).append(index)
        self._alike = {index: group for group in alike.values() for index in group}
        self.measure()

    def measure(self, *plans: Plan) -> None:
        """Measure the missing latencies: those of the blocks, and those of the models of some plans."""
        probes = [plan for layer, group in self._alike.items() if layer == group[0] for plan in self._probes(layer)]
        todo = {self._key(plan): plan for plan in (*probes, *plans)}
        todo = {key: plan for key, plan in todo.items() if key not in self.table.values}
        if not todo:
            return
        runs = {"original": self.model} | {key: applied(self.model, plan).eval() for key, plan in todo.items()}
        with eval_mode(self.model), torch.inference_mode():
            calls = {key: partial(model, **self.inputs) for key, model in runs.items()}
            time_missing(self.table, calls, self.model.device, repeats=self.repeats, warmup=self.warmup)

    @property
    def original(self) -> float:
        return self.table.values["original"]["ms"]

    @property
    def rest(self) -> float:
        return max(self.original - sum(map(self.layer, self._alike)), 0.0)

    def model_of(self, plan: Plan) -> float:
        """Return the measured latency of the model of a plan."""
        return self.table.values[self._key(plan)]["ms"]

    def layer(self, layer: int) -> float:
        """Return the latency of a layer; 0 for a layer that cannot be removed, whose latency is part of `rest`."""
        return self._saved(layer, Drop("layer", layer))

    def block(self, layer: int, kind: str) -> float:
        """Return the latency of the block of a kind in a layer."""
        saved = {name: self._saved(layer, Drop(name, layer)) for name in self.architecture.kinds}
        return self.layer(layer) * saved[kind] / (sum(saved.values()) or 1.0)

    def linear(self, layer: int) -> float:
        """Return the latency of the MLP of a layer when it is linear."""
        return max(self.block(layer, "mlp") - self._saved(layer, Linearize(layer)), 0.0)

    def _saved(self, layer: int, edit: Edit) -> float:
        """Return the time that the model saves, per layer with this edit."""
        plan = self._probe(layer, edit)
        found = self.table.values.get(self._key(plan))
        return 0.0 if found is None else max(self.original - found["ms"], 0.0) / max(len(plan.edits), 1)

    def _probes(self, layer: int) -> list[Plan]:
        edits = [Drop("layer", layer), *(Drop(kind, layer) for kind in self.architecture.kinds), Linearize(layer)]
        plans = [self._probe(layer, edit) for edit in edits if edit.kind in ("layer", *self.architecture.kinds)]
        return [plan for plan in plans if can_be(self.model, self.architecture, plan)]

    def _probe(self, layer: int, edit: Edit) -> Plan:
        """Return a plan with the edit in all layers like this one. A plan of drops keeps at least one layer."""
        group = self._alike[layer]
        if isinstance(edit, Drop) and len(group) == len(self._alike):
            group = group[1:]
        edits = [Linearize(index) if isinstance(edit, Linearize) else Drop(edit.kind, index) for index in group]
        return Plan(self.architecture.model_type, len(self._alike), tuple(edits), kinds=self.architecture.kinds)

    def _key(self, plan: Plan) -> str:
        """Return the key of a plan: shape, type and form of its layers. Plans with one key have the same latency."""
        slots = plan.layout().slots
        forms = [
            {kind: str(source.form) for kind, source in slot.blocks.items() if source is not None} for slot in slots
        ]
        return json.dumps([[self._alike[slot.layers[0]][0], form] for slot, form in zip(slots, forms, strict=True)])
