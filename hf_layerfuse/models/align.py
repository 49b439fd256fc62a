"""Alignment: the blocks of a group are rewritten to resemble each other, each without changing what it computes.

All layers of a model read and write the same residual stream, so the only freedom of a block is inside it: the order
of an MLP's units, the order of heads, and a turn of the coordinates that queries share with keys, or values with the
output projection. Weights that are averaged before that freedom is used up average unlike with unlike.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import RecipeError
from ..evaluation.batches import Batches
from ..evaluation.hooks import When, watch_tokens
from ..math.align import CrossCorrelation, Rows, Turns, fit, gain, inner_product, scores, transport
from ..plan import Fuse, Plan
from .architectures import architecture_for
from .architectures.base import Block
from .architectures.block_weights import (
    HEAD_NORMS,
    Heads,
    batch_norm_gain,
    heads_of,
    linear_maps,
    rows_of,
    write_rows,
)
from .surgery.checks import check_model, check_plan

_OFF = 1e-3  # a gain this much smaller than the largest of its norm is one that no quotient is taken by

Correlations = Mapping[tuple[str, int], CrossCorrelation]


class _Pair(NamedTuple):
    """A block of a group, and the block of that group which it is to resemble."""

    edit: Fuse
    reference: Block
    block: Block

    @property
    def key(self) -> tuple[str, int]:
        return self.block.kind, self.block.layer


def align(model: PreTrainedModel, plan: Plan, batches: Batches | None = None) -> PreTrainedModel:
    """Rewrite the blocks of each group to lie as close as possible to one of them; what each computes stays the same.

    `apply(align(model, plan, batches), plan)` combines aligned weights. The block that the others of its group come
    to resemble is the one that `freeze` keeps, the first of the group for `telescope`, and the one nearest its middle
    for the other operators. What `Fuse.align` asks for:

    - `permutation`: units and heads are matched one to one by their weights (Git Re-Basin, Ainsworth et al. 2023,
      section 3.2), the query heads of a key-value group inside it.
    - `activation`: matched by the correlation of what they compute on calibration tokens, each block in its own place
      in the model (Verma, Murray & Duh, "Merging Feed-Forward Sublayers for Compressed Transformers").
    - `transport`: matched by optimal transport between weights scaled to length one (OT fusion, Singh & Jaggi 2020).
    - `rotation`: as `permutation`, and each head is turned to its match: queries with keys, and values with the
      output projection (orthogonal Procrustes). Rotary positions leave queries and keys one angle for each frequency
      pair, norms on queries and keys none.

    Where a fused block runs once (mode `depth`) behind a norm of its own, the norms of a group are made equal first,
    by moving their difference into the maps that read them.

    Args:
        model: a stock model of the plan's architecture, with any head.
        plan: whose `Fuse` edits say what is aligned.
        batches: dicts of model inputs such as `{"input_ids", "attention_mask"}`, needed by `activation` alone, which
            keeps 8 bytes x (width of the block)^2 for each block that it aligns.

    Returns:
        A copy of the same class, device and dtype, which shares the parameters of other layers with the model; the
        model itself where no edit asks for alignment.

    Raises:
        RecipeError: `activation` without batches, or `transport` without POT.
        DataError: the batches hold no token that is not padding.
        PlanError: the plan is for another architecture or number of layers.
        UnsupportedModelError: the model cannot be fused, or its blocks have parts that alignment does not know.
    """
    architecture = architecture_for(model)
    check_model(model, architecture)
    check_plan(model, architecture, plan)
    return aligned(model, plan, batches)


@torch.no_grad()
def aligned(model: PreTrainedModel, plan: Plan, batches: Batches | None = None) -> PreTrainedModel:
    """`align` for a model and a plan that `check_model` and `check_plan` accepted."""
    architecture = architecture_for(model)
    edits = [edit for edit in plan.edits if isinstance(edit, Fuse) and edit.align != "none"]
    if not edits:
        return model
    layers = architecture.layer_list(model)
    rewritten = {id(p) for edit in edits for layer in edit.layers for p in layers[layer].parameters()}
    memo = {id(p): p for p in model.parameters() if id(p) not in rewritten}  # what deepcopy takes as copied already
    result = copy.deepcopy(model, memo)
    blocks = {(block.kind, block.layer): block for block in architecture.blocks(result)}
    pairs = [
        _Pair(edit, blocks[kind, target], blocks[kind, layer])
        for edit in edits
        for kind in (plan.kinds if edit.kind == "layer" else (edit.kind,))
        for target in [edit.layers[0] if edit.operator == "telescope" else edit.source.kept]
        for layer in edit.layers
        if layer != target
    ]
    correlations = _correlations(result, [pair for pair in pairs if pair.edit.align == "activation"], batches)
    for pair in pairs:
        reference, rows = (rows_of(result, block, _heads(result, block)) for block in (pair.reference, pair.block))
        if pair.edit.mode == "depth" and not architecture.post_norm and pair.block.kind != "conv":
            _share_norm(result, pair, rows)
        write_rows(result, pair.block, _fit(result, pair, reference, rows, correlations))
    return result


def _fit(model: PreTrainedModel, pair: _Pair, reference: Rows, rows: Rows, correlations: Correlations) -> Rows:
    """The rows of the block in the order, and turned, as the edit asks for."""
    free = _turns(model, pair.block)
    matched = _folded(reference), _folded(rows)
    fixed: Turns = dict.fromkeys(free, "none")
    if pair.edit.align == "activation":
        # Coordinates inside a head have no meaning of their own, so heads match that compute the same up to a turn:
        # the nuclear norm of their cross-correlation is the most that a turn could reach. Units keep their sign: one
        # that is on where the other is off is no match.
        groups, heads, dim, _ = rows["out"].shape
        split = correlations[pair.key].value().reshape(groups, heads, dim, groups, heads, dim)
        score = gain(split.permute(0, 3, 1, 4, 2, 5), "any" if pair.block.kind == "attention" else "none")
        return fit(reference, rows, score, fixed)
    if pair.edit.align == "transport":
        return fit(reference, rows, scores(*matched, fixed, cosine=True), fixed, transport)
    # A permutation gains the plain inner product of the heads; with turns it is what they reach once turned,
    # ||S_QK||_* + ||S_VO||_* where all turns are free. For heads that share the turn of their group that is only a
    # bound, so the plain matching competes.
    turns = free if pair.edit.align == "rotation" else fixed
    matchings = [scores(*matched, by) for by in ([fixed] if turns == fixed else [free, fixed])]
    found = [fit(reference, rows, score, turns) for score in matchings]
    return max(found, key=lambda fitted: inner_product(matched[0], _folded(fitted)))


def _folded(rows: Rows) -> Rows:
    """Rows to be compared: those of a convolution with the gain of the batch norm that follows, which it may take."""
    if "in_norm" not in rows:
        return rows
    weight, _, _, variance = rows["in_norm"].split(1, dim=-1)
    return {"in": rows["in"] * batch_norm_gain(weight, variance), "out": rows["out"]}


def _turns(model: PreTrainedModel, block: Block) -> Turns:
    """The turns of a block's heads that leave its function as it is."""
    if block.kind == "mlp":  # a nonlinearity acts on each unit by itself
        return {tuple(linear_maps(model, block)): "none"}
    if block.kind == "conv":
        return {("in", "out"): "none"}
    # A turn of both leaves q . k as it is. A norm in between has a gain for each coordinate, which it does not commute
    # with; positions rotate each frequency pair, which rotations of the same pair do commute with.
    normed = any(role in block.modules for role in HEAD_NORMS)
    return {("q", "k"): "none" if normed else "pairs" if heads_of(model).rotary else "any", ("v", "out"): "any"}


def _heads(model: PreTrainedModel, block: Block) -> Heads | None:
    return heads_of(model) if block.kind == "attention" else None


def _share_norm(model: PreTrainedModel, pair: _Pair, rows: dict[str, Tensor]) -> None:
    """Give a block's norm the gain and the bias of the reference's, and the maps that read it the difference.

    A map reads g x + c, so what it does is W diag(g), and the mean of two of those is not the mean of W times the
    mean of g unless both share g. Left alone are coordinates that the reference all but switches off, norms with a
    bias whose difference no bias of the maps can take, and norms that do not multiply by their weight.
    """
    reference, norm = (model.get_submodule(block.modules["norm"]) for block in (pair.reference, pair.block))
    readers = [values for role, values in rows.items() if role != "out"]
    bias = getattr(norm, "bias", None)
    if bias is not None and any(values.shape[-1] == len(bias) for values in readers):
        return
    if not _same_but_for_gain(reference, norm):
        return
    old, new = norm.weight.double(), reference.weight.double()
    new = torch.where(new.abs() <= _OFF * new.abs().max(), old, new)
    for values in readers:
        weight = values[..., : len(old)]
        shift = 0 if bias is None else weight @ bias.double()
        weight *= old / new
        if bias is not None:
            values[..., -1] += shift - weight @ reference.bias.double()
    norm.weight.copy_(new)
    if bias is not None:
        bias.copy_(reference.bias)


def _same_but_for_gain(a: nn.Module, b: nn.Module) -> bool:
    """Whether two norms give weight * u + bias with one u; Gemma's, which multiply by 1 + weight, do not."""
    if getattr(a, "weight", None) is None:
        return False
    a, b = copy.deepcopy(a).double(), copy.deepcopy(b).double()
    probe = torch.linspace(-1, 1, len(a.weight), dtype=torch.float64, device=a.weight.device)
    u_a, u_b = (norm(probe) - (0 if getattr(norm, "bias", None) is None else norm.bias) for norm in (a, b))
    return torch.allclose(u_a * b.weight, u_b * a.weight, rtol=1e-4)


def _correlations(model: PreTrainedModel, pairs: list[_Pair], batches: Batches | None) -> Correlations:
    """How what each block computes correlates with what its reference does, over all tokens of one pass.

    What is compared are the outputs of the heads, and the pre-activations of an MLP's units as in the paper: past the
    nonlinearity most are near zero, and few tokens would decide. A gated unit has two, and is their product, of which
    neither says much alone, so there the product counts.
    """
    if not pairs:
        return {}
    if batches is None:
        raise RecipeError(
            "align='activation' compares activations: pass batches=, an iterable of model inputs, or use "
            "'permutation', 'transport' or 'rotation', which compare weights."
        )
    found = {pair.key: CrossCorrelation() for pair in pairs}
    states: dict[str, Tensor] = {}
    modules: dict[str, tuple[nn.Module, When]] = {}

    def listen(block: Block) -> str:
        before_out = block.kind == "attention" or "gate" in block.modules
        path = block.modules["out" if before_out else "in_norm" if block.kind == "conv" else "in"]
        modules[path] = model.get_submodule(path), "before" if before_out else "after"
        return path

    watched = [(listen(pair.reference), listen(pair.block), found[pair.key]) for pair in pairs]

    def correlate() -> None:
        for one, other, correlation in watched:
            correlation.update(states[one], states[other])

    watch_tokens(model, batches, modules, states.__setitem__, correlate)
    return found
