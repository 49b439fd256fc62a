"""Plans in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from .edit import Blend, Drop, Edit, Fuse, Linearize, MergeConvs
from .plan import Plan


def changes(plan: Plan) -> list[tuple[str, str]]:
    """Blocks of the original and their change, in words: one pair for each edit that changes more than norms."""
    pairs = []
    for edit in plan.edits:
        if become := _WORDS[type(edit)](edit):
            pairs.append((blocks(edit.kind, edit.layers), become))
    return pairs


def blocks(kind: str, layers: Sequence[int]) -> str:
    """Blocks of one kind in words."""
    return f"{_BLOCKS[kind][len(layers) > 1]} {', '.join(map(str, layers))}"


def operator_of(edit: Fuse | Any) -> str:
    """Operator and alignment in words, of an edit or of a record with the same fields."""
    how = edit.operator if edit.keep is None else f"{edit.operator}, layer {edit.keep}"
    return how if edit.align == "none" else f"{how}, aligned by {edit.align}"


def describe(plan: Plan) -> list[str]:
    """The plan in words, one line per edit."""
    return [f"{blocks}: {become}" for blocks, become in changes(plan)]


_BLOCKS = {
    "layer": ("layer", "layers"),
    "attention": ("the attention of layer", "the attention of layers"),
    "cross": ("the cross-attention of layer", "the cross-attention of layers"),
    "mlp": ("the MLP of layer", "the MLPs of layers"),
    "conv": ("the convolutions of layer", "the convolutions of layers"),
    "convolution": ("convolution", "convolutions"),
}
"""Singular and plural name by kind of block."""

_BECOME = {
    "depth": "become one, which runs once",
    "share": "share one set of weight matrices",
    "basis": "combine one shared basis of {rank} vectors",
}


def _fused(edit: Fuse) -> str:
    residuals = f", with residuals of rank {edit.rank}" if edit.mode == "share" and edit.rank else ""
    return f"{_BECOME[edit.mode].format(rank=edit.rank)}{residuals} ({operator_of(edit)})"


def _linear(edit: Linearize) -> str:
    maps = "one linear map" if edit.rank is None else f"two linear maps of rank {edit.rank}"
    sum_too = ", which includes the residual sum after it" if edit.fold else ""
    return f"becomes {maps}{sum_too}"


def _merged(edit: MergeConvs) -> str | None:
    if not edit.keep:
        return "removed"
    if len(edit.layers) == 1:
        return None  # its batch norm is folded
    return f"become one, made of {', '.join(map(str, edit.keep))}{'' if edit.merged else ', not merged yet'}"


_WORDS: dict[type, Callable[[Any], str | None]] = {
    Fuse: _fused,
    Drop: lambda _: "dropped",
    Linearize: _linear,
    Blend: lambda _: "its activation becomes a line in training",
    MergeConvs: _merged,
}
"""Change of the blocks in words, by the type of the edit; None where only batch norms are folded."""


def name_of(edit: Edit) -> str:
    """One edit in a few words, to tell it from others of the same search, which have its mode."""
    become = _SHORT[type(edit)](edit)
    return f"{blocks(edit.kind, edit.layers)} {become}"


_SHORT: dict[type, Callable[[Any], str]] = {
    Fuse: lambda edit: f"({operator_of(edit)})",
    Drop: lambda _: "dropped",
    Linearize: lambda _: "made linear",
    Blend: lambda _: "made linear in training",
    MergeConvs: lambda edit: f"merged from {', '.join(map(str, edit.keep))}" if edit.keep else "removed",
}


def in_brief(plan: Plan) -> list[str]:
    """The plan in a few words, the main change first: its depth where that changes, and the number of edits by type."""
    counts = Counter(name for edit in plan.edits if (name := _COUNTED[type(edit)](edit)))
    said = [f"{count} {names[count > 1]}" for names, count in counts.items()]
    merged = sum(len(edit.layers) - bool(edit.keep) for edit in plan.edits if isinstance(edit, MergeConvs))
    after, unit = len(plan.layout().slots) - merged, "convolutions" if merged else "layers"
    depth = [f"{plan.num_layers} to {after} {unit}"] if after != plan.num_layers else []
    return [*depth, *said] or ["nothing changed"]


_FUSED = {
    "depth": ("group of {} fused", "groups of {} fused"),
    "share": ("group of {} shares its weights", "groups of {} share their weights"),
    "basis": ("group of {} shares a basis", "groups of {} share a basis"),
}

_PLURAL = {
    "layer": "layers",
    "attention": "attention blocks",
    "cross": "cross-attention blocks",
    "mlp": "MLPs",
    "conv": "convolutions",
}


def _merged_count(edit: MergeConvs) -> tuple[str, str] | None:
    if not edit.keep:
        return "convolution removed", "convolutions removed"
    return ("run of convolutions merged", "runs of convolutions merged") if len(edit.layers) > 1 else None


_COUNTED: dict[type, Callable[[Any], tuple[str, str] | None]] = {
    Fuse: lambda edit: tuple(name.format(_PLURAL[edit.kind]) for name in _FUSED[edit.mode]),
    Drop: lambda _: ("block dropped", "blocks dropped"),
    Linearize: lambda _: ("MLP made linear", "MLPs made linear"),
    Blend: lambda _: ("MLP to be made linear", "MLPs to be made linear"),
    MergeConvs: _merged_count,
}
"""Singular and plural by the type of the edit, to count edits; None where only batch norms are folded."""


def change_table(plan: Plan) -> list[list[str]]:
    """Blocks and their changes as rows of text, header first."""
    pairs = [[blocks[0].upper() + blocks[1:], become] for blocks, become in changes(plan)]
    edited = sum(len(edit.layers) * (len(plan.kinds) if edit.kind == "layer" else 1) for edit in plan.edits)
    if edited < plan.num_layers * len(plan.kinds):
        pairs.append(["All others", "unchanged"])
    elif len(pairs) < len(plan.edits):  # the other edits have one convolution each
        pairs.append(["All others", "batch norms folded"])
    return [["in the original", "in the result"], *pairs]
