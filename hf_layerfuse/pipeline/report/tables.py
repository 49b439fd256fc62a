"""Sentences and tables about a run, for the terminal, the model card and the page."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from ...plan import Blend, Drop, Fuse, Linearize, MergeConvs, Plan
from ...recipe import Recipe
from ..results import RunResults

METRIC_NAMES = {
    "token_perplexity": "perplexity (token)",
    "word_perplexity": "perplexity (word)",
    "accuracy": "accuracy",
    "cross_entropy": "cross-entropy",
    "cosine": "cosine to the original",
}


def rows(results: RunResults) -> list[list[str]]:
    """The results of a run as rows of text, header first: one row per metric, one column per stage."""
    before, measured = results.before, results.stages.values()
    # with rounds, the model fused last has been healed before
    fused = "fused in the last round" if len(results.rounds) > 1 else "fused"
    table = [["", *(fused if name == "fused" else name for name in results.stages)]]

    def add(label: str, values: list[Any], form: str) -> None:
        table.append([label, *(form.format(value) for value in values)])

    add("parameters", [stage.parameters for stage in measured], "{:,}")
    add("  outside embeddings", [stage.non_embedding_parameters for stage in measured], "{:,}")
    add("bytes on disk", [stage.bytes for stage in measured], "{:,}")
    for batch in before.latency_ms or {}:
        add(f"latency, batch {batch} (ms)", [stage.latency_ms[batch] for stage in measured], "{:.1f}")
    for metric, label in METRIC_NAMES.items():
        if metric in before.metrics:
            add(label, [stage.metrics[metric] for stage in measured], "{:.4g}")
    return table


def text_table(table: list[list[str]]) -> str:
    """Rows of text as aligned columns, for the terminal."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in table
    )


def markdown_table(table: list[list[str]], *, numbers: bool = True) -> str:
    """Rows of text as a Markdown table; `numbers` aligns all columns but the first to the right."""
    header, *body = table
    rule = ["---", *["---:" if numbers else "---"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *body])


def changes(plan: Plan) -> list[tuple[str, str]]:
    """Blocks of the original and their change, in words: one pair for each edit that changes more than norms."""
    pairs = []
    for edit in plan.edits:
        if become := _WORDS[type(edit)](edit):
            where = f"{_BLOCKS[edit.kind][len(edit.layers) > 1]} {', '.join(map(str, edit.layers))}"
            pairs.append((where, become))
    return pairs


def describe(plan: Plan) -> list[str]:
    """The plan in words, one line per edit."""
    return [f"{blocks}: {become}" for blocks, become in changes(plan)]


_BLOCKS = {
    "layer": ("layer", "layers"),
    "attention": ("the attention of layer", "the attention of layers"),
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


def _how(edit: Fuse) -> str:
    """Operator and alignment of an edit in words."""
    how = edit.operator if edit.keep is None else f"{edit.operator}, layer {edit.keep}"
    return how if edit.align == "none" else f"{how}, aligned by {edit.align}"


def _fused(edit: Fuse) -> str:
    residuals = f", with residuals of rank {edit.rank}" if edit.mode == "share" and edit.rank else ""
    return f"{_BECOME[edit.mode].format(rank=edit.rank)}{residuals} ({_how(edit)})"


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


def name_of(recipe: Recipe) -> str:
    """Name of the original: its Hub name, or the name of its folder."""
    return Path(recipe.model).name if Path(recipe.model).exists() else recipe.model


def measured_on(recipe: Recipe, results: RunResults) -> tuple[str, str]:
    """Data set and split of the results."""
    part = results.metrics_on
    source = getattr(recipe.data, part) or recipe.data.train  # without a validation split, rows held out of train
    return (recipe.data.name, source) if recipe.data.name else (Path(source).name, part)


def in_short(results: RunResults) -> str:
    """The result in one sentence, by its share of parameters, its speed, and its first metric."""
    before, after = results.before, results.last
    said = [f"{after.parameters / before.parameters:.0%} of the parameters"]
    for batch, milliseconds in list((before.latency_ms or {}).items())[-1:]:
        said.append(f"{milliseconds / after.latency_ms[batch]:.2f} times as fast at batch {batch}")
    for metric in [metric for metric in METRIC_NAMES if metric in before.metrics][:1]:
        values = (f"{stage.metrics[metric]:.4g}" for stage in (after, before))
        said.append("{} {} (before: {})".format(METRIC_NAMES[metric], *values))
    return ", ".join(said)


def change_table(plan: Plan) -> list[list[str]]:
    """Blocks and their changes as rows of text, header first."""
    pairs = [[blocks[0].upper() + blocks[1:], become] for blocks, become in changes(plan)]
    edited = sum(len(edit.layers) * (len(plan.kinds) if edit.kind == "layer" else 1) for edit in plan.edits)
    if edited < plan.num_layers * len(plan.kinds):
        pairs.append(["All others", "unchanged"])
    elif len(pairs) < len(plan.edits):  # the other edits have one convolution each
        pairs.append(["All others", "batch norms folded"])
    return [["in the original", "in the result"], *pairs]


def limitations_of(plan: Plan, results: RunResults) -> list[str]:
    """Limitations that a user of the result should know."""
    limitations = []
    if plan.layout().ties:
        limitations.append("Sharing weights makes the file and the memory smaller. It does not make the model faster.")
    if results.before.latency_ms:
        limitations.append(
            "Latency was measured on the machine named below. On other machines, expect similar ratios only."
        )
    limitations.append(
        "Nothing was selected on the data of these results."
        if results.metrics_on == "test"
        else "The recipe names no test data: the results are on the validation data that healing used."
    )
    if results.healed is None:
        limitations.append("It was not retrained after its layers were changed.")
    elif len(results.rounds) == 1 and results.rounds[0].report.best_step == 0:
        limitations.append("Retraining did not lower the validation loss, so the weights from before it were kept.")
    metrics = results.before.metrics
    if "stride" in metrics:
        limitations.append(f"Perplexity: windows of {metrics['max_length']} tokens, stride {metrics['stride']}.")
    limitations.append("Errors and biases of the original remain, and may be worse.")
    return limitations


def recipe_text(recipe: Recipe) -> str:
    """A recipe as a YAML file, with every field."""
    sections = {name: value for name, value in dataclasses.asdict(recipe).items() if value is not None}
    return yaml.safe_dump(sections, sort_keys=False, allow_unicode=True).rstrip()
