"""Alignment: rewriting the blocks of a group to resemble each other without changing the function of any block.

All layers of a model read and write the same residual stream, so the only freedom of a block is inside it: the order
of an MLP's units, the order of heads, and a rotation of the coordinates that queries share with keys, or values with
the output projection. Without alignment, averaging would combine units and heads that do not correspond.
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
from ..evaluation.modes import outside_inference_mode
from ..math.align import CrossCorrelation, Rows, Turns, fit, gain, in_place, inner_product, scores, transport
from ..plan import Fuse, Plan
from .architectures import architecture_of
from .architectures.base import ATTENDING, Block
from .architectures.block_weights import (
    HEAD_NORMS,
    POSITIONS,
    READERS,
    batch_norm_gain,
    reads_stream,
    rows_of,
    write_rows,
)
from .surgery.checks import check_model, check_plan
from .symmetries import is_bound, turns_of

_OFF = 1e-3  # gains below this share of the largest gain of their norm are not divided by

Correlations = Mapping[tuple[str, int], CrossCorrelation]


class _Pair(NamedTuple):
    """A block of a group, and the reference block of the group to which it is aligned."""

    edit: Fuse
    reference: Block
    block: Block

    @property
    def key(self) -> tuple[str, int]:
        return self.block.kind, self.block.layer


@outside_inference_mode
def align(model: PreTrainedModel, plan: Plan, batches: Batches | None = None) -> PreTrainedModel:
    """Align the blocks of each group with one of them. The function of every block stays the same.

    `apply(align(model, plan, batches), plan)` combines aligned weights. The reference block of a group is the one that
    `freeze` keeps, the first block for `telescope`, and the block nearest the middle for the other operators. The
    methods of `Fuse.align` are:

    - `permutation`: Units and heads are matched one to one by their weights (Git Re-Basin, Ainsworth et al. 2023,
      section 3.2). Query heads are matched inside their key-value group.
    - `activation`: Units and heads are matched by the correlation of their activations on calibration tokens. Each
      block runs at its own depth of the model (Verma, Murray & Duh, "Merging Feed-Forward Sublayers for Compressed
      Transformers").
    - `transport`: Units and heads are matched by optimal transport between weights scaled to length one (OT fusion,
      Singh & Jaggi 2020).
    - `rotation`: Units and heads are matched as in `permutation`. In addition, each head is rotated to its match:
      queries with keys, and values with the output projection (orthogonal Procrustes). With rotary positions, the
      rotated coordinates of queries and keys can turn only by one angle per frequency pair. With norms on queries and
      keys, they cannot rotate.

    Heads with position biases of their own (T5, ALiBi) keep their places: only `rotation` changes them.

    If a fused block runs once (mode `depth`) and has a norm before it, the norms of a group are made equal first:
    their difference moves into the maps that read them. A norm that both blocks of a layer read changes only if both
    are fused. An opaque block stays as it is.

    Args:
        model: Stock model of the plan's architecture, with any head.
        plan: Plan whose `Fuse` edits specify the alignment.
        batches: Calibration batches, dicts of model inputs such as `{"input_ids", "attention_mask"}`. Only `activation`
            needs them. It keeps 8 bytes x (width of the block)^2 for each block that it aligns.

    Returns:
        A copy of the same class, device and dtype that shares the parameters of unaligned layers with the model; the
        model itself if no edit specifies an alignment.

    Raises:
        RecipeError: The method is `activation` without batches, or `transport` without POT.
        DataError: The batches contain only padding.
        PlanError: The plan is for another architecture or number of layers.
        UnsupportedModelError: The model cannot be fused, or its blocks have parts that alignment does not support.
    """
    architecture = architecture_of(plan, model)
    check_model(model, architecture)
    check_plan(model, architecture, plan)
    return aligned(model, plan, batches)


@torch.no_grad()
def aligned(model: PreTrainedModel, plan: Plan, batches: Batches | None = None) -> PreTrainedModel:
    """Run `align` for a model and a plan that `check_model` and `check_plan` have accepted."""
    architecture = architecture_of(plan, model)
    edits = [edit for edit in plan.edits if edit.align != "none"]
    if not edits:
        return model
    layers = architecture.layer_list(model)
    rewritten = {id(p) for edit in edits for layer in edit.layers for p in layers[layer].parameters()}
    memo = {id(p): p for p in model.parameters() if id(p) not in rewritten}  # deepcopy treats these as already copied
    result = copy.deepcopy(model, memo)
    blocks = {(block.kind, block.layer): block for block in architecture.blocks(result)}
    pairs = [
        _Pair(edit, blocks[kind, target], blocks[kind, layer])
        for edit in edits
        for kind in (plan.kinds if edit.kind == "layer" else (edit.kind,))
        for target in [edit.layers[0] if edit.operator == "telescope" else edit.source.kept]
        for layer in edit.layers
        if layer != target and "out" in blocks[kind, layer].modules  # the inside of an opaque block is unknown
    ]
    by_activation = [pair for pair in pairs if pair.edit.align == "activation" and not is_bound(pair.block)]
    correlations = _correlations(result, by_activation, batches, architecture.mask)
    for edit in edits:
        for layer in edit.layers:
            own = [pair for pair in pairs if pair.edit is edit and pair.block.layer == layer]
            rows = [rows_of(result, pair.block) for pair in own]
            if edit.mode == "depth" and not architecture.post_norm:
                _share_norms(result, [block for at, block in blocks.items() if at[1] == layer], own, rows)
            for pair, values in zip(own, rows, strict=True):
                reference = rows_of(result, pair.reference)
                write_rows(result, pair.block, _fit(pair, reference, values, correlations))
    return result


def _fit(pair: _Pair, reference: Rows, rows: Rows, correlations: Correlations) -> Rows:
    """Rows of the block, reordered and rotated by the method of the edit."""
    free = turns_of(pair.block, rows)
    matched = _folded(reference), _folded(rows)
    fixed: Turns = dict.fromkeys(free, "none")
    if is_bound(pair.block):
        return fit(reference, rows, scores(*matched, fixed), free if pair.edit.align == "rotation" else fixed, in_place)
    if pair.edit.align == "activation":
        # Single coordinates inside a head have no meaning, so heads match if they compute the same up to a rotation.
        # The nuclear norm of their cross-correlation is the maximum over all rotations. Units keep their sign: a unit
        # that is on where the other is off does not match it.
        groups, heads, dim, _ = rows["out"].shape
        split = correlations[pair.key].value().reshape(groups, heads, dim, groups, heads, dim)
        score = gain(split.permute(0, 3, 1, 4, 2, 5), "any" if pair.block.kind in ATTENDING else "none")
        return fit(reference, rows, score, fixed)
    if pair.edit.align == "transport":
        return fit(reference, rows, scores(*matched, fixed, cosine=True), fixed, transport)
    # The score of a permutation is the plain inner product of the heads. With rotations, it is the inner product after
    # rotating, ||S_QK||_* + ||S_VO||_* if all rotations are free. For heads that share the rotation of their group,
    # this is only a bound, so the plain matching is tried too and the better result wins.
    turns = free if pair.edit.align == "rotation" else fixed
    matchings = [scores(*matched, by) for by in ([fixed] if turns == fixed else [free, fixed])]
    found = [fit(reference, rows, score, turns) for score in matchings]
    return max(found, key=lambda fitted: inner_product(matched[0], _folded(fitted)))


def _folded(rows: Rows) -> Rows:
    """Rows for comparison: rows of a convolution are multiplied by the gain of the batch norm after it."""
    if "in_norm" not in rows:
        return rows
    weight, _, _, variance = rows["in_norm"].split(1, dim=-1)
    return {"in": rows["in"] * batch_norm_gain(weight, variance), "out": rows["out"]}


def _share_norms(model: PreTrainedModel, layer: list[Block], pairs: list[_Pair], rows: list[dict[str, Tensor]]) -> None:
    """Give the norms of a layer's blocks the gain and bias of the reference norms, in place.

    The difference moves into the maps that read the norm. A norm stays if it is also read by a block that is not
    aligned, or possibly by a part whose role is unknown.

    Args:
        model: Model that contains the blocks.
        layer: All blocks of the layer.
        pairs: Blocks of the layer that are aligned.
        rows: Rows of these blocks, changed in place.
    """
    for path in dict.fromkeys(pair.block.modules.get("norm") for pair in pairs):
        reading = [block for block in layer if block.modules.get("norm") == path]
        own = [(pair, values) for pair, values in zip(pairs, rows, strict=True) if pair.block in reading]
        if path is None or len(own) < len(reading) or any(block.kind == "conv" for block in reading):
            continue
        if any(_has_other_maps(model, block) for block in reading):
            continue
        reference, norm = model.get_submodule(own[0][0].reference.modules["norm"]), model.get_submodule(path)
        readers = [values[role] for pair, values in own for role in values if reads_stream(pair.block.kind, role)]
        _share_norm(reference, norm, readers)


def _has_other_maps(model: PreTrainedModel, block: Block) -> bool:
    """Whether a part of a block with an unknown role has a matrix, so that it may read the norm."""
    known = ("norm", "out", *READERS, *HEAD_NORMS, *POSITIONS)
    others = [path for role, path in block.modules.items() if role not in known]
    return any(tensor.ndim >= 2 for path in others for tensor in model.get_submodule(path).parameters())


def _share_norm(reference: nn.Module, norm: nn.Module, readers: list[Tensor]) -> None:
    """Give a norm the gain and bias of the reference norm, and move the difference into the maps that read it.

    A map reads g x + c, so its effective weight is W diag(g). The mean of two effective weights equals the mean of W
    times the mean of g only if both blocks share g. Three cases stay unchanged: coordinates that the reference nearly
    switches off, norms with a bias if a map that reads them has no bias, and norms that do not multiply by their
    weight.
    """
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
    """Whether two norms compute weight * u + bias with the same u. Gemma norms multiply by 1 + weight and do not."""
    if any(getattr(norm, "weight", None) is None for norm in (a, b)):
        return False
    a, b = copy.deepcopy(a).double(), copy.deepcopy(b).double()
    probe = torch.linspace(-1, 1, len(a.weight), dtype=torch.float64, device=a.weight.device)
    u_a, u_b = (norm(probe) - (0 if getattr(norm, "bias", None) is None else norm.bias) for norm in (a, b))
    return torch.allclose(u_a * b.weight, u_b * a.weight, rtol=1e-4)


def _correlations(model: PreTrainedModel, pairs: list[_Pair], batches: Batches | None, mask_name: str) -> Correlations:
    """Cross-correlations of each block with its reference over all tokens of one pass.

    Attention compares the outputs of the heads. MLPs compare the pre-activations of their units, as in the paper:
    after the nonlinearity, most values are near zero, so a few tokens would dominate. A gated unit is the product of
    two values, and neither is informative alone, so gated MLPs compare the product.
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
        before_out = block.kind in ATTENDING or not {"gate", "gate_in"}.isdisjoint(block.modules)
        path = block.modules["out" if before_out else "in_norm" if block.kind == "conv" else "in"]
        modules[path] = model.get_submodule(path), "before" if before_out else "after"
        return path

    watched = [(listen(pair.reference), listen(pair.block), found[pair.key]) for pair in pairs]

    def correlate() -> None:
        for one, other, correlation in watched:
            correlation.update(states[one], states[other])

    watch_tokens(model, batches, modules, states.__setitem__, correlate, mask_name)
    return found
