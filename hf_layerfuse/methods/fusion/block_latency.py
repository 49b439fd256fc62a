"""The latency of each block of a model, as it is and when it is linear."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from ...models.architectures import LayerArchitecture, architecture_for
from ...models.surgery.checks import can_be, shapes_of
from ...plan import Drop, Linearize, Plan
from ..candidates import Candidate
from ..latency_table import LatencyTable


class BlockLatencies(LatencyTable):
    """Latency of each block of a model, in milliseconds, measured inside the whole model.

    Layers of one shape and type have the same latency: the time that the model saves per removed layer. It is measured
    by running variants and the original in turn: without such layers, without one kind of their blocks, and with
    linear MLPs. The latency of a layer is divided between its blocks in proportion to their own savings.

    Args:
        model, inputs, path, rounds: Arguments of `LatencyTable`.
        architecture: Architecture table of the model.

    Attributes:
        rest: Latency outside the layers, such as embeddings and the head, in milliseconds.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        inputs: Mapping[str, Tensor],
        path: Path | None = None,
        architecture: LayerArchitecture | None = None,
        **rounds: int,
    ) -> None:
        super().__init__(model, inputs, path, **rounds)
        self.architecture = architecture or architecture_for(model)
        layers = self.architecture.layer_list(model)
        types = getattr(self.architecture.config_of(model.config), "layer_types", None) or [None] * len(layers)
        alike: dict[tuple, list[int]] = {}
        for index, layer in enumerate(layers):
            alike.setdefault((types[index], shapes_of(layer)), []).append(index)
        self._alike = {index: group for group in alike.values() for index in group}
        self._measure_models(plan for group in alike.values() for plan in self._probes(group[0]))
        self.rest = max(self.original - sum(map(self.layer, self._alike)), 0.0)

    def of(self, candidate: Candidate) -> float:
        """Return the latency of the blocks of a candidate after its edit."""
        layer, place = divmod(candidate.start, len(self.architecture.kinds))
        if candidate.edit is None:
            return self.block(layer, self.architecture.kinds[place])
        source = candidate.edit.source
        if source is None:
            return 0.0
        return self.linear(layer) if source.linear else self.layer(layer)

    def layer(self, layer: int) -> float:
        """Return the latency of a layer; 0 for a layer that cannot be removed, whose latency is part of `rest`."""
        return self._saved(Drop("layer", layer))

    def block(self, layer: int, kind: str) -> float:
        """Return the latency of the block of a kind in a layer."""
        saved = {name: self._saved(Drop(name, layer)) for name in self.architecture.kinds}
        return self.layer(layer) * saved[kind] / (sum(saved.values()) or 1.0)

    def linear(self, layer: int) -> float:
        """Return the latency of the MLP of a layer when it is linear."""
        return max(self.block(layer, "mlp") - self._saved(Linearize(layer)), 0.0)

    def _saved(self, edit: Drop | Linearize) -> float:
        """Return the time that the model saves, per layer with this edit."""
        plan = self._probe(edit)
        found = self.cache.values.get(self._key(plan))
        return 0.0 if found is None else max(self.original - found["ms"], 0.0) / max(len(plan.edits), 1)

    def _probes(self, layer: int) -> list[Plan]:
        edits = [Drop("layer", layer), *(Drop(kind, layer) for kind in self.architecture.kinds), Linearize(layer)]
        plans = [self._probe(edit) for edit in edits if edit.kind in ("layer", *self.architecture.kinds)]
        return [plan for plan in plans if can_be(self.model, self.architecture, plan)]

    def _probe(self, edit: Drop | Linearize) -> Plan:
        """Return a plan with the edit in all layers like its own. A plan that removes blocks keeps at least one."""
        group = self._alike[edit.layer]
        if edit.source is None and len(group) == len(self._alike):
            group = group[1:]
        edits = tuple(replace(edit, layer=index) for index in group)
        return self.architecture.plan(len(self._alike), edits)

    def _key(self, plan: Plan) -> str:
        """Return the key of a plan: shape, type and form of its layers."""
        slots = plan.layout().slots
        forms = [
            {kind: str(source.form) for kind, source in slot.blocks.items() if source is not None} for slot in slots
        ]
        return json.dumps([[self._alike[slot.layers[0]][0], form] for slot, form in zip(slots, forms, strict=True)])
