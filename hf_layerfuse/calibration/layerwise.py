"""Layer-wise forward: the hidden states of the calibration tokens, in one pass through a model, layer by layer."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError
from ..evaluation.batches import model_inputs, output_mask, take, tokens_of
from ..evaluation.divergence import divergence
from ..evaluation.hooks import StopForward, uncached
from ..math.ridge import Moments
from ..models.architectures import LayerArchitecture, architecture_for
from .disk import StoredTensors
from .layer_hooks import HookPoint, layer_hooks
from .samples import SELECTION_EVERY, Sample


class LayerwiseForward:
    """The calibration tokens at one depth of a model.

    Args:
        model: Model in eval mode. Its layers may change between calls, but their number may not.
        sample: Calibration sequences to run.
        architecture: Architecture table of the model; by default, the one that is registered for it.

    Attributes:
        depth: Index of the next layer to run.
        states: Inputs of that layer, one tensor per batch: (batch, tokens, hidden), or (batch, hidden, height, width)
            in a convolutional network, whose pixels count as tokens.

    Raises:
        UnsupportedModelError: The model does not run each of its layers once, in order.
    """

    def __init__(self, model: PreTrainedModel, sample: Sample, architecture: LayerArchitecture | None = None) -> None:
        self.model, self.architecture, self.sample = model, architecture or architecture_for(model), sample
        self.layers = self.architecture.layer_list(model)
        self.depth = 0
        self.states = StoredTensors()
        self._more_outputs: tuple[Any, ...] | None = None
        self._fitted: list[Tensor] = []
        self._selection: list[Tensor] = []
        self._calls: list[list[tuple[tuple, dict[str, Any]]]] = []
        for batch, held_out, selection in zip(sample.batches, sample.held_out, sample.selection, strict=True):
            self._enter(batch, held_out, selection)

    @torch.inference_mode()
    def _enter(self, batch: Mapping[str, Tensor], held_out: Tensor, selection: Tensor) -> None:
        """Record the inputs of the first layer, and the masks and positions that each layer receives."""
        calls: list[tuple[tuple, dict[str, Any]]] = []
        first: list[Tensor] = []
        run_first = self.layers[0].forward

        def record(*args: Any, **kwargs: Any) -> Any:
            states, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
            args, kwargs = tuple(map(uncached, args)), {name: uncached(arg) for name, arg in kwargs.items()}
            first.append(states)
            calls.append((args, kwargs))
            if len(calls) == len(self.layers):
                raise StopForward
            if len(calls) == 1 and (not self._calls or self._more_outputs is not None):
                self._more_outputs = _more_outputs(run_first(states, *args, **kwargs))
            return self._as_output(states)

        # After the first layer, the layers only record here, because their other arguments do not depend on the hidden
        # states. Some depend on further outputs of the first layer, such as the position bias of T5.
        inputs = model_inputs(batch, self.model)
        with self._layers_replaced(record), contextlib.suppress(StopForward):
            self.model(**inputs)
        if len(calls) != len(self.layers):
            raise UnsupportedModelError(
                f"{type(self.model).__name__} called {len(calls)} of its {len(self.layers)} layers: use a model that "
                "runs each layer once, in order."
            )
        self.states.append(first[0].float())
        # images get one mask entry for all pixels, because the number of pixels changes from layer to layer
        mask, shape = (
            inputs.get(self.architecture.mask),
            (len(first[0]), 1) if first[0].ndim == 4 else first[0].shape[:-1],
        )
        if mask is None or mask.numel() != math.prod(shape):
            mask = torch.ones(shape, device=first[0].device)
        mask = mask.reshape(shape).bool()  # each choice of a multiple-choice input is one row here
        held_out, selection = (
            _per_sequence(chosen.to(mask.device), mask).unsqueeze(1) for chosen in (held_out, selection)
        )
        if not any(chosen.any() for chosen in self.sample.selection):
            # the selection split is then the last n // 5 of a sequence's n tokens
            selection = SELECTION_EVERY * (mask.sum(1, keepdim=True) - mask.cumsum(1) + 1) <= mask.sum(1, keepdim=True)
        self._fitted.append(mask & ~held_out)
        self._selection.append(selection & mask)
        self._calls.append(calls)

    def _as_output(self, states: Tensor) -> Any:
        """States in the form in which a layer returns them."""
        return states if self._more_outputs is None else (states, *self._more_outputs)

    @contextlib.contextmanager
    def _layers_replaced(self, forward: Callable[..., Any]) -> Iterator[None]:
        own = [layer.__dict__.get("forward") for layer in self.layers]
        for layer in self.layers:
            layer.forward = forward
        try:
            yield
        finally:
            for layer, before in zip(self.layers, own, strict=True):
                del layer.forward
                if before is not None:  # for example a forward that accelerate wrapped in its hooks
                    layer.forward = before

    def held_out_states(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the states of the sequences for evaluation: (batch index, states), for each batch that has some."""
        for index, chosen in enumerate(self.sample.evaluated):
            if chosen.any():
                states = self.states[index]
                yield index, states[_per_sequence(chosen, states)]

    @torch.inference_mode()
    def outputs(self) -> Iterator[tuple[Any, Tensor | None]]:
        """Yield the model's outputs for the held-out sequences, once all layers have run: (output, mask) per batch."""
        for index, states in self.held_out_states():
            inputs = model_inputs(take(self.sample.batches[index], self.sample.evaluated[index]), self.model)
            states = states.to(self.model.device, self.model.dtype)
            with self._layers_replaced(lambda *args, states=states, **kwargs: self._as_output(states)):
                output = self.model(**inputs)
            yield output, output_mask(inputs)

    def advance(self) -> None:
        """Run the layer at `depth` on all batches, and move to the next layer."""
        after = StoredTensors()
        for _, tensors in self.look(None):
            after.append(tensors[None])
        self.states = after
        self.depth += 1

    @torch.inference_mode()
    def look(
        self, *points: HookPoint | None, layer: nn.Module | None = None, tokens: float = math.inf
    ) -> Iterator[tuple[int, dict[HookPoint | None, Tensor]]]:
        """Run the layer at `depth` on the batches, and yield (batch index, states by hook point).

        The layer stops once all points are recorded.

        Args:
            points: Hook points to record. None stands for the output of the layer.
            layer: Layer that replaces the one at `depth`.
            tokens: Number of fitted tokens that are enough. With fewer than all, the batches are evenly spread.
        """
        layer = layer or self.layers[self.depth]
        for index in self.spread(tokens):
            args, kwargs = self._calls[index][self.depth]
            states = self.states[index].to(self.model.device, self.model.dtype)
            output = None
            with layer_hooks(layer, self.architecture, points) as found:
                output = layer(states, *args, **kwargs)
                found[None] = (output[0] if isinstance(output, tuple) else output).float()
            yield index, {point: _as_tokens(tensor, states) for point, tensor in found.items()}
            del states, output, found

    def spread(self, tokens: float) -> list[int]:
        """Indices of evenly spread batches that hold about `tokens` fitted tokens."""
        every = len(self.states)
        held = sum(mask.sum().item() for mask in self._fitted)
        count = max(1, math.ceil(every * min(1.0, tokens / max(held, 1))))
        return [place * every // count for place in range(count)]

    def rows(self, index: int, states: Tensor) -> Tensor:
        """The fitted tokens of a batch, (tokens, width) float32, without padding and the held-out split."""
        states = tokens_of(states)
        return states[self._fitted[index].to(states.device).expand(states.shape[:2])].float()

    def split(self, index: int, states: Tensor) -> tuple[Tensor, Tensor]:
        """`rows` in two parts: the training rows, and the selection split, which sets the strength of a penalty."""
        shape = tokens_of(states).shape[:2]
        fitted, selection = (masks[index].to(states.device).expand(shape) for masks in (self._fitted, self._selection))
        selected, rows = selection[fitted], self.rows(index, states)
        return rows[~selected], rows[selected]

    def moments(self, rows: Callable[..., tuple[Tensor, ...]], *points: HookPoint | None) -> list[Moments]:
        """Moments of the training rows and of the selection split, as a list of two.

        Args:
            rows: Function of a batch index and the states at `points`. It returns the rows (inputs, targets), or
                (inputs, targets, scale).
            points: Hook points to record. None stands for the output of the layer.
        """
        found: list[Moments] = []
        for index, seen in self.look(*points):
            x, y, *scale = rows(index, *(seen[point].float() for point in points))
            found = found or [Moments.empty(x.shape[-1], y.shape[-1], x.device) for _ in range(2)]
            del seen
            for part, *split in zip(found, *(self.split(index, of) for of in (x, y, *scale)), strict=True):
                part.add(*split)
            del x, y, scale, split  # frees memory before the next batch is read
        return found


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


def _per_sequence(chosen: Tensor, states: Tensor) -> Tensor:
    """Expand a mask of sequences to the rows of `states`, which has one row per choice of a multiple-choice input."""
    return chosen.repeat_interleave(len(states) // len(chosen))


def _as_tokens(found: Tensor, states: Tensor) -> Tensor:
    """A tensor with the batch and token axes of the states. Some layers flatten these to one axis in their MLP."""
    flat = found.ndim == 2 and states.ndim == 3 and len(found) == states.shape[0] * states.shape[1]
    return found.view(*states.shape[:2], -1) if flat else found


def _more_outputs(output: Any) -> tuple[Any, ...] | None:
    """Outputs of a layer after its hidden states; None if it returns the hidden states alone, without a tuple."""
    return output[1:] if isinstance(output, tuple) else None
