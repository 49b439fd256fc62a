"""Measured latency and loss of each segment of a chain, kept in measurement caches (LayerMerge, section 3.3)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ...calibration.refit.conv_graph import repair, see
from ...calibration.samples import Sample
from ...evaluation.cache import Table
from ...evaluation.divergence import calibration_loss
from ...evaluation.eval_mode import eval_mode
from ...evaluation.fingerprint import digest, fingerprint
from ...evaluation.timing import time_missing, timed_on
from ...math.knapsack import Frontier, Option
from ...models.apply import applied
from ...models.architectures import ConvGraphArchitecture, Place, Skip, architecture_for
from ...models.architectures.segments import Kept, Merged
from ...models.modules.conv import PaddedConv2d, convolution, module_at
from ...models.surgery.conv_graph import merged_shape, windows_of
from ...plan import CONV_GRAPH_KINDS, MergeConvs, Plan
from .finetune import tune

ROW = 10
"""Consecutive calls per timing on a GPU, where a single part takes only microseconds."""


class Entry(NamedTuple):
    """One segment with one kernel.

    Attributes:
        start: Boundary before the segment.
        end: Boundary after the segment.
        merged: Kernel of the segment.
        keep: Convolutions that are kept in the segment.
    """

    start: int
    end: int
    merged: Merged
    keep: Kept

    @property
    def key(self) -> str:
        """Key of the entry: boundaries, size of the kernel, and whether it is depthwise."""
        return f"{self.start},{self.end},{self.merged.kernel},{int(self.merged.depthwise)}"

    @property
    def changes(self) -> bool:
        """Whether the entry differs from a single unchanged convolution."""
        return self.end - self.start > 1 or not self.keep

    @property
    def edit(self) -> MergeConvs:
        return MergeConvs(self.start, self.end, self.keep)


def removals_of(model: PreTrainedModel) -> list[Entry]:
    """List all unchanged convolutions, and the removals of those that can be removed. Activations are kept."""
    graph = architecture_for(model, ConvGraphArchitecture).convolutions(model).graph(model)
    found = []
    for place, node in enumerate(graph.nodes[1:], 1):
        found.append(Entry(place - 1, place, Merged(node.kernel, node.depthwise), (place,)))
        if not node.fixed:
            found.append(Entry(place - 1, place, Merged(0, False), ()))
    return found


def entries_of(model: PreTrainedModel, max_kernel: int) -> list[Entry]:
    """List all segments with all kernels of at most `max_kernel`, and all single convolutions."""
    graph = architecture_for(model, ConvGraphArchitecture).convolutions(model).graph(model)
    return [Entry(*entry) for entry in graph.table() if entry[1] - entry[0] == 1 or entry[2].kernel <= max_kernel]


class Latencies:
    """Latency of each entry: one convolution of its shape, the sum at its end, and the activation.

    Each shape is measured once, on the device of the model, in turn with the others. Parts alone do not include the
    overhead between them. Two whole models are therefore measured too: the original with folded batch norms, and the
    model with the fastest parts. The latencies of other models are interpolated linearly between these two.

    Args:
        model: Stock model.
        images: Batch of the size in use.
        path: Measurement cache; None keeps the measurements in memory.
        repeats: Number of timed rounds.
        warmup: Number of untimed rounds before them.

    Attributes:
        original: Latency of the whole model, in milliseconds.
        rest: Latency outside the entries, in milliseconds: first convolution, poolings, head, and overhead.
        pace: Latency of a part inside a whole model, as a share of its latency alone.

    Raises:
        LayerFuseError: Measurement cache of another device or network.
    """

    def __init__(
        self, model: PreTrainedModel, images: Tensor, path: Path | None = None, *, repeats: int = 30, warmup: int = 5
    ) -> None:
        self.model, self.architecture = model, architecture_for(model, ConvGraphArchitecture)
        self.convs = self.architecture.convolutions(model)
        self.windows = windows_of(model, self.architecture, self.convs)
        self.images, self.repeats, self.warmup = images.to(model.device, model.dtype), repeats, warmup
        with eval_mode(model):
            # a layer may pad the input of its convolution
            reads = [Place("before", unit.layer or unit.conv) for unit in self.convs.units]
            self.shapes = [tensor.shape for tensor in see(model, {model.main_input_name: self.images}, reads)]
        self.table = Table(path, timed_on(model, {model.main_input_name: images}))
        self._names: dict[Entry, str] = {}
        self.rest, self.pace = 0.0, 1.0

    @property
    def original(self) -> float:
        return self.table.values["original"]["ms"]

    def of(self, entry: Entry) -> float:
        """Return the latency of an entry inside a model, in milliseconds."""
        return self.pace * self._alone(entry)

    def _alone(self, entry: Entry) -> float:
        if entry not in self._names:
            self._names[entry] = self._part(entry).name
        return self.table.values[self._names[entry]]["ms"]

    @torch.inference_mode()
    def model_of(self, plan: Plan) -> float:
        """Return the latency of the model of a plan, in milliseconds, measured in turn with the original."""
        name = f"model {hashlib.sha256(json.dumps(plan.to_dict(notes=False)).encode()).hexdigest()[:16]}"
        if name not in self.table.values:
            self._time({name: partial(applied(self.model, plan).eval(), self.images)})
        return self.table.values[name]["ms"]

    @torch.inference_mode()
    def measure(self, entries: Sequence[Entry]) -> None:
        """Measure the missing latencies: shapes of entries, which must cover the chain, and whole models."""
        runs: dict[str, Callable[[], object]] = {part.name: part for part in map(self._part, entries)}
        if "folded" not in self.table.values:
            runs["folded"] = partial(applied(self.model, folded_plan(self.model)).eval(), self.images)
        self._time(runs)
        self._settle(entries)

    def _settle(self, entries: Sequence[Entry]) -> None:
        """Compute `pace` and `rest` from the latencies of parts and of whole models."""
        length, folded = len(self.convs.units) - 1, self.table.values["folded"]["ms"]
        fastest = cheapest(length, entries, self._alone)
        parts = sum(map(self._alone, fastest))
        ones = sum(self._alone(Entry(place - 1, place, Merged(0, False), (place,))) for place in range(1, length + 1))
        self.pace = min(1.0, folded / ones)
        if parts < ones:
            gained = folded - self.model_of(folded_plan(self.model, [entry.edit for entry in fastest if entry.changes]))
            # a steeper line, with negative latency at zero parts, is timing noise
            if 0 < gained / (ones - parts) <= folded / ones:
                self.pace = gained / (ones - parts)
        self.rest = folded - self.pace * ones

    def _time(self, runs: Mapping[str, Callable[[], object]]) -> None:
        device, runs = self.model.device, {"original": partial(self.model, self.images), **runs}
        row = ROW if device.type == "cuda" else 1
        with eval_mode(self.model):
            time_missing(self.table, runs, device, repeats=self.repeats, warmup=self.warmup, row=row)

    def _part(self, entry: Entry) -> _Part:
        stock = self.model.get_submodule(self.convs.units[entry.start + 1].conv)
        conv = None
        if entry.keep:
            shape = merged_shape(self.model, self.convs, entry.edit)
            conv = convolution(stock, [self.windows[place] for place in entry.keep], **shape)
        act = module_at(self.model, self.convs.units[entry.end].act)
        if act is None and entry.end - entry.start > 1:
            act = self.architecture.activation(self.model.config)
        skip = next((skip for skip in self.convs.skips if skip.end == entry.end and skip.start < entry.start), None)
        return _Part(self.model, conv, act, skip, self.shapes[entry.start + 1], self.shapes)


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


def cheapest(length: int, entries: Sequence[Entry], cost: Callable[[Entry], float]) -> list[Entry]:
    """Return the entries of least total cost that cover the chain from the first boundary to the last."""
    options: dict[tuple[int, int], list[Option]] = {}
    for entry in entries:
        options.setdefault((entry.start, entry.end), []).append(Option(0.0, -cost(entry), entry))
    return [option.label for _, _, option in Frontier(length, options, 1.0, units=1).best()]


def folded_plan(model: PreTrainedModel, edits: Sequence[MergeConvs] = ()) -> Plan:
    """Return a plan of some merges that also folds all other batch norms of the chain."""
    architecture = architecture_for(model, ConvGraphArchitecture)
    units = architecture.convolutions(model).units
    taken = {place for edit in edits for place in edit.layers}
    others = [MergeConvs(place - 1, place, (place,)) for place in range(len(units)) if place not in taken]
    every = sorted([*edits, *others], key=lambda edit: edit.start)
    return Plan(architecture.model_type, len(units), tuple(every), kinds=CONV_GRAPH_KINDS)


class Magnitudes:
    """Mean absolute weight of the removed convolutions of an entry: a pruning criterion without measurements."""

    def __init__(self, model: PreTrainedModel) -> None:
        nodes = architecture_for(model, ConvGraphArchitecture).convolutions(model).graph(model).nodes
        self.means = [
            node.norm / (node.out_channels * (1 if node.depthwise else node.in_channels) * node.kernel**2)
            for node in nodes
        ]

    def of(self, entry: Entry) -> float:
        """Return the mean absolute weight of the removed convolutions."""
        return sum(self.means[place] for place in entry.edit.layers if place not in entry.keep)


class Losses:
    """Cost of each entry in quality: the calibration loss after applying and fitting that entry alone.

    Args:
        model: Stock model.
        sample: Calibration images.
        path: Measurement cache; None keeps the measurements in memory.
        fitted: Whether to fit the convolution of the entry first.
        tuned: Number of training steps after the fit.

    Raises:
        LayerFuseError: Measurement cache of other weights or images.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sample: Sample,
        path: Path | None = None,
        *,
        fitted: bool = True,
        tuned: int = 0,
    ) -> None:
        self.model, self.sample, self.fitted, self.tuned = model, sample, fitted, tuned
        about = {
            "weights": fingerprint(model),
            "dtype": str(model.dtype).removeprefix("torch."),
            "images": digest(sample.batches),
            "fitted": fitted,
            "tuned": tuned,
            "transformers": transformers.__version__,
        }
        self.table = Table(path, about)

    def of(self, entry: Entry) -> float:
        """Return the mean divergence from the original, in nats; 0 for an unchanged convolution."""
        return self.table.values[entry.key] if entry.changes else 0.0

    def measure(self, entries: Sequence[Entry]) -> None:
        """Measure the missing losses. Each is written to the cache at once."""
        units = architecture_for(self.model, ConvGraphArchitecture).convolutions(self.model).units
        todo = [entry for entry in entries if entry.changes and entry.key not in self.table.values]
        for entry in tqdm(todo, "Measuring segments", disable=None):
            plan = Plan(self.model.config.model_type, len(units), (entry.edit,), kinds=CONV_GRAPH_KINDS)
            student = applied(self.model, plan)
            with eval_mode(self.model, student):
                if self.fitted and entry.keep:
                    repair(student, self.model, plan.edits, self.sample)
                tune(student, self.model, self.sample, self.tuned)
                loss = calibration_loss(student, self.model, self.sample.held_out_batches)
            self.table.put({entry.key: loss})
