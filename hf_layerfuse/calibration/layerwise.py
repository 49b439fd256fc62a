"""Hidden states of calibration tokens, one layer at a time: a model is walked through once, front to back."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from ..errors import UnsupportedModelError
from ..evaluation.batches import model_inputs, take, tokens_of
from ..evaluation.divergence import divergence
from ..evaluation.hooks import StopForward
from ..math.ridge import Moments
from ..models.architectures import architecture_for
from .layer_hooks import HookPoint, layer_hooks
from .mmap import MappedActivations
from .samples import SELECTION_EVERY, Sample


class LayerwiseForward:
    """The calibration tokens at one depth of a model.

    Args:
        model: in eval mode; its layers may change between calls, but not in number.
        sample: Calibration sequences to run.

    Attributes:
        depth: the layer that comes next.
        states: what enters it, (batch, tokens, hidden) per batch; of convolutions (batch, hidden, height, width), whose
            pixels are tokens.

    Raises:
        UnsupportedModelError: the model does not run each of its layers once, in order.
    """

    def __init__(self, model: PreTrainedModel, sample: Sample) -> None:
        self.model, self.architecture, self.sample = model, architecture_for(model), sample
        self.layers = self.architecture.layer_list(model)
        self.depth = 0
        self.states = MappedActivations()
        self._fitted: list[Tensor] = []
        self._selection: list[Tensor] = []
        self._calls: list[list[tuple[tuple, dict[str, Any]]]] = []
        for batch, held_out, selection in zip(sample.batches, sample.held_out, sample.selection, strict=True):
            self._enter(batch, held_out, selection)

    @torch.inference_mode()
    def _enter(self, batch: Mapping[str, Tensor], held_out: Tensor, selection: Tensor) -> None:
        """Record what enters the first layer, and with which masks and positions each layer is called."""
        calls: list[tuple[tuple, dict[str, Any]]] = []
        first: list[Tensor] = []

        def record(*args: Any, **kwargs: Any) -> Tensor:
            states = args[0] if args else kwargs.pop("hidden_states")
            first.append(states)
            calls.append((tuple(map(_uncached, args[1:])), {name: _uncached(arg) for name, arg in kwargs.items()}))
            if len(calls) == len(self.layers):
                raise StopForward
            return states

        # layers that only record: the arguments of a layer do not depend on what the layers before it compute
        inputs = model_inputs(batch, self.model)
        with self._layers_replaced(record), contextlib.suppress(StopForward):
            self.model(**inputs)
        if len(calls) != len(self.layers):
            raise UnsupportedModelError(
                f"{type(self.model).__name__} called {len(calls)} of its {len(self.layers)} layers: refit needs a "
                "model that runs each layer once, in order."
            )
        self.states.append(first[0].float())
        # one for all pixels, whose number changes on the way
        mask, shape = inputs.get("attention_mask"), (len(first[0]), 1) if first[0].ndim == 4 else first[0].shape[:-1]
        if mask is None or mask.numel() != math.prod(shape):
            mask = torch.ones(shape, device=first[0].device)
        mask = mask.reshape(shape).bool()  # the choices of a multiple choice input are rows here
        held_out, selection = (
            _per_sequence(chosen.to(mask.device), mask).unsqueeze(1) for chosen in (held_out, selection)
        )
        if not any(chosen.any() for chosen in self.sample.selection):
            # of n tokens, the last n // 5
            selection = SELECTION_EVERY * (mask.sum(1, keepdim=True) - mask.cumsum(1) + 1) <= mask.sum(1, keepdim=True)
        self._fitted.append(mask & ~held_out)
        self._selection.append(selection & mask)
        self._calls.append(calls)

    @contextlib.contextmanager
    def _layers_replaced(self, forward: Callable[..., Tensor]) -> Iterator[None]:
        own = [layer.__dict__.get("forward") for layer in self.layers]
        for layer in self.layers:
            layer.forward = forward
        try:
            yield
        finally:
            for layer, before in zip(self.layers, own, strict=True):
                del layer.forward
                if before is not None:  # such as the hooks that accelerate puts around it
                    layer.forward = before

    @torch.inference_mode()
    def outputs(self) -> Iterator[tuple[Any, Tensor | None]]:
        """The outputs of the model for the held-out sequences, after the last layer: (output, mask) per batch."""
        for index, batch in enumerate(self.sample.batches):
            chosen = self.sample.evaluated[index]
            if not chosen.any():
                continue
            inputs = model_inputs(take(batch, chosen), self.model)
            states = self.states[index][_per_sequence(chosen, self.states[index])]
            states = states.to(self.model.device, self.model.dtype)
            with self._layers_replaced(lambda *args, states=states, **kwargs: states):
                output = self.model(**inputs)
            yield output, inputs.get("attention_mask")

    def advance(self) -> None:
        """Go through the layer at `depth`."""
        after = MappedActivations()
        for _, tensors in self.look(None):
            after.append(tensors[None])
        self.states = after
        self.depth += 1

    @torch.inference_mode()
    def look(
        self, *points: HookPoint | None, layer: nn.Module | None = None, tokens: float = math.inf
    ) -> Iterator[tuple[int, dict[HookPoint | None, Tensor]]]:
        """Run the layer at `depth`, or another in its place, on every batch; yield (batch index, what was seen).

        The point None is the output of the layer, which runs no further than the points need. Where fewer `tokens` are
        enough, the batches are evenly spread ones.
        """
        layer = layer or self.layers[self.depth]
        for index in self.spread(tokens):
            args, kwargs = self._calls[index][self.depth]
            states = self.states[index].to(self.model.device, self.model.dtype)
            output = None
            with layer_hooks(layer, self.architecture, points) as found:
                output = layer(states, *args, **kwargs)
                found[None] = (output[0] if isinstance(output, tuple) else output).float()
            del states, output
            yield index, found

    def spread(self, tokens: float) -> list[int]:
        """Batches, evenly spread, that hold about so many tokens that are fitted."""
        every = len(self.states)
        held = sum(mask.sum().item() for mask in self._fitted)
        count = max(1, math.ceil(every * min(1.0, tokens / max(held, 1))))
        return [place * every // count for place in range(count)]

    def rows(self, index: int, states: Tensor) -> Tensor:
        """The tokens of a batch that are fitted, (tokens, width) float32: no padding, nothing held out."""
        states = tokens_of(states)
        return states[self._fitted[index].to(states.device).expand(states.shape[:2])].float()

    def split(self, index: int, states: Tensor) -> tuple[Tensor, Tensor]:
        """`rows` in two: those to fit at first, and the selection split, which sets the strength of a penalty."""
        shape = tokens_of(states).shape[:2]
        fitted, selection = (masks[index].to(states.device).expand(shape) for masks in (self._fitted, self._selection))
        selected, rows = selection[fitted], self.rows(index, states)
        return rows[~selected], rows[selected]

    def moments(self, rows: Callable[..., tuple[Tensor, ...]], *points: HookPoint | None) -> list[Moments]:
        """Moments of the rows (inputs, targets), or (inputs, targets, scale), that `rows` makes of a batch's index and
        what is seen: those to fit at first, and those of the selection split."""
        found: list[Moments] = []
        for index, seen in self.look(*points):
            x, y, *scale = rows(index, *(seen[point].float() for point in points))
            found = found or [Moments.empty(x.shape[-1], y.shape[-1], x.device) for _ in range(2)]
            del seen
            for part, *split in zip(found, *(self.split(index, of) for of in (x, y, *scale)), strict=True):
                part.add(*split)
            del x, y, scale, split  # before the next batch is read
        return found


class TeacherStates:
    """A teacher walked through once, for several students: its states at every depth are kept, on disk, and so is what
    was seen of it.

    Args:
        walk: at the first layer.
    """

    def __init__(self, walk: LayerwiseForward) -> None:
        self.walk, self.layers, self.architecture = walk, walk.layers, walk.architecture
        self._at = [walk.states]
        self._seen: dict[tuple[int, HookPoint], MappedActivations] = {}

    def states(self, depth: int) -> MappedActivations:
        """What enters a layer."""
        while len(self._at) <= depth:
            self._look(len(self._at) - 1, ())
        return self._at[depth]

    def see(self, places: Collection[tuple[int, HookPoint]]) -> dict[tuple[int, HookPoint], MappedActivations]:
        """The states at each (layer, point)."""
        known = {place: self._depth(*place) for place in places}
        for layer in sorted({layer for layer, _ in places}):
            fresh = {point for depth, point in places if depth == layer and known[depth, point] is None}
            fresh = {point for point in fresh if (layer, point) not in self._seen}
            if fresh:
                self.states(layer)
                self._look(layer, sorted(fresh, key=str))
        return {place: self._seen[place] if depth is None else self.states(depth) for place, depth in known.items()}

    def ahead(self, points: Collection[HookPoint]) -> None:
        """Go on to the end, and keep what is seen in every layer on the way, so that no layer need run again."""
        while len(self._at) <= len(self.layers):
            layer = len(self._at) - 1
            self._look(layer, sorted((point for point in points if self._depth(layer, point) is None), key=str))

    def _depth(self, layer: int, point: HookPoint) -> int | None:
        """The depth whose states a point shows; None is something inside of the layer."""
        post = self.architecture.post_norm
        if point in (HookPoint("attention", "residual"), *([HookPoint("attention", "read")] if post else [])):
            return layer
        return layer + 1 if point == HookPoint("mlp", "sum") and not post else None

    @property
    def whole(self) -> bool:
        """Whether the end of the teacher has been reached, so that a loss costs the student alone."""
        return len(self._at) > len(self.layers)

    def loss(self, student: LayerwiseForward) -> float:
        """Mean divergence of a student that has been walked through, see `prediction.divergence`."""
        return self._divergence(student.outputs())

    def loss_of(self, student: PreTrainedModel) -> float:
        """The same of a student as a whole, in eval mode."""
        return self._divergence(_answers(student, self.walk.sample))

    def _divergence(self, outputs: Iterable[tuple[Any, Tensor | None]]) -> float:
        self.walk.states = self.states(len(self.layers))
        total = count = 0.0
        for (ours, mask), (theirs, _) in zip(outputs, self.walk.outputs(), strict=True):
            found = divergence(ours, theirs, mask)
            total, count = total + found[0], count + found[1]
        return total / count

    def _look(self, layer: int, points: Sequence[HookPoint]) -> None:
        """Run a layer and keep what was seen, and what comes out where that is not known yet."""
        walk, after = self.walk, MappedActivations()
        walk.depth, walk.states = layer, self._at[layer]
        whole = len(self._at) == layer + 1
        found = {(layer, point): MappedActivations() for point in points}
        for _, seen in walk.look(*points, *([None] if whole else [])):
            for point in points:
                found[layer, point].append(seen[point].float())
            if whole:
                after.append(seen[None])
        self._seen |= found
        if whole:
            self._at.append(after)


@torch.inference_mode()
def _answers(model: PreTrainedModel, sample: Sample) -> Iterator[tuple[Any, Tensor | None]]:
    """The outputs of a model for the held-out sequences: (output, mask) per batch, as `LayerwiseForward.outputs`."""
    for batch in sample.held_out_batches:
        inputs = model_inputs(batch, model)
        yield model(**inputs), inputs.get("attention_mask")


def _per_sequence(chosen: Tensor, states: Tensor) -> Tensor:
    """The same choice for states, which have a row for each choice of a multiple choice input."""
    return chosen.repeat_interleave(len(states) // len(chosen))


def _uncached(argument: Any) -> Any:
    """What a layer is called with; a cache would hold the tokens of an earlier call, so there is none."""
    return None if isinstance(argument, Cache) else argument
