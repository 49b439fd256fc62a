"""Operator `select`: a block of those heads or hidden units, of all layers of its group, that lead best to a target."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...math.ridge import Moments, chain, eliminate, fit, identity
from ...models.architectures import READERS, Block, architecture_for, heads_of
from ...models.architectures.block_weights import HEAD_NORMS, rows_of, write_rows
from ...models.modules.shared_linear import theta_of
from ...plan import Source
from ..layer_hooks import HookPoint
from ..layerwise import LayerwiseForward
from ..mmap import MappedActivations, PerBatch
from .linear import store

TOKENS_PER_INPUT = 4
"""For each input that may be selected, so many tokens are looked at: to tell inputs apart takes far fewer than to fit
their weights, and moments of so many inputs are the largest of a repair."""

WIDTHS = 2
"""Of a group of many layers, so many times the MLP's width may be selected, by what each unit adds to the stream."""


class Selection:
    """The blocks of several layers of the original, in the place of one of the student.

    Those of each layer read the student's stream through the ridge fit of what they read in the original, by what is
    read here. What they write starts from what they wrote there, all of them at once. The rest of the layer is the
    student's own.

    Args:
        walk: of the student, at the layer of the block.
        block: the student's.
        stocks: the original's layers, by depth.
        originals: what the block of each depth read there.
    """

    def __init__(
        self, walk: LayerwiseForward, block: Block, stocks: Mapping[int, nn.Module], originals: Mapping[int, PerBatch]
    ) -> None:
        self.walk, self.block = walk, block
        self.table = walk.architecture.table(block.kind)
        self.layer = walk.layers[block.layer]
        self.variants: list[nn.Module] = []
        own = {id(p) for path in self.table.values() for p in self.layer.get_submodule(path).parameters()}
        # what deepcopy takes as copied already
        shared = {id(p): p for p in self.layer.parameters() if id(p) not in own}
        for depth, reading in self._readings(originals).items():
            variant = copy.deepcopy(self.layer, shared.copy())
            for role, path in self.table.items():
                if role == "out" or role in READERS:
                    theta = theta_of(stocks[depth].get_submodule(path))
                    store(variant.get_submodule(path), chain(reading, theta) if role in READERS else theta)
            self.variants.append(variant)
        parts = [theta_of(variant.get_submodule(self.table["out"])) for variant in self.variants]
        self.start = torch.cat([*(theta[:-1] for theta in parts), sum(theta[-1:] for theta in parts)])

    def _readings(self, originals: Mapping[int, PerBatch]) -> dict[int, Tensor]:
        """For each layer, the map from what is read here to what was read there, (in + 1, in)."""
        found: dict[int, list[Moments]] = {}
        point = HookPoint(self.block.kind, "read")
        for index, seen in self.walk.look(point):
            x = self.walk.split(index, seen[point])
            for depth, original in originals.items():
                y = self.walk.split(index, original[index].to(x[0].device))
                if depth not in found:
                    found[depth] = [Moments.empty(x[0].shape[1], y[0].shape[1], x[0].device) for _ in range(2)]
                for part, *pair in zip(found[depth], x, y, strict=True):
                    part.add(*pair)
        if any(self.layer.get_submodule(self.table[role]).bias is None for role in READERS if role in self.table):
            found = {depth: [part.linear() for part in moments] for depth, moments in found.items()}
        return {depth: fit(*moments, identity(moments[0])).theta for depth, moments in found.items()}

    def missed(self, target: PerBatch) -> float:
        """Mean squared distance from a target at which all of them lead the stream, before anything is refitted."""
        total = count = 0.0
        for x, y in self._rows(target, TOKENS_PER_INPUT * self.start.shape[1]):
            start = self.start.to(x)
            total += (x @ start[:-1] + start[-1] - y).square().sum().item()
            count += len(x)
            del x, y
        return total / max(count, 1.0)

    @torch.no_grad()
    def choose(self, target: PerBatch) -> None:
        """Make the student's block of those that a fit of the target can least do without, as many as it had.

        They are found by backward elimination. A head goes together with the others that share its keys and values.
        """
        keep, size = self._units(self.variants[0])["out"].shape[:2]
        able = self._able(target, keep, size)
        columns = _columns(able, size)
        # single precision is enough to rank them, and these moments are the largest of all
        moments = Moments.empty(len(columns), self.start.shape[1], columns.device, torch.float32)
        for x, y in self._rows(target, TOKENS_PER_INPUT * len(columns)):
            moments.add(x if len(columns) == x.shape[1] else x[:, columns], y)
            del x, y
        kept = able[eliminate(moments, torch.cat([self.start[columns], self.start[-1:]]), keep, size=size)]
        del moments
        chosen: dict[str, list[Tensor]] = {}
        for place, variant in enumerate(self.variants):  # in double precision, so one layer at a time
            own = kept[kept // keep == place] - place * keep
            for role, rows in self._units(variant).items():
                chosen.setdefault(role, []).append(rows[own])
        shapes = {role: rows.shape for role, rows in self._heads(self.layer).items()}
        made = {role: torch.cat(rows).reshape(shapes[role]) for role, rows in chosen.items()}
        write_rows(self.layer, self._part, made)
        out = self.layer.get_submodule(self.table["out"])
        if out.bias is not None:
            out.bias.copy_(self.start[-1])

    @property
    def _part(self) -> Block:
        """The block, with paths that start at its layer."""
        return Block(self.block.layer, self.block.kind, self.table)

    def _heads(self, layer: nn.Module) -> dict[str, Tensor]:
        return rows_of(layer, self._part, heads_of(self.walk.model) if self.block.kind == "attention" else None)

    def _units(self, layer: nn.Module) -> dict[str, Tensor]:
        """Role -> (units, rows of a unit, features): what is kept or left as a whole."""
        axis = 1 if self.block.kind == "attention" else 2  # what shares keys and values; a hidden unit
        return {role: rows.flatten(0, axis - 1).flatten(1, -2) for role, rows in self._heads(layer).items()}

    def _able(self, target: PerBatch, keep: int, size: int) -> Tensor:
        """The units that may be selected: of very many, those that add most to the stream.

        The matrix of moments of all would take longer to fill than everything else.
        """
        total = (len(self.start) - 1) // size
        width = theta_of(self.variants[0].get_submodule(self.walk.architecture.mlp["out"])).shape[0] - 1
        most = max(keep, WIDTHS * width // size)
        if total <= most:
            return torch.arange(total, device=self.start.device)
        features = torch.cat([x for x, _ in self._rows(target, TOKENS_PER_INPUT * self.start.shape[1])])
        energy = features.double().var(0) * self.start[:-1].square().sum(1)
        return energy.view(total, size).sum(1).topk(most).indices.sort().values

    def _rows(self, target: PerBatch, tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
        """What enters the output projections side by side, and the rest of the target, for at least so many tokens."""
        features, residual = HookPoint(self.block.kind, "features"), HookPoint(self.block.kind, "residual")
        walks = [self.walk.look(features, residual, layer=variant, tokens=tokens) for variant in self.variants]
        # what is wide is let go of before the next batch is read
        while (steps := [next(walk, None) for walk in walks])[0] is not None:
            index, first = steps[0]
            x = torch.cat([self.walk.rows(index, step[features]) for _, step in steps], dim=-1)
            y = self.walk.rows(index, target[index].to(x.device) - first[residual].float())
            del steps, first
            yield x, y
            del x, y


def alike(model: PreTrainedModel, source: Source) -> list[int]:
    """The layers of a group whose heads can stand beside those of the kept one.

    They see what it sees: a sliding window, or everything. Norms inside the heads belong to all heads of a layer.
    """
    types = getattr(model.config, "layer_types", None) or [None] * (max(source.layers) + 1)
    normed = any(role in architecture_for(model).attention for role in HEAD_NORMS)
    return [n for n in source.layers if n == source.kept or (types[n] == types[source.kept] and not normed)]


def _columns(units: Tensor, size: int) -> Tensor:
    return (units[:, None] * size + torch.arange(size, device=units.device)).flatten()


class Total:
    """The original's states with all that the attention of some layers adds, as if they ran at once; by batch."""

    def __init__(self, seen: Mapping[tuple[int, HookPoint], MappedActivations], layers: Sequence[int]) -> None:
        self._before, self._after = (
            [seen[n, HookPoint("attention", at)] for n in layers] for at in ("residual", "sum")
        )

    def __getitem__(self, index: int) -> Tensor:
        added = sum(after[index] - before[index] for before, after in zip(self._before, self._after, strict=True))
        return self._before[0][index] + added
