"""Hidden states and loss of a teacher, which several students share."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..evaluation.batches import model_inputs, output_mask
from ..evaluation.divergence import divergence
from .disk import StoredTensors
from .layer_hooks import HookPoint
from .layerwise import LayerwiseForward
from .samples import Sample


class TeacherStates:
    """Hidden states of a teacher, from one layer-wise forward that several students share.

    The states at every depth, and at every hook point that a student asked for, are kept on disk until `forget`.

    Args:
        layerwise: Layer-wise forward of the teacher, at the first layer.
    """

    def __init__(self, layerwise: LayerwiseForward) -> None:
        self.layerwise, self.layers, self.architecture = layerwise, layerwise.layers, layerwise.architecture
        self._at = {layerwise.depth: layerwise.states}
        self._seen: dict[tuple[int, HookPoint], StoredTensors] = {}

    def states(self, depth: int) -> StoredTensors:
        """The inputs of the layer at `depth`; at the number of layers, the output of the last one."""
        while self._reached < depth:
            self._look(self._reached, ())
        return self._at[depth]

    def forget(self, depth: int) -> None:
        """Delete all states before the layer at `depth`."""
        self.states(depth)
        self._at = {at: states for at, states in self._at.items() if at >= depth}
        self._seen = {place: states for place, states in self._seen.items() if place[0] >= depth}
        self.layerwise.depth, self.layerwise.states = depth, self._at[depth]

    def see(self, places: Collection[tuple[int, HookPoint]]) -> dict[tuple[int, HookPoint], StoredTensors]:
        """The states at each (layer, hook point). Layers run only for points that are not recorded yet."""
        known = {place: self._depth(*place) for place in places}
        for layer in sorted({layer for layer, _ in places}):
            fresh = {point for depth, point in places if depth == layer and known[depth, point] is None}
            fresh = {point for point in fresh if (layer, point) not in self._seen}
            if fresh:
                self.states(layer)
                self._look(layer, sorted(fresh, key=str))
        return {place: self._seen[place] if depth is None else self.states(depth) for place, depth in known.items()}

    def ahead(self, points: Collection[HookPoint]) -> None:
        """Run all remaining layers and keep the states at `points` in each, so that no layer has to run again."""
        while not self.whole:
            layer = self._reached
            self._look(layer, sorted((point for point in points if self._depth(layer, point) is None), key=str))

    def _depth(self, layer: int, point: HookPoint) -> int | None:
        """The depth whose states equal those at a hook point; None for a point inside the layer."""
        place = self.architecture.place(point.kind, point.place)
        return None if place.module else layer + (place.when == "after")

    @property
    def whole(self) -> bool:
        """Whether all layers of the teacher have run, so that a loss costs a pass of the student alone."""
        return self._reached == len(self.layers)

    @property
    def _reached(self) -> int:
        return max(self._at)

    def loss(self, student: LayerwiseForward) -> float:
        """Mean divergence (`evaluation.divergence`) of a student whose layer-wise forward has reached the end."""
        return self._divergence(student.outputs())

    def loss_of(self, student: PreTrainedModel) -> float:
        """Mean divergence of a student in eval mode, from ordinary forward passes."""
        return self._divergence(_answers(student, self.layerwise.sample))

    def _divergence(self, outputs: Iterable[tuple[Any, Tensor | None]]) -> float:
        self.layerwise.states = self.states(len(self.layers))
        total = count = 0.0
        for (ours, mask), (theirs, _) in zip(outputs, self.layerwise.outputs(), strict=True):
            found = divergence(ours, theirs, mask)
            total, count = total + found[0], count + found[1]
        return total / count

    def _look(self, layer: int, points: Sequence[HookPoint]) -> None:
        """Run a layer and keep the states at `points`, and its output unless that is known already."""
        layerwise, after = self.layerwise, StoredTensors()
        layerwise.depth, layerwise.states = layer, self._at[layer]
        whole = self._reached == layer
        found = {(layer, point): StoredTensors() for point in points}
        for _, seen in layerwise.look(*points, *([None] if whole else [])):
            for point in points:
                found[layer, point].append(seen[point].float())
            if whole:
                after.append(seen[None])
        self._seen |= found
        if whole:
            self._at[layer + 1] = after


@torch.inference_mode()
def _answers(model: PreTrainedModel, sample: Sample) -> Iterator[tuple[Any, Tensor | None]]:
    """Yield a model's outputs for the held-out sequences, as `LayerwiseForward.outputs`: (output, mask) per batch."""
    for batch in sample.held_out_batches:
        inputs = model_inputs(batch, model)
        yield model(**inputs), output_mask(inputs)
