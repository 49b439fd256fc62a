"""Sentences and tables about a run, for the terminal, the model card and the page."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ...plan import Plan
from ...recipe import Recipe
from ...training.heal import HealReport
from ..results import RunResults
from .change import change_of
from .portable import base_name

METRIC_NAMES = {
    "token_perplexity": "perplexity (token)",
    "word_perplexity": "perplexity (word)",
    "accuracy": "accuracy",
    "cross_entropy": "cross-entropy",
    "cosine": "cosine to the original",
}

_COMPARED = ("token_perplexity", "accuracy")
"""Metrics whose change from the original has a row of its own."""


def rows(results: RunResults) -> list[list[str]]:
    """The results of a run as rows of text, header first: one row per metric, one column per stage."""
    before, measured = results.before, results.stages.values()
    # with rounds, the model fused last has been healed before
    fused = "fused in the last round" if len(results.rounds) > 1 else "fused"
    reports = {"healed": results.heal, "original, retrained": results.retrained and results.retrained.report}
    nothing = {name: f"{name} (nothing better found)" for name, report in reports.items() if found_nothing(report)}
    names = {"fused": fused, **nothing}
    table = [["", *(names.get(name, name) for name in results.stages)]]

    def add(label: str, values: list[Any], form: str) -> None:
        table.append([label, *(form.format(value) for value in values)])

    add("parameters", [stage.parameters for stage in measured], "{:,}")
    add("  outside embeddings", [stage.non_embedding_parameters for stage in measured], "{:,}")
    add("bytes on disk", [stage.bytes for stage in measured], "{:,}")
    for batch in before.latency_ms or {}:
        add(f"latency, batch {batch} (ms)", [stage.latency_ms[batch] for stage in measured], "{:.1f}")
        if all(stage.latency for stage in measured):  # release 0.1.0 timed each stage apart
            spreads = [stage.latency[batch].spread_ms for stage in measured]
            add("  distance between quartiles", spreads, "{:.1f}")
    for metric, label in METRIC_NAMES.items():
        if metric in before.metrics:
            add(label, [stage.metrics[metric] for stage in measured], "{:.4g}")
        if all(f"{metric}_interval" in stage.metrics for stage in measured):
            bounds = [stage.metrics[f"{metric}_interval"] for stage in measured]
            table.append(["  95% interval", *(f"{low:.4g} to {high:.4g}" for low, high in bounds)])
        changes = [change_of(metric, before, stage) for stage in list(measured)[1:]]
        if metric in _COMPARED and all(changes):
            table.append(["  change", "", *map(str, changes)])
            if all(change.interval for change in changes):
                table.append(["  95% interval of the change", "", *(change.bounds for change in changes)])
    return table


def found_nothing(report: HealReport | None) -> bool:
    """Whether a training kept the weights that it began with, because no later ones had a lower validation loss."""
    return report is not None and report.best_step == 0 and bool(report.validation_loss)


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


def name_of(recipe: Recipe) -> str:
    """Name of the original: its Hub name, or the name of its folder."""
    return base_name(recipe.model)


def measured_on(recipe: Recipe, results: RunResults) -> tuple[str, str]:
    """Data set and split of the results."""
    part = results.metrics_on
    source = getattr(recipe.data, part) or recipe.data.train  # without a validation split, rows held out of train
    return (recipe.data.name, source) if recipe.data.name else (Path(source).name, part)


def in_short(results: RunResults) -> str:
    """The result in one sentence: its share of parameters, its speed, and its first metric with the 95% interval."""
    before, after = results.before, results.last
    speedups = {batch: latency.speedup for batch, latency in (after.latency or {}).items()}
    sizes = (before.parameters, after.parameters)
    for metric in [metric for metric in METRIC_NAMES if metric in before.metrics][:1]:
        quality = (METRIC_NAMES[metric], before.metrics[metric], after.metrics[metric])
        return summary(sizes, speedups, quality, after.metrics.get(f"{metric}_interval"))
    return summary(sizes, speedups)


def summary(
    parameters: tuple[int, int],
    speedups: Mapping[int, float],
    quality: tuple[str, float, float] | None = None,
    interval: Sequence[float] | None = None,
) -> str:
    """A result in one sentence.

    Args:
        parameters: Number of parameters before and after.
        speedups: Ratios of latencies by batch size, of which the last one is named.
        quality: Name of the metric, and its value before and after.
        interval: 95% interval of the value after.
    """
    said = [f"{parameters[1] / parameters[0]:.0%} of the parameters"]
    said += [f"{in_words(speedup)} at batch {batch}" for batch, speedup in list(speedups.items())[-1:]]
    if quality is not None:
        metric, before, after = quality
        bounds = "" if interval is None else f"95% interval {interval[0]:.4g} to {interval[1]:.4g}; "
        said.append(f"{metric} {after:.4g} ({bounds}before: {before:.4g})")
    return ", ".join(said)


def in_words(speedup: float) -> str:
    """A ratio of latencies in words."""
    return f"{speedup:.2f} times as fast" if speedup >= 1 else f"{1 / speedup:.2f} times slower"


def limitations_of(plan: Plan, results: RunResults) -> list[str]:
    """Limitations that a user of the result should know."""
    data = "The recipe names no test data: the results are on the validation data that healing used."
    if results.metrics_on == "test":
        data = "Nothing was selected on the data of these results."
    training = ["It was not retrained after its layers were changed."]
    if results.healed is not None:
        alone = results.retrained is None and any(metric in results.before.metrics for metric in _COMPARED)
        training = limitations_of_healing([one.report for one in results.rounds], alone=alone)
    metrics, windows = results.before.metrics, []
    if "stride" in metrics:
        windows = [f"Perplexity: windows of {metrics['max_length']} tokens, stride {metrics['stride']}."]
    return [
        *limitations_of_plan(plan, timed=bool(results.before.latency_ms)),
        data,
        *training,
        *windows,
        REMAINING,
    ]


def limitations_of_plan(plan: Plan, *, timed: bool) -> list[str]:
    """Limitations of the shape of a result, and of its latency if it was timed."""
    limitations = []
    if plan.layout().ties:
        limitations.append("Sharing weights makes the file and the memory smaller. It does not make the model faster.")
    if timed:
        limitations.append(
            "Latency was measured on the machine named below. On other machines, expect similar ratios only."
        )
    return limitations


def limitations_of_healing(reports: Sequence[HealReport], *, alone: bool) -> list[str]:
    """Limitations of a healed model.

    Args:
        reports: Report of each round.
        alone: Whether the model is compared with an original that was not trained further.
    """
    if len(reports) == 1 and found_nothing(reports[0]):
        return [
            "Healing found nothing better: it did not lower the validation loss, so the weights from before it were "
            "kept."
        ]
    fair = "The model was healed, so a fair comparison is with an original after the same training."
    return [fair] if alone else []


REMAINING = "Errors and biases of the original remain, and may be worse."
"""Limitation of every result."""


def recipe_text(recipe: Recipe) -> str:
    """A recipe as a YAML file, with every field."""
    sections = {name: value for name, value in dataclasses.asdict(recipe).items() if value is not None}
    return yaml.safe_dump(sections, sort_keys=False, allow_unicode=True).rstrip()
