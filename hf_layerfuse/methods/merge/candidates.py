"""Candidate segments of a conv graph, and the importance of what they remove (LayerMerge, section 3.3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ...calibration.refit.conv_graph import repair
from ...calibration.samples import Sample
from ...evaluation.divergence import calibration_loss
from ...evaluation.fingerprint import digest
from ...evaluation.modes import eval_mode
from ...math.knapsack import Frontier
from ...models.apply import applied
from ...models.architectures import ConvGraphArchitecture, architecture_for
from ...models.architectures.segments import Kept, Merged
from ...plan import CONV_GRAPH_KINDS, MergeConvs, Plan
from ..candidates import Candidate, loss_cache, options_of
from .finetune import tune


@dataclass(frozen=True)
class Segment(Candidate):
    """One segment with one kernel.

    Attributes:
        start: Boundary before the segment.
        end: Boundary after the segment.
        edit: Edit that merges the convolutions that are kept in the segment.
        merged: Kernel of the segment.
    """

    edit: MergeConvs
    merged: Merged

    @classmethod
    def of(cls, start: int, end: int, merged: Merged, keep: Kept) -> Segment:
        return cls(start, end, MergeConvs(start, end, keep), merged)

    @property
    def key(self) -> str:
        """Key of the candidate: boundaries, size of the kernel, and whether it is depthwise."""
        return f"{self.start},{self.end},{self.merged.kernel},{int(self.merged.depthwise)}"

    @property
    def changes(self) -> bool:
        """Whether the candidate differs from a single unchanged convolution."""
        return self.end - self.start > 1 or not self.edit.keep


def removal_candidates(model: PreTrainedModel) -> list[Segment]:
    """List all unchanged convolutions, and the removals of those that can be removed. Activations are kept."""
    graph = architecture_for(model, ConvGraphArchitecture).convolutions(model).graph(model)
    found = []
    for place, node in enumerate(graph.nodes[1:], 1):
        found.append(Segment.of(place - 1, place, Merged(node.kernel, node.depthwise), (place,)))
        if not node.fixed:
            found.append(Segment.of(place - 1, place, Merged(0, False), ()))
    return found


def segment_candidates(model: PreTrainedModel, max_kernel: int) -> list[Segment]:
    """List all segments with all kernels of at most `max_kernel`, and all single convolutions."""
    graph = architecture_for(model, ConvGraphArchitecture).convolutions(model).graph(model)
    found = [Segment.of(*row) for row in graph.table()]
    return [each for each in found if each.end - each.start == 1 or each.merged.kernel <= max_kernel]


def cheapest(length: int, candidates: Sequence[Segment], cost: Callable[[Segment], float]) -> list[Segment]:
    """Return the candidates of least total cost that cover the conv graph from the first boundary to the last."""
    options = options_of({candidate: -cost(candidate) for candidate in candidates}, cost=lambda candidate: 0.0)
    return [option.label for _, _, option in Frontier(length, options, 1.0, units=1).best()]


def folded_plan(model: PreTrainedModel, edits: Sequence[MergeConvs] = ()) -> Plan:
    """Return a plan of some merges that also folds all other batch norms of the graph."""
    architecture = architecture_for(model, ConvGraphArchitecture)
    units = architecture.convolutions(model).units
    taken = {place for edit in edits for place in edit.layers}
    others = [MergeConvs(place - 1, place, (place,)) for place in range(len(units)) if place not in taken]
    every = sorted([*edits, *others], key=lambda edit: edit.start)
    return Plan(architecture.model_type, len(units), tuple(every), kinds=CONV_GRAPH_KINDS)


class MagnitudeImportance:
    """Mean absolute weight of the removed convolutions: a pruning criterion without measurements."""

    def __init__(self, model: PreTrainedModel) -> None:
        nodes = architecture_for(model, ConvGraphArchitecture).convolutions(model).graph(model).nodes
        self.means = [
            node.norm / (node.out_channels * (1 if node.depthwise else node.in_channels) * node.kernel**2)
            for node in nodes
        ]

    def of(self, candidate: Segment) -> float:
        """Return the mean absolute weight of the removed convolutions."""
        edit = candidate.edit
        return sum(self.means[place] for place in edit.layers if place not in edit.keep)


class LossImportance:
    """Calibration loss after applying and fitting each candidate alone.

    Args:
        model: Stock model.
        sample: Calibration images.
        path: Measurement cache; None keeps the measurements in memory.
        fitted: Whether to fit the convolution of the candidate first.
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
        self.cache = loss_cache(model, path, images=digest(sample.batches), fitted=fitted, tuned=tuned)

    def of(self, candidate: Segment) -> float:
        """Return the mean divergence from the original, in nats; 0 for an unchanged convolution."""
        return self.cache.values[candidate.key] if candidate.changes else 0.0

    def measure(self, candidates: Sequence[Segment]) -> None:
        """Measure the missing losses. Each is written to the cache at once."""
        units = architecture_for(self.model, ConvGraphArchitecture).convolutions(self.model).units
        todo = [each for each in candidates if each.changes and each.key not in self.cache.values]
        for candidate in tqdm(todo, "Measuring segments", unit="segment", disable=None, leave=False):
            plan = Plan(self.model.config.model_type, len(units), (candidate.edit,), kinds=CONV_GRAPH_KINDS)
            student = applied(self.model, plan)
            with eval_mode(self.model, student):
                if self.fitted and candidate.edit.keep:
                    repair(student, self.model, plan.edits, self.sample)
                tune(student, self.model, self.sample, self.tuned)
                loss = calibration_loss(student, self.model, self.sample.held_out_batches)
            self.cache.put({candidate.key: loss})


Importance = LossImportance | MagnitudeImportance
