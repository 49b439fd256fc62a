"""How long each block of a model takes, and what is left of that when it becomes linear."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...evaluation.cache import Table
from ...evaluation.eval_mode import eval_mode
from ...evaluation.timing import time_missing, timed_on
from ...models.apply import applied
from ...models.architectures import architecture_for
from ...models.surgery.checks import can_be, shapes_of
from ...plan import Drop, Edit, Linearize, Plan


class BlockTimes:
    """Milliseconds of the blocks of a model, in the model as a whole.

    Layers of one shape and type take the same time. It is what a model is faster by without them, for each that is
    gone: models without such layers, without their attention or MLPs, with linear MLPs, and the original run in turn.
    What the two blocks of a layer take are shares of what it takes.

    Args:
        model: a stock one.
        inputs: a batch as it will be used.
        path: of a file that keeps what was measured.
        repeats: timed rounds.
        warmup: rounds before those, not timed.

    Attributes:
        original: milliseconds of the whole model.
        rest: milliseconds of what is in no layer, such as embeddings and the head.

    Raises:
        LayerFuseError: the file was measured on another device or model.
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
        self.table = Table(path, timed_on(model, self.inputs))
        layers = self.architecture.layer_list(model)
        types = getattr(model.config, "layer_types", None) or [None] * len(layers)
        alike: dict[tuple, list[int]] = {}
        for index, layer in enumerate(layers):
            alike.setdefault((types[index], shapes_of(layer)), []).append(index)
        self._alike = {index: group for group in alike.values() for index in group}
        self.measure()

    def measure(self, *plans: Plan) -> None:
        """Time what is not known yet: the blocks, and the models that some plans lead to."""
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
        """What a model takes that was measured."""
        return self.table.values[self._key(plan)]["ms"]

    def layer(self, layer: int) -> float:
        """What a layer takes; 0 of one that has to stay, whose time is in the rest."""
        return self._saved(layer, Drop("layer", layer))

    def block(self, layer: int, kind: str) -> float:
        """What the block of a kind takes in a layer."""
        saved = {name: self._saved(layer, Drop(name, layer)) for name in self.architecture.kinds}
        return self.layer(layer) * saved[kind] / (sum(saved.values()) or 1.0)

    def linear(self, layer: int) -> float:
        """What the MLP of a layer takes when it is linear."""
        return max(self.block(layer, "mlp") - self._saved(layer, Linearize(layer)), 0.0)

    def _saved(self, layer: int, edit: Edit) -> float:
        """What a model is faster by, for each layer that this was done to."""
        plan = self._probe(layer, edit)
        found = self.table.values.get(self._key(plan))
        return 0.0 if found is None else max(self.original - found["ms"], 0.0) / max(len(plan.edits), 1)

    def _probes(self, layer: int) -> list[Plan]:
        edits = [Drop("layer", layer), *(Drop(kind, layer) for kind in self.architecture.kinds), Linearize(layer)]
        plans = [self._probe(layer, edit) for edit in edits if edit.kind in ("layer", *self.architecture.kinds)]
        return [plan for plan in plans if can_be(self.model, self.architecture, plan)]

    def _probe(self, layer: int, edit: Edit) -> Plan:
        """The edit in all layers that are like this one; something has to be left."""
        group = self._alike[layer]
        if isinstance(edit, Drop) and len(group) == len(self._alike):
            group = group[1:]
        edits = [Linearize(index) if isinstance(edit, Linearize) else Drop(edit.kind, index) for index in group]
        return Plan(self.architecture.model_type, len(self._alike), tuple(edits), kinds=self.architecture.kinds)

    def _key(self, plan: Plan) -> str:
        """What plans have in common that lead to models of one speed: shape and type of the layers, and their forms."""
        slots = plan.layout().slots
        forms = [
            {kind: str(source.form) for kind, source in slot.blocks.items() if source is not None} for slot in slots
        ]
        return json.dumps([[self._alike[slot.layers[0]][0], form] for slot, form in zip(slots, forms, strict=True)])
