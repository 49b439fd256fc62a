"""Closed-form repair of attention and MLP blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from torch import Tensor

from ...math.ridge import Moments, compose, fit, identity
from ...models.align import aligned
from ...models.architectures import ATTENDING, Block, reads_stream
from ...models.modules.shared_linear import theta_of
from ...models.paging import in_memory
from ...plan import Kind, LinearForm, Plan, Slot
from ..disk import PerBatch, StoredTensors, WeightSnapshot
from ..layer_hooks import HookPoint
from ..layerwise import LayerwiseForward
from ..teacher_states import TeacherStates
from .base import RefitMethod, Repair
from .between import Between
from .linear import fit_gain, fit_linear, fit_map, fit_norm, fold, store
from .selection import Selection, Total, alike


def selecting(kinds: Sequence[Kind]) -> tuple[HookPoint, ...]:
    """Hook points that `select` needs from every layer of a group, besides the states."""
    return tuple(HookPoint(kind, place) for kind in kinds for place in ("read", "sum"))


class TransformerRepair(Repair):
    """Repair of attention and MLP blocks."""

    def __init__(self, student: LayerwiseForward, teacher: TeacherStates, plan: Plan, method: RefitMethod) -> None:
        super().__init__(student, teacher, plan, method)
        # shared weights have the units, heads and rotations of the aligned original
        original = (
            aligned(teacher.layerwise.model, plan, student.sample.batches) if self.tied else teacher.layerwise.model
        )
        self._aligned = student.architecture.layer_list(original)

    def _wanted(self, slot: Slot) -> set[tuple[int, HookPoint]]:
        wanted = {_target(slot, kind) for kind, source in slot.blocks.items() if source}
        if self.method == "maps":
            return {place for place in wanted if place == _end(slot)}
        if self.method == "full":
            for kind, source in slot.blocks.items():
                if source and not source.linear:
                    reads = source.layers if _selects(slot) and source == slot.source("mlp") else (source.kept,)
                    wanted |= {(layer, HookPoint(kind, "read")) for layer in reads}
            if _selects(slot) and slot.whole:
                kinds = [kind for kind in slot.blocks if kind in ATTENDING]
                places = [HookPoint(kind, place) for kind in kinds for place in ("residual", "sum")]
                wanted |= {(layer, point) for layer in slot.whole.layers for point in places}
        return wanted

    def _repair(self, index: int, slot: Slot, seen: Mapping[tuple[int, HookPoint], StoredTensors]) -> None:
        architecture, model = self.student.architecture, self.student.model
        layer = self.student.layers[index]
        blocks = [block for block in architecture.blocks(model) if block.layer == index and "out" in block.modules]
        for block in blocks:
            depth, point = _target(slot, block.kind)
            if architecture.post_norm and len(slot.layers) > 1:
                # the target of the sum is the input of this norm of the original
                path = architecture.table(point.kind)["norm"]
                own = architecture.table(block.kind)["norm"]
                stock = self.teacher.layers[depth]
                with in_memory([stock]):
                    layer.get_submodule(own).load_state_dict(stock.get_submodule(path).state_dict())
        if self.method == "linear":
            if len(slot.layers) > 1 and blocks:
                self._fit_outputs(blocks[-1], seen[_target(slot, blocks[-1].kind)])
            return
        attending = blocks[:-1] if slot.whole and len(blocks) == len(architecture.kinds) else []
        for block in blocks:
            if (form := slot.source(block.kind).linear) is not None:
                self._fit_linear(block, form, seen[_target(slot, block.kind)])
            elif self.method == "maps":
                continue
            elif block.kind == "mlp" and _selects(slot):
                self._select(slot, attending, block, seen)
            else:
                kept = slot.source(block.kind).kept
                self._fit_inputs(block, kept, seen[kept, HookPoint(block.kind, "read")])
                self._fit_projection(block, seen[_target(slot, block.kind)])
            if architecture.post_norm and (index, block.kind) in self.tied:
                self._fit_norm(block, slot)

    def _readers(self, block: Block) -> dict[str, str]:
        """Paths of the maps that read the inputs of a block, by role."""
        return {
            role: path
            for role, path in block.modules.items()
            if reads_stream(block.kind, role) and role not in self.student.architecture.also_positions
        }

    def _reading(self, block: Block, original: StoredTensors) -> list[Moments]:
        """Moments of the inputs of a block in the student, with the inputs of the original block as targets."""

        def rows(index: int, read: Tensor) -> tuple[Tensor, Tensor]:
            return read, original[index].to(read.device)

        return self.student.moments(rows, HookPoint(block.kind, "read"))

    def _fit_inputs(self, block: Block, source: int, original: StoredTensors) -> None:
        """Refit the maps that read the stream, so that they give their outputs in the original."""
        moments = self._reading(block, original)
        if (block.layer, block.kind) in self.tied:
            table, stock = self.student.architecture.table(block.kind), self._aligned[source]
            aims = {role: theta_of(stock.get_submodule(table[role])) for role in self._readers(block)}
            # in measurements, a gain for queries and keys made models worse, because their errors multiply
            if block.kind == "mlp" and self.student.architecture.own_norm("mlp"):
                moments = self._fit_gain(block, aims, moments)
            for role, path in self._readers(block).items():
                self._fit(block, role, path, [part.towards(aims[role]) for part in moments])
            return
        modules = [self.student.model.get_submodule(path) for path in self._readers(block).values()]
        if any(module.bias is None for module in modules):
            moments = [part.linear() for part in moments]
        found = fit(*moments, identity(moments[0]))
        self._note(block.layer, block.kind, "read", found.before, found.after)
        if found.strength is not None:
            for module in modules:
                fold(module, found.theta)

    def _fit_gain(self, block: Block, aims: Mapping[str, Tensor], moments: list[Moments]) -> list[Moments]:
        """Refit the norm before shared maps, and return the moments of its new outputs."""
        norm = self.student.model.get_submodule(block.modules["norm"])
        if getattr(norm, "weight", None) is None:
            return moments
        readers = [(self.student.model.get_submodule(block.modules[role]), aim) for role, aim in aims.items()]
        found = fit_gain(norm, readers, *moments)
        self._note(block.layer, block.kind, "norm", found.before, found.after)
        return [part.through(identity(part) * found.theta[:-1].T) for part in moments]

    def _fit_norm(self, block: Block, slot: Slot) -> None:
        """Refit the norm that follows a block, so that it gives the output of the original's norm."""
        following = dict(pairwise(slot.blocks))
        depth, point = _target(slot, block.kind)
        if point.kind in following:
            after = HookPoint(following[point.kind], "residual")
            target = self.teacher.see([(depth, after)])[depth, after]
        else:
            target = self.teacher.states(depth + 1)

        def rows(index: int, states: Tensor) -> tuple[Tensor, Tensor]:
            return states, target[index].to(states.device)

        own = HookPoint(following[block.kind], "residual") if block.kind in following else None
        moments = self.student.moments(rows, own)
        found = fit_norm(self.student.model.get_submodule(block.modules["norm"]), *moments)
        self._note(block.layer, block.kind, "norm", found.before, found.after)

    def _fit_projection(self, block: Block, target: PerBatch) -> None:
        """Refit the output projection, so that the stream after the block fits the target."""
        between = Between(self.student, block)

        def rows(index: int, features: Tensor, output: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
            aim = between.aims(target[index].to(residual.device) - residual, output)
            return features, aim, *between.weights(output)

        residual, output = (HookPoint(block.kind, place) for place in ("residual", "output"))
        moments = self.student.moments(rows, HookPoint(block.kind, "features"), output, residual)
        self._fit(block, "out", block.modules["out"], moments)
        if between.norm is not None:

            def normed(index: int, output: Tensor, residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
                aim = target[index].to(residual.device)
                return between.normed(output), aim - residual, _per_deviation(aim)

            found = fit_norm(between.norm, *self.student.moments(normed, HookPoint(block.kind, "output"), residual))
            self._note(block.layer, block.kind, "norm", found.before, found.after)

    def _fit_linear(self, block: Block, form: LinearForm, target: PerBatch) -> None:
        """Fit the maps of a linearised MLP, so that the stream after the block fits the target.

        Errors are divided by the standard deviation of the stream at each token, as in the norms that read the stream.
        """
        between = Between(self.student, block)

        def rows(index: int, read: Tensor, output: Tensor, residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            aim = target[index].to(residual.device)
            return read, aim if form.fold else between.aims(aim - residual, output), _per_deviation(aim)

        places = (HookPoint(block.kind, place) for place in ("read", "output", "residual"))
        moments = self.student.moments(rows, *places)
        maps = [
            self.student.model.get_submodule(path)
            for role, path in block.modules.items()
            if role in ("in", "gate_in", "out")
        ]
        found = fit_linear(maps, *moments)
        variance = moments[1].centred()[2].trace().item() / (moments[1].rows or 1.0)
        self._note(block.layer, block.kind, "linear map", found.before, found.after, r2=1 - found.after / variance)

    def _select(
        self,
        slot: Slot,
        attending: Sequence[Block],
        mlp: Block,
        seen: Mapping[tuple[int, HookPoint], StoredTensors],
    ) -> None:
        """Build a layer from the heads and hidden units of its whole group.

        The target of attention limits how well the MLP can fit the end of the group, so two targets are tried. The sum
        of all attention outputs of the group contains the states that the later MLPs read. However, these MLPs then
        miss the outputs of the first MLPs. If those are a large part of the stream, as in the first layers of GPT-2,
        the state after the attention of the kept layer is the better target. Cross-attention is attention here.
        """
        target = seen[_target(slot, "mlp")]
        if attending:
            own, rows = WeightSnapshot(self.student.layers[mlp.layer]), len(self.blocks)
        units = self._selection(mlp, slot.source("mlp").layers, seen)
        if attending:
            before = units.missed(target)
            for place, block in enumerate(attending):
                total = Total(seen, [each.kind for each in attending[: place + 1]], slot.whole.layers)
                heads = alike(self.teacher.layerwise.model, self.teacher.architecture, slot.whole, block.kind)
                self._selection(block, heads, seen).choose(total)
                self._fit_projection(block, total)
            found = self._selection(mlp, slot.source("mlp").layers, seen)
            after = found.missed(target)
            if after < before:
                units = found
            else:
                own.restore(self.student.layers[mlp.layer])
                del self.blocks[rows:]
            self._note(mlp.layer, attending[0].kind, "heads", before, min(before, after))
        units.choose(target)
        self._fit_projection(mlp, target)

    def _selection(
        self, block: Block, layers: Sequence[int], seen: Mapping[tuple[int, HookPoint], StoredTensors]
    ) -> Selection:
        reads = {layer: seen[layer, HookPoint(block.kind, "read")] for layer in layers}
        return Selection(self.student, block, self.teacher.layers, reads)

    def _fit_outputs(self, block: Block, target: StoredTensors) -> None:
        """Refit the output of a block by one linear map, folded into the output projection."""
        between = Between(self.student, block)

        def rows(index: int, output: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
            aim = between.aims(target[index].to(residual.device) - residual, output)
            return output, aim, *between.weights(output)

        moments = self.student.moments(rows, HookPoint(block.kind, "output"), HookPoint(block.kind, "residual"))
        module = self.student.model.get_submodule(block.modules["out"])
        if module.bias is None:
            moments = [part.linear() for part in moments]
        found = fit(*moments, identity(moments[0]))
        self._note(block.layer, block.kind, "linear", found.before, found.after)
        if found.strength is not None:
            store(module, compose(theta_of(module), found.theta))

    def _fit(self, block: Block, role: str, path: str, moments: Sequence[Moments]) -> None:
        module = self.student.model.get_submodule(path)
        found = fit_map(module, *moments, tied=(block.layer, block.kind) in self.tied)
        self._note(block.layer, block.kind, role, found.before, found.after)


def _per_deviation(states: Tensor) -> Tensor:
    """Weight of each token by the inverse of its standard deviation, (..., 1).

    Norms that read the stream divide by it. Without the weights, the few tokens with massive states count alone.
    """
    deviation = states.std(-1, keepdim=True)
    return 1 / (deviation + 1e-3 * deviation.mean() + 1e-12)


def _selects(slot: Slot) -> bool:
    """Whether the layer of a slot is selected from all layers of its group. Attention that is fused alone is not."""
    mlp = slot.source("mlp")
    return mlp is not None and mlp.operator == "select"


def _target(slot: Slot, kind: Kind) -> tuple[int, HookPoint]:
    """The target of the stream after a block: (layer of the original, hook point).

    The target of a block is the stream in front of the next one: of attention, that before its cross-attention or MLP.
    The target of the last block is the end of the slot.
    """
    kinds = list(slot.blocks)
    for before, after in pairwise(kinds[kinds.index(kind) :]):
        if (source := slot.source(after)) is not None:
            return min(source.kept, slot.layers[-1]), HookPoint(before, "sum")
    return _end(slot)


def _end(slot: Slot) -> tuple[int, HookPoint]:
    """The stream behind the last block of a slot: (layer of the original, hook point)."""
    return slot.layers[-1], HookPoint(list(slot.blocks)[-1], "sum")
