"""Operator `select`: a block made of the heads or hidden units of its whole group that fit a target best."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...math.ridge import Moments, compose, eliminate, fit, identity
from ...models.architectures import ATTENDING, MAPS, Block, TransformerArchitecture, reads_stream
from ...models.architectures.block_weights import HEAD_NORMS, POSITIONS, rows_of, write_rows
from ...models.modules.shared_linear import theta_of
from ...models.paging import in_memory
from ...models.surgery.layers import overrides_of
from ...plan import Kind, Source
from ..disk import PerBatch, StoredTensors
from ..layer_hooks import HookPoint
from ..layerwise import LayerwiseForward
from .between import Between
from .linear import store

TOKENS_PER_INPUT = 4
"""Number of tokens per candidate input. Ranking inputs takes far fewer tokens than fitting their weights, and the
moments of all candidates are the largest of a repair."""

WIDTHS = 2
"""Largest number of candidate units, in widths of the MLP. In larger groups, the candidates are the units that add
most to the stream."""

MOST = 10240
"""Largest number of candidate inputs, unless the block keeps more: their moments take the square of it."""


class Selection:
    """Selection of a student's block from the blocks of several layers of the original.

    A ridge fit predicts the inputs of each original block from the student's stream, and is folded into the maps of
    that block. The output projections start from the original weights, and all blocks write at once. The rest of the
    layer is the student's own.

    Args:
        layerwise: Layer-wise forward of the student, at the layer of the block.
        block: Block of the student.
        stocks: Layers of the original, by depth.
        originals: Inputs of the block in the original, by depth.
    """

    def __init__(
        self,
        layerwise: LayerwiseForward,
        block: Block,
        stocks: Mapping[int, nn.Module],
        originals: Mapping[int, PerBatch],
    ) -> None:
        self.layerwise, self.block = layerwise, block
        self.table = layerwise.architecture.table(block.kind)
        self.layer = layerwise.layers[block.layer]
        self.between = Between(layerwise, block)
        self.variants: list[nn.Module] = []
        own = {id(p) for path in self.table.values() for p in self.layer.get_submodule(path).parameters()}
        # deepcopy treats these parameters as already copied
        shared = {id(p): p for p in self.layer.parameters() if id(p) not in own}
        for depth, reading in self._readings(originals).items():
            variant = copy.deepcopy(self.layer, shared.copy())
            with in_memory([stocks[depth]]):
                for role, path in self.table.items():
                    if role in MAPS:
                        theta = theta_of(stocks[depth].get_submodule(path))
                        folds = reads_stream(block.kind, role) and role not in layerwise.architecture.also_positions
                        store(variant.get_submodule(path), compose(reading, theta) if folds else theta)
                        del theta
            self.variants.append(variant)
        parts = [theta_of(variant.get_submodule(self.table["out"])) for variant in self.variants]
        self.start = torch.cat([*(theta[:-1] for theta in parts), sum(theta[-1:] for theta in parts)])

    def _readings(self, originals: Mapping[int, PerBatch]) -> dict[int, Tensor]:
        """For each depth, the map from the student's inputs to the original's inputs, (in + 1, in)."""
        found: dict[int, list[Moments]] = {}
        point = HookPoint(self.block.kind, "read")
        for index, seen in self.layerwise.look(point):
            x = self.layerwise.split(index, seen[point])
            for depth, original in originals.items():
                y = self.layerwise.split(index, original[index].to(x[0].device))
                if depth not in found:
                    found[depth] = [Moments.empty(x[0].shape[1], y[0].shape[1], x[0].device) for _ in range(2)]
                for part, *pair in zip(found[depth], x, y, strict=True):
                    part.add(*pair)
        readers = [path for role, path in self.table.items() if reads_stream(self.block.kind, role)]
        if any(self.layer.get_submodule(path).bias is None for path in readers):
            found = {depth: [part.linear() for part in moments] for depth, moments in found.items()}
        return {depth: fit(*moments, identity(moments[0])).theta for depth, moments in found.items()}

    def missed(self, target: PerBatch) -> float:
        """Mean squared distance between a target and the stream after all candidate units, before any refit."""
        total = count = 0.0
        for x, y in self._rows(target, TOKENS_PER_INPUT * self.start.shape[1]):
            start = self.start.to(x)
            total += (x @ start[:-1] + start[-1] - y).square().sum().item()
            count += len(x)
            del x, y
        return total / max(count, 1.0)

    @torch.no_grad()
    def choose(self, target: PerBatch) -> None:
        """Fill the student's block with the units that matter most for a fit of the target.

        The block keeps its number of units. Backward elimination removes the others. Heads that share keys and values
        stay or go together.
        """
        keep, size = self._units(self.variants[0])["out"].shape[:2]
        able = self._able(target, keep, size)
        columns = _columns(able, size)
        begin = torch.cat([self.start[columns], self.start[-1:]])
        kept = able[eliminate(self._moments(target, columns), begin, keep, size=size)]
        chosen: dict[str, list[Tensor]] = {}
        for place, variant in enumerate(self.variants):  # one layer at a time, because rows are in double precision
            own = kept[kept // keep == place] - place * keep
            for role, rows in self._units(variant).items():
                chosen.setdefault(role, []).append(rows[own])
        shapes = {role: rows.shape for role, rows in rows_of(self.layer, self._part).items()}
        made = {role: torch.cat(rows).reshape(shapes[role]) for role, rows in chosen.items()}
        write_rows(self.layer, self._part, made)
        out = self.layer.get_submodule(self.table["out"])
        if out.bias is not None:
            out.bias.copy_(self.start[-1])

    def _moments(self, target: PerBatch, columns: Tensor) -> Moments:
        """Moments of some inputs of all output projections side by side.

        Single precision is enough to rank units, and these moments are the largest of all.
        """
        moments = Moments.empty(len(columns), self.start.shape[1], columns.device, torch.float32)
        for x, y in self._rows(target, TOKENS_PER_INPUT * len(columns)):
            moments.add(x if len(columns) == x.shape[1] else x[:, columns], y)
            del x, y
        return moments

    @property
    def _part(self) -> Block:
        """The block, with paths relative to its layer."""
        return dataclasses.replace(self.block, modules=self.table)

    def _units(self, layer: nn.Module) -> dict[str, Tensor]:
        """Weights of the units, (units, rows of a unit, features), by role. A unit is kept or removed as a whole."""
        axis = 1 if self.block.kind in ATTENDING else 2  # heads that share keys and values; a hidden unit
        return {role: rows.flatten(0, axis - 1).flatten(1, -2) for role, rows in rows_of(layer, self._part).items()}

    def _able(self, target: PerBatch, keep: int, size: int) -> Tensor:
        """The candidate units: all of them, or in large groups those that add most to the stream.

        With all units of a large group, filling the moments would take longer than the rest of the repair.
        """
        total = (len(self.start) - 1) // size
        width = theta_of(self.variants[0].get_submodule(self.layerwise.architecture.mlp["out"])).shape[0] - 1
        most = max(keep, min(WIDTHS * width, MOST) // size)
        if total <= most:
            return torch.arange(total, device=self.start.device)
        features = torch.cat([x for x, _ in self._rows(target, TOKENS_PER_INPUT * self.start.shape[1])])
        energy = features.double().var(0) * self.start[:-1].square().sum(1)
        return energy.view(total, size).sum(1).topk(most).indices.sort().values

    def _rows(self, target: PerBatch, tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the inputs of all output projections side by side, and the target less the residual, per batch.

        Args:
            target: Target states of the stream, by batch.
            tokens: Number of fitted tokens that are enough.
        """
        features, residual = HookPoint(self.block.kind, "features"), HookPoint(self.block.kind, "residual")
        passes = [self.layerwise.look(features, residual, layer=variant, tokens=tokens) for variant in self.variants]
        # wide tensors are freed before the next batch is read
        while (steps := [next(one, None) for one in passes])[0] is not None:
            index, first = steps[0]
            x = torch.cat([self.layerwise.rows(index, step[features]) for _, step in steps], dim=-1)
            added = self.layerwise.rows(index, target[index].to(x.device) - first[residual].float())
            start = None if self.between.norm is None else self.start.to(x)  # the product takes long
            y = self.between.aims(added, None if start is None else x @ start[:-1] + start[-1])
            del steps, first
            yield x, y
            del x, y


def alike(model: PreTrainedModel, architecture: TransformerArchitecture, source: Source, kind: Kind) -> list[int]:
    """The layers of a group whose heads can be combined with those of the kept layer.

    They have the same kind of attention, such as sliding-window or full. Their heads have no norms and no maps of
    position embeddings, because all heads of a layer share such parts, and no position biases of their own, which would
    bind them to their places. The kept layer is always included.
    """
    config, kept = architecture.config_of(model.config), source.kept
    heads = architecture.block(config, kept, kind, {}).heads
    if any(role in architecture.table(kind) for role in (*HEAD_NORMS, *POSITIONS)) or (heads and heads.bound):
        return [kept]
    lists = [values for name in architecture.per_layer_config if (values := getattr(config, name, None))]
    lists.append(overrides_of(config) or [None] * (max(source.layers) + 1))
    return [n for n in source.layers if n == kept or all(values[n] == values[kept] for values in lists)]


def _columns(units: Tensor, size: int) -> Tensor:
    return (units[:, None] * size + torch.arange(size, device=units.device)).flatten()


class Total:
    """The original's states plus the outputs of some blocks of several layers, as if all ran at once, by batch.

    Args:
        seen: States of the original, by layer and hook point.
        kinds: Kinds of the blocks, of which the first is the first one of a layer.
        layers: Layers of the original.
    """

    def __init__(
        self, seen: Mapping[tuple[int, HookPoint], StoredTensors], kinds: Sequence[Kind], layers: Sequence[int]
    ) -> None:
        self._before, self._after = (
            [seen[n, HookPoint(kind, at)] for kind in kinds for n in layers] for at in ("residual", "sum")
        )

    def __getitem__(self, index: int) -> Tensor:
        added = sum(after[index] - before[index] for before, after in zip(self._before, self._after, strict=True))
        return self._before[0][index] + added
