"""Closed-form repair of a fused model on calibration data: front to back, the original as teacher, no gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .adapters import READERS, Block
from .calibration import Batches, Sample
from .mapfit import fit_map, fold, store, theta_of
from .math.ridge import Fit, Moments, chain, fit
from .modes import eval_mode
from .plan import Kind, Layout, Plan, Slot
from .prediction import calibration_loss
from .walk import States, Tap, Walk

Method = Literal["full", "linear", "none"]

STRENGTH_ROWS = 5
"""Of the tokens that are fitted, one in so many chooses the strength of the penalty."""


@dataclass(frozen=True)
class RefitReport:
    """What a refit did.

    Attributes:
        before: calibration loss, on sequences that took no part in the repair, of the model as it was given.
        after: that of the model as it is now, never more.
        kept: whether the repair was kept; otherwise it made things worse and was undone.
        blocks: per repaired map, its layer, kind and role, and its mean squared error on held-out tokens before and
            after.
    """

    before: float
    after: float
    kept: bool
    blocks: Sequence[Mapping[str, Any]] = ()


def refit(
    student: PreTrainedModel, teacher: PreTrainedModel, plan: Plan, batches: Batches, method: Method = "full"
) -> RefitReport:
    """Repair a fused model in closed form, in place. It never leaves a model of higher calibration loss.

    The blocks from the first edit on are walked through front to back. Each reads other states than its original did,
    so that its input maps are refitted to give what the original's gave (a ridge fit of the original's input by the
    student's, folded into the maps), and its output projection to lead to the original's state at the end of the
    group: min ||X (W + dW)^T + b + db - R||^2 + lambda ||dW||^2, X what enters the projection, R the original's state
    less what the projection is added to. Attention is led to where the MLP of its group stood.

    Shared matrices stay as they are. Their biases are refitted per depth, and so are residuals and coefficients of
    relaxed sharing: the fit is projected on the rank that they have.

    It takes one pass of the original over the batches, and about three of the student.

    Args:
        student: what `apply(teacher, plan)` gave.
        teacher: the original.
        plan: the plan that led from one to the other.
        batches: calibration batches, dicts of model inputs. One sequence in eight judges the result.
        method: `full`; `linear` fits one map on the outputs of the last block before removed ones, and folds it
            into that block's output projection (ReplaceMe, Shopkhoev et al. 2025); `none` leaves the model as it is.

    Raises:
        DataError: there are no calibration batches.
        UnsupportedModelError: the model does not run each of its layers once, in order.
    """
    sample = Sample.of(batches)
    before = calibration_loss(student, teacher, sample.judging)
    if method == "none":
        return RefitReport(before, before, kept=False)
    with eval_mode(student, teacher):
        return refit_by(student, Trace(Walk(teacher, sample), keep=False), plan, before, method)


def refit_by(student: PreTrainedModel, trace: Trace, plan: Plan, before: float, method: Method) -> RefitReport:
    """`refit` with a trace of the teacher, which several students may share, and the loss before it."""
    weights = copy.deepcopy(student.state_dict())
    sample, teacher = trace.walk.sample, trace.walk.model
    repair = Repair(Walk(student, sample), trace, plan.layout(), method)
    for _ in tqdm(repair.slots, "Refitting", unit="layer", disable=None, leave=False):
        repair.step()
    after = calibration_loss(student, teacher, sample.judging)
    if after <= before:
        return RefitReport(before, after, kept=True, blocks=tuple(repair.blocks))
    student.load_state_dict(weights)
    return RefitReport(before, before, kept=False, blocks=tuple(repair.blocks))


class Trace:
    """A teacher walked through once; what was seen of it can be looked at again where `keep` is set.

    Args:
        walk: at the first layer.
        keep: keep the states at every depth (on disk), for several students.
    """

    def __init__(self, walk: Walk, *, keep: bool) -> None:
        self.walk, self.layers, self.adapter = walk, walk.layers, walk.adapter
        self._at = {0: walk.states} if keep else None
        self._seen: dict[tuple[int, Tap], States] = {}

    def states(self, depth: int) -> States:
        """What enters a layer; past depths only where they are kept."""
        while self.walk.depth < depth:
            self.walk.advance()
            if self._at is not None:
                self._at[self.walk.depth] = self.walk.states
        return self.walk.states if self._at is None else self._at[depth]

    def see(self, places: Collection[tuple[int, Tap]]) -> dict[tuple[int, Tap], States]:
        """What was tapped at each (layer, tap), which must not lie before what was seen last unless states are kept."""
        seen = {}
        for layer in sorted({layer for layer, _ in places}):
            taps = {tap for depth, tap in places if depth == layer}
            fresh = sorted((tap for tap in taps if (layer, tap) not in self._seen), key=str)
            if fresh:
                found = self._look(layer, fresh)
                if self._at is not None:
                    self._seen |= found
                seen |= found
            seen |= {(layer, tap): self._seen[layer, tap] for tap in taps.difference(fresh)}
        return seen

    def _look(self, layer: int, taps: Sequence[Tap]) -> dict[tuple[int, Tap], States]:
        states, walk = self.states(layer), self.walk
        found = {(layer, tap): States() for tap in taps}
        now, walk.states, depth, walk.depth = walk.states, states, walk.depth, layer
        for _, tapped in walk.look(*taps):
            for tap in taps:
                found[layer, tap].append(tapped[tap].float())
        walk.states, walk.depth = now, depth
        return found


class Repair:
    """A student and its teacher walked through side by side; `step` repairs the student's next layer.

    Attributes:
        blocks: a row for each map that was refitted so far.
    """

    def __init__(self, student: Walk, teacher: Trace, layout: Layout, method: Method) -> None:
        self.student, self.teacher, self.method = student, teacher, method
        self.slots = layout.slots
        self.tied = {(slot, tie.kind) for tie in layout.ties for slot in tie.slots}
        self.blocks: list[dict[str, Any]] = []
        self._differs = False

    def step(self) -> None:
        """Repair the student's next layer, and lead the student through it."""
        index = self.student.depth
        slot = self.slots[index]
        missing = {kind for kind in ("attention", "mlp") if slot.source(kind) is None}
        edited = len(slot.layers) > 1 or missing or any((index, kind) in self.tied for kind in ("attention", "mlp"))
        self._differs = bool(self._differs or edited or slot.layers[0] > index)
        if self._differs:
            self._repair(index, slot, self.teacher.see(self._wanted(slot)))
        self.student.advance()

    def _wanted(self, slot: Slot) -> set[tuple[int, Tap]]:
        """What the repair of a slot has to know of the teacher: (layer, tap)."""
        wanted = {_target(slot, kind) for kind in ("attention", "mlp") if slot.source(kind)}
        if self.method == "full":
            sources = {kind: slot.source(kind) for kind in ("attention", "mlp")}
            wanted |= {(source.kept, Tap(kind, "read")) for kind, source in sources.items() if source}
        return wanted

    def _repair(self, index: int, slot: Slot, seen: Mapping[tuple[int, Tap], States]) -> None:
        adapter, model = self.student.adapter, self.student.model
        layer = self.student.layers[index]
        blocks = [block for block in adapter.blocks(model) if block.layer == index]
        for block in blocks:
            depth, tap = _target(slot, block.kind)
            if adapter.post_norm and len(slot.layers) > 1:
                # the sum is led to one that this norm of the original follows
                path = getattr(adapter, tap.kind)["norm"]
                own = getattr(adapter, block.kind)["norm"]
                layer.get_submodule(own).load_state_dict(self.teacher.layers[depth].get_submodule(path).state_dict())
        if self.method == "linear":
            if len(slot.layers) > 1:
                self._fit_outputs(blocks[-1], seen[_target(slot, blocks[-1].kind)])
            return
        for block in blocks:
            source = slot.source(block.kind).kept
            self._fit_inputs(block, source, seen[source, Tap(block.kind, "read")])
            self._fit_projection(block, seen[_target(slot, block.kind)])

    def _fit_inputs(self, block: Block, source: int, original: States) -> None:
        """Refit the maps that read the stream, so that they give what they gave for the original's."""

        def rows(index: int, read: Tensor) -> tuple[Tensor, Tensor]:
            return read, original[index].to(read.device)

        moments = self._moments(rows, Tap(block.kind, "read"))
        readers = {role: path for role, path in block.modules.items() if role in READERS}
        if (block.layer, block.kind) in self.tied:
            for role, path in readers.items():
                relative = getattr(self.student.adapter, block.kind)[role]
                aim = theta_of(self.teacher.layers[source].get_submodule(relative))
                self._fit(block, role, path, [part.towards(aim) for part in moments])
            return
        width = len(moments[0].yy)
        eye = torch.eye(width + 1, width, dtype=torch.float64, device=moments[0].xx.device)
        found = fit(*moments, eye)
        self._note(block, "read", found)
        if found.strength is not None:
            for path in readers.values():
                fold(self.student.model.get_submodule(path), found.theta)

    def _fit_projection(self, block: Block, target: States) -> None:
        """Refit the output projection, so that the stream becomes the target."""

        def rows(index: int, features: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
            return features, target[index].to(residual.device) - residual

        moments = self._moments(rows, Tap(block.kind, "features"), Tap(block.kind, "residual"))
        self._fit(block, "out", block.modules["out"], moments)

    def _fit_outputs(self, block: Block, target: States) -> None:
        """Refit what the block adds to the stream by one map of it, folded into the output projection."""

        def rows(index: int, total: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
            return total - residual, target[index].to(residual.device) - residual

        moments = self._moments(rows, Tap(block.kind, "sum"), Tap(block.kind, "residual"))
        width = len(moments[0].yy)
        found = fit(*moments, torch.eye(width + 1, width, dtype=torch.float64, device=moments[0].xx.device))
        self._note(block, "linear", found)
        if found.strength is not None:
            module = self.student.model.get_submodule(block.modules["out"])
            store(module, chain(theta_of(module), found.theta))

    def _moments(self, rows: Callable[..., tuple[Tensor, Tensor]], *taps: Tap) -> list[Moments]:
        """Moments of the rows (inputs, targets) that `rows` makes of what is tapped, to fit and to hold out."""
        moments: list[Moments] = []
        for index, found in self.student.look(*taps):
            x, y = rows(index, *(found[tap].float() for tap in taps))
            x, y = self.student.rows(index, x), self.student.rows(index, y)
            if not moments:
                moments = [Moments.empty(x.shape[1], y.shape[1], x.device) for _ in range(2)]
            cut = len(x) - len(x) // STRENGTH_ROWS
            for part, chosen in zip(moments, (slice(cut), slice(cut, None)), strict=True):
                part.add(x[chosen], y[chosen])
        return moments

    def _fit(self, block: Block, role: str, path: str, moments: Sequence[Moments]) -> None:
        module = self.student.model.get_submodule(path)
        self._note(block, role, fit_map(module, *moments, tied=(block.layer, block.kind) in self.tied))

    def _note(self, block: Block, role: str, found: Fit) -> None:
        row = {"layer": block.layer, "kind": block.kind, "map": role, "before": found.before, "after": found.after}
        self.blocks.append(row)


def _target(slot: Slot, kind: Kind) -> tuple[int, Tap]:
    """Where a block is to lead the stream: (layer of the original, tap).

    Attention leads to where its MLP stood, the MLP, or a block that is alone, to the end of the slot.
    """
    if kind == "attention" and slot.mlp is not None:
        return slot.mlp.kept, Tap("attention", "sum")
    return slot.layers[-1], Tap("mlp", "sum")
