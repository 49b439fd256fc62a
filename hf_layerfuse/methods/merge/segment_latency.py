"""The latency of each segment of a conv graph."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...calibration.refit.conv_graph import see
from ...evaluation.modes import eval_mode
from ...models.architectures import ConvGraphArchitecture, Place, Skip, architecture_for
from ...models.architectures.segments import Merged
from ...models.modules.conv import PaddedConv2d, convolution, module_at
from ...models.surgery.conv_graph import merged_shape, windows_of
from ...plan import Plan
from ..candidates import edits_of
from ..latency_table import LatencyTable
from .candidates import Segment, cheapest, folded_plan


class SegmentLatencies(LatencyTable):
    """Latency of each candidate: one convolution of its shape, the sum at its end, and the activation.

    Each shape is measured once, on the device of the model, in turn with the others. Parts alone do not include the
    overhead between them. Two whole models are therefore measured too: the original with folded batch norms, and the
    model with the fastest parts. The latencies of other models are interpolated linearly between these two.

    Args:
        model, path, repeats, warmup: Arguments of `LatencyTable`.
        images: Batch of the size in use.

    Attributes:
        rest: Latency outside the candidates, in milliseconds: first convolution, poolings, head, and overhead.
        pace: Latency of a part inside a whole model, as a share of its latency alone.
    """

    calls_on_gpu = 10  # a single part takes only microseconds

    def __init__(
        self, model: PreTrainedModel, images: Tensor, path: Path | None = None, *, repeats: int = 30, warmup: int = 5
    ) -> None:
        inputs = {model.main_input_name: images.to(model.dtype)}
        super().__init__(model, inputs, path, repeats=repeats, warmup=warmup)
        self.architecture = architecture_for(model, ConvGraphArchitecture)
        self.convs = self.architecture.convolutions(model)
        self.windows = windows_of(model, self.architecture, self.convs)
        with eval_mode(model):
            # a layer may pad the input of its convolution
            reads = [Place("before", unit.layer or unit.conv) for unit in self.convs.units]
            self.shapes = [tensor.shape for tensor in see(model, self.inputs, reads)]
        self._names: dict[Segment, str] = {}
        self.rest, self.pace = 0.0, 1.0

    def of(self, candidate: Segment) -> float:
        """Return the latency of a candidate inside a model."""
        return self.pace * self._alone(candidate)

    def _alone(self, candidate: Segment) -> float:
        if candidate not in self._names:
            self._names[candidate] = self._part(candidate).name
        return self.cache.values[self._names[candidate]]["ms"]

    def measure(self, candidates: Sequence[Segment]) -> None:
        """Measure the missing latencies: shapes of candidates, which must cover the conv graph, and whole models."""
        calls: dict[str, Callable[[], object]] = {part.name: part for part in map(self._part, candidates)}
        if "folded" not in self.cache.values:
            calls["folded"] = self._call(folded_plan(self.model))
        self._time(calls)
        self._settle(candidates)

    def _settle(self, candidates: Sequence[Segment]) -> None:
        """Compute `pace` and `rest` from the latencies of parts and of whole models."""
        length, folded = len(self.convs.units) - 1, self.cache.values["folded"]["ms"]
        fastest = cheapest(length, candidates, self._alone)
        parts = sum(map(self._alone, fastest))
        ones = sum(
            self._alone(Segment.of(place - 1, place, Merged(0, False), (place,))) for place in range(1, length + 1)
        )
        self.pace = min(1.0, folded / ones)
        if parts < ones:
            gained = folded - self.model_of(folded_plan(self.model, edits_of(fastest)))
            # a steeper line, with negative latency at zero parts, is timing noise
            if 0 < gained / (ones - parts) <= folded / ones:
                self.pace = gained / (ones - parts)
        self.rest = folded - self.pace * ones

    def _key(self, plan: Plan) -> str:
        return f"model {hashlib.sha256(json.dumps(plan.to_dict(notes=False)).encode()).hexdigest()[:16]}"

    def _part(self, candidate: Segment) -> _Part:
        stock = self.model.get_submodule(self.convs.units[candidate.start + 1].conv)
        conv = None
        if candidate.edit.keep:
            shape = merged_shape(self.model, self.convs, candidate.edit)
            conv = convolution(stock, [self.windows[place] for place in candidate.edit.keep], **shape)
        act = module_at(self.model, self.convs.units[candidate.end].act)
        if act is None and candidate.end - candidate.start > 1:
            act = self.architecture.activation(self.model.config)
        skips = (skip for skip in self.convs.skips if skip.end == candidate.end and skip.start < candidate.start)
        return _Part(self.model, conv, act, next(skips, None), self.shapes[candidate.start + 1], self.shapes)


class _Part:
    """Replacement of a segment: a convolution, unless it is removed; a sum; an activation."""

    def __init__(
        self,
        model: PreTrainedModel,
        conv: nn.Conv2d | None,
        act: nn.Module | None,
        skip: Skip | None,
        shape: torch.Size,
        shapes: Sequence[torch.Size],
    ) -> None:
        self.conv, self.act = conv, act
        self.shortcut = None
        if skip is not None and skip.shortcut is not None:
            self.shortcut = module_at(model, f"{skip.path}.{skip.shortcut}")
        self.shapes = (shape, None if skip is None else shapes[skip.start + 1])
        self.like = {"device": model.device, "dtype": model.dtype}
        what = "nothing"
        if conv is not None:
            around = conv.pad.windows if isinstance(conv, PaddedConv2d) else conv.padding
            what = (
                f"{conv.out_channels} by {conv.kernel_size[0]}, stride {conv.stride[0]}, groups {conv.groups}, {around}"
            )
        behind = ", ".join(type(part).__name__ for part in (self.shortcut, act) if part is not None)
        self.name = f"{tuple(shape)} to {what}, plus {self.shapes[1] and tuple(self.shapes[1])}, {behind}"
        self.inputs: tuple[Tensor, Tensor | None] | None = None

    def __call__(self) -> Tensor:
        if self.inputs is None:
            self.inputs = tuple(None if shape is None else torch.randn(shape, **self.like) for shape in self.shapes)
        found, added = self.inputs
        if self.conv is not None:
            found = self.conv(found)
        if added is not None:
            found = found + (added if self.shortcut is None else self.shortcut(added))
        return found if self.act is None else self.act(found)
