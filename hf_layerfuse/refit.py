"""Closed-form repair of a fused model on calibration data: front to back, the original as teacher, no gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .adapters import READERS, Block
from .align import align
from .calibration import Batches, Sample
from .mapfit import fit_gain, fit_map, fold, store, theta_of
from .math.ridge import Fit, Moments, chain, eliminate, fit
from .modes import eval_mode
from .plan import Kind, Plan, Slot
from .prediction import calibration_loss
from .walk import Saved, States, Tap, Trace, Walk

Method = Literal["full", "linear", "none"]

TOKENS_PER_UNIT = 8
"""For each hidden unit that may be selected, so many tokens are looked at."""


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
    less what the projection is added to. Attention is led to where the MLP of its group stood. Operator `select` makes
    an MLP of those hidden units of all layers of its group that lead best there (backward elimination).

    Shared matrices stay as they are. Refitted per depth are the gains of norms in front of MLPs, biases, and residuals
    and coefficients of relaxed sharing: the fit is projected on the rank that they have.

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
        return refit_by(student, Trace(Walk(teacher, sample), keep=True), plan, before, method)


def refit_by(student: PreTrainedModel, trace: Trace, plan: Plan, before: float, method: Method) -> RefitReport:
    """`refit` with a trace of the teacher, which several students may share, and the loss before it."""
    kept = Saved(student)
    walk = Walk(student, trace.walk.sample)
    repair = Repair(walk, trace, plan, method)
    for _ in tqdm(repair.slots, "Refitting", unit="layer", disable=None, leave=False):
        repair.step()
    after = trace.loss(walk)
    if after <= before:
        return RefitReport(before, after, kept=True, blocks=tuple(repair.blocks))
    kept.restore(student)
    return RefitReport(before, before, kept=False, blocks=tuple(repair.blocks))


class Repair:
    """A student and its teacher walked through side by side; `step` repairs the student's next layer.

    Attributes:
        blocks: a row for each map that was refitted so far.
    """

    def __init__(self, student: Walk, teacher: Trace, plan: Plan, method: Method) -> None:
        self.student, self.teacher, self.method = student, teacher, method
        layout = plan.layout()
        self.slots = layout.slots
        self.tied = {(slot, tie.kind) for tie in layout.ties for slot in tie.slots}
        self.blocks: list[dict[str, Any]] = []
        self._differs = False
        # units, heads and turns of shared weights are those of the aligned original
        original = align(teacher.walk.model, plan, student.sample.batches) if self.tied else teacher.walk.model
        self._aligned = student.adapter.layer_list(original)

    def step(self) -> None:
        """Repair the student's next layer, and lead the student through it."""
        index = self.student.depth
        slot = self.slots[index]
        missing = {kind for kind in ("attention", "mlp") if slot.source(kind) is None}
        fused = any(source and len(source.layers) > 1 for source in (slot.attention, slot.mlp))
        tied = any((index, kind) in self.tied for kind in ("attention", "mlp"))
        edited = len(slot.layers) > 1 or missing or fused or tied
        self._differs = bool(self._differs or edited or slot.layers[0] > index)
        if self._differs:
            self._repair(index, slot, self.teacher.see(self._wanted(slot)))
        self.student.advance()

    def _wanted(self, slot: Slot) -> set[tuple[int, Tap]]:
        """What the repair of a slot has to know of the teacher: (layer, tap)."""
        wanted = {_target(slot, kind) for kind in ("attention", "mlp") if slot.source(kind)}
        if self.method == "full":
            sources = {kind: slot.source(kind) for kind in ("attention", "mlp")}
            wanted |= {
                (layer, Tap(kind, "read"))
                for kind, source in sources.items()
                if source
                for layer in (source.layers if _selects(slot, kind) else (source.kept,))
            }
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
            target, source = seen[_target(slot, block.kind)], slot.source(block.kind)
            if _selects(slot, block.kind):
                self._select(block, {layer: seen[layer, Tap(block.kind, "read")] for layer in source.layers}, target)
            else:
                self._fit_inputs(block, source.kept, seen[source.kept, Tap(block.kind, "read")])
                self._fit_projection(block, target)

    def _readers(self, block: Block) -> dict[str, str]:
        """Role -> path of the maps that read what enters a block."""
        return {role: path for role, path in block.modules.items() if role in READERS}

    def _reading(self, block: Block, original: States) -> list[Moments]:
        """Moments of what a block reads in the student, and what one read in the original."""

        def rows(index: int, read: Tensor) -> tuple[Tensor, Tensor]:
            return read, original[index].to(read.device)

        return self._moments(rows, Tap(block.kind, "read"))

    def _fit_inputs(self, block: Block, source: int, original: States) -> None:
        """Refit the maps that read the stream, so that they give what they gave for the original's."""
        moments = self._reading(block, original)
        if (block.layer, block.kind) in self.tied:
            table, stock = getattr(self.student.adapter, block.kind), self._aligned[source]
            aims = {role: theta_of(stock.get_submodule(table[role])) for role in self._readers(block)}
            # a gain for queries and keys, whose errors multiply, was measured to do more harm than good
            if block.kind == "mlp" and not self.student.adapter.post_norm:
                moments = self._fit_gain(block, aims, moments)
            for role, path in self._readers(block).items():
                self._fit(block, role, path, [part.towards(aims[role]) for part in moments])
            return
        modules = [self.student.model.get_submodule(path) for path in self._readers(block).values()]
        if any(module.bias is None for module in modules):
            moments = [part.linear() for part in moments]
        found = fit(*moments, _identity(moments[0]))
        self._note(block, "read", found)
        if found.strength is not None:
            for module in modules:
                fold(module, found.theta)

    def _fit_gain(self, block: Block, aims: Mapping[str, Tensor], moments: list[Moments]) -> list[Moments]:
        """Refit the norm in front of shared maps; returns the moments with what it gives now."""
        norm = self.student.model.get_submodule(block.modules["norm"])
        if getattr(norm, "weight", None) is None:
            return moments
        readers = [(self.student.model.get_submodule(block.modules[role]), aim) for role, aim in aims.items()]
        found = fit_gain(norm, readers, *moments)
        self._note(block, "norm", found)
        return [part.through(_identity(part) * found.theta[:-1].T) for part in moments]

    def _fit_projection(self, block: Block, target: States) -> None:
        """Refit the output projection, so that the stream becomes the target."""

        def rows(index: int, features: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
            return features, target[index].to(residual.device) - residual

        moments = self._moments(rows, Tap(block.kind, "features"), Tap(block.kind, "residual"))
        self._fit(block, "out", block.modules["out"], moments)

    def _select(self, block: Block, originals: Mapping[int, States], target: States) -> None:
        """Make an MLP of the hidden units of all layers of its group that lead best to the target.

        The units of each layer read the student's stream through the ridge fit of what they read in the original.
        What they write starts from what they wrote there, and is refitted for the chosen.
        """
        model, table = self.student.model, self.student.adapter.mlp
        readers = self._readers(block)
        variants: list[nn.Module] = []
        thetas: dict[str, list[Tensor]] = {role: [] for role in readers}
        outs: list[Tensor] = []
        for depth, original in originals.items():
            moments = self._reading(block, original)
            reading = fit(*moments, _identity(moments[0])).theta
            stock = self.teacher.layers[depth]
            variants.append(copy.deepcopy(self.student.layers[block.layer]))
            for role in readers:
                thetas[role].append(chain(reading, theta_of(stock.get_submodule(table[role]))))
                store(variants[-1].get_submodule(table[role]), thetas[role][-1])
            outs.append(theta_of(stock.get_submodule(table["out"])))

        start = torch.cat([*(theta[:-1] for theta in outs), sum(theta[-1:] for theta in outs)])
        width = len(outs[0]) - 1
        able = self._able(block, variants, start, width)
        start = torch.cat([start[able], start[-1:]])
        kept = eliminate(self._union(block, variants, target, able), start, width)
        for role, path in readers.items():
            store(model.get_submodule(path), torch.cat(thetas[role], dim=1)[:, able[kept]])
        store(model.get_submodule(block.modules["out"]), torch.cat([start[kept], start[-1:]]))
        self._fit_projection(block, target)

    def _able(self, block: Block, variants: Sequence[nn.Module], start: Tensor, width: int) -> Tensor:
        """The units, as many as two layers have, that add most to the stream in one batch.

        A group of many layers would have a matrix of moments that takes longer to fill than all else.
        """
        if len(variants) <= 2:
            return torch.arange(len(start) - 1, device=start.device)
        tap = Tap(block.kind, "features")
        features = torch.cat([next(self.student.look(tap, layer=variant))[1][tap] for variant in variants], dim=-1)
        energy = self.student.rows(0, features).double().var(0) * start[:-1].square().sum(1)
        return energy.topk(2 * width).indices.sort().values

    def _union(self, block: Block, variants: Sequence[nn.Module], target: States, inputs: Tensor) -> Moments:
        """Moments of what enters the output projections of several layers, side by side, to the rest of the target.

        To tell units apart takes far fewer tokens than to fit their weights, and these are the largest moments.
        """
        features, residual = Tap(block.kind, "features"), Tap(block.kind, "residual")
        walks = [self.student.look(features, residual, layer=variant) for variant in variants]
        moments = Moments.empty(len(inputs), target[0].shape[-1], inputs.device)
        for steps in zip(*walks, strict=True):
            index, first = steps[0]
            x = torch.cat([step[features] for _, step in steps], dim=-1)[..., inputs]
            y = target[index].to(x.device) - first[residual].float()
            moments.add(self.student.rows(index, x), self.student.rows(index, y))
            if moments.rows >= TOKENS_PER_UNIT * len(inputs):
                break
        return moments

    def _fit_outputs(self, block: Block, target: States) -> None:
        """Refit what the block adds to the stream by one map of it, folded into the output projection."""

        def rows(index: int, total: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
            return total - residual, target[index].to(residual.device) - residual

        moments = self._moments(rows, Tap(block.kind, "sum"), Tap(block.kind, "residual"))
        module = self.student.model.get_submodule(block.modules["out"])
        if module.bias is None:
            moments = [part.linear() for part in moments]
        found = fit(*moments, _identity(moments[0]))
        self._note(block, "linear", found)
        if found.strength is not None:
            store(module, chain(theta_of(module), found.theta))

    def _moments(self, rows: Callable[..., tuple[Tensor, Tensor]], *taps: Tap) -> list[Moments]:
        """Moments of the rows (inputs, targets) that `rows` makes of what is tapped, to fit and to hold out."""
        found = ((index, rows(index, *(seen[tap].float() for tap in taps))) for index, seen in self.student.look(*taps))
        return self._sum((index, x, y) for index, (x, y) in found)

    def _sum(self, found: Iterable[tuple[int, Tensor, Tensor]]) -> list[Moments]:
        """Moments of (batch index, inputs, targets), those to fit and those to hold out."""
        moments: list[Moments] = []
        for index, x, y in found:
            if not moments:
                moments = [Moments.empty(x.shape[-1], y.shape[-1], x.device) for _ in range(2)]
            for part, *rows in zip(moments, self.student.split(index, x), self.student.split(index, y), strict=True):
                part.add(*rows)
        return moments

    def _fit(self, block: Block, role: str, path: str, moments: Sequence[Moments]) -> None:
        module = self.student.model.get_submodule(path)
        self._note(block, role, fit_map(module, *moments, tied=(block.layer, block.kind) in self.tied))

    def _note(self, block: Block, role: str, found: Fit) -> None:
        row = {"layer": block.layer, "kind": block.kind, "map": role, "before": found.before, "after": found.after}
        self.blocks.append(row)


def _identity(moments: Moments) -> Tensor:
    """The map that gives x for [x, 1], (in + 1, in)."""
    width = len(moments.xx) - 1
    return torch.eye(width + 1, width, dtype=torch.float64, device=moments.xx.device)


def _selects(slot: Slot, kind: Kind) -> bool:
    """Whether the units of a block are chosen from all layers of its group.

    Those of an MLP are. Heads stay those of the kept layer: no choice of heads that read the stream before the MLPs of
    the group was measured to do better, at the target that they have.
    """
    return kind == "mlp" and slot.mlp.operator == "select"


def _target(slot: Slot, kind: Kind) -> tuple[int, Tap]:
    """Where a block is to lead the stream: (layer of the original, tap).

    Attention leads to where its MLP stood, the MLP, or a block that is alone, to the end of the slot.
    """
    if kind == "attention" and slot.mlp is not None:
        return min(slot.mlp.kept, slot.layers[-1]), Tap("attention", "sum")
    return slot.layers[-1], Tap("mlp", "sum")
