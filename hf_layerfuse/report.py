"""What a run of `fuse.py` tells the user: a table for the terminal and a model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .plan import CHAIN, Blend, Drop, Fuse, Linearize, MergeConvs, Plan
from .recipe import Recipe
from .tasks import TASKS

_METRIC_NAMES = {
    "token_perplexity": "perplexity (token)",
    "word_perplexity": "perplexity (word)",
    "accuracy": "accuracy",
    "cross_entropy": "cross-entropy",
    "cosine": "cosine to the original",
}


def stages(results: dict[str, Any]) -> list[str]:
    """The stages that a run went through, in order."""
    return [stage for stage in ("before", "fused", "healed") if results.get(stage)]


def rows(results: dict[str, Any]) -> list[list[str]]:
    """The figures of a run as rows of text, a header first: one row a figure, one column a stage."""
    names = stages(results)
    # with rounds, what was fused last had been healed before
    table = [["", *("fused in the last round" if name == "fused" and "rounds" in results else name for name in names)]]

    def add(label: str, values: list[Any], form: str) -> None:
        table.append([label, *(form.format(value) for value in values)])

    add("parameters", [results[s]["parameters"] for s in names], "{:,}")
    add("  outside embeddings", [results[s]["non_embedding_parameters"] for s in names], "{:,}")
    add("bytes on disk", [results[s]["bytes"] for s in names], "{:,}")
    for batch in results["before"]["latency_ms"] or {}:
        add(f"latency, batch {batch} (ms)", [results[s]["latency_ms"][batch] for s in names], "{:.1f}")
    for metric, label in _METRIC_NAMES.items():
        if metric in results["before"]["metrics"]:
            add(label, [results[s]["metrics"][metric] for s in names], "{:.4g}")
    return table


def text_table(table: list[list[str]]) -> str:
    """Rows of text in columns, for the terminal."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in table
    )


def markdown_table(table: list[list[str]]) -> str:
    """Rows of text as a Markdown table."""
    header, *body = table
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *body])


def describe(plan: Plan) -> list[str]:
    """The plan in words, one line an edit."""
    lines = []
    for edit in plan.edits:
        what = _BLOCKS[edit.kind]
        where = ", ".join(map(str, edit.layers))
        if isinstance(edit, Drop):
            lines.append(f"{what} {where}: dropped")
        elif isinstance(edit, Linearize):
            maps = "one linear map" if edit.rank is None else f"two linear maps of rank {edit.rank}"
            sum_too = ", which takes in the residual sum behind it" if edit.fold else ""
            lines.append(f"the MLP of layer {where}: becomes {maps}{sum_too}")
        elif isinstance(edit, Blend):
            lines.append(f"the MLP of layer {where}: its activation is on the way to a line")
        elif isinstance(edit, MergeConvs):
            if not edit.keep:
                lines.append(f"convolution {where}: taken out")
            elif len(edit.layers) > 1:  # of all others, batch norms are folded
                kept = ", ".join(map(str, edit.keep))
                lines.append(f"convolutions {where}: become one, made of {kept}{'' if edit.merged else ', open yet'}")
        elif isinstance(edit, Fuse):
            residuals = f", with residuals of rank {edit.rank}" if edit.mode == "share" and edit.rank else ""
            become = _BECOME[edit.mode].format(rank=edit.rank)
            lines.append(f"{what} {where}: {become}{residuals} ({_how(edit)})")
    return lines


_METHODS = {
    "fusion": ("fused", "layer-fusion"),
    "collapse": ("collapsed", "layer-collapse"),
    "merge": ("merged", "layer-merge"),
}
"""Section of a recipe -> what its results are, and the tag of their cards."""

_BLOCKS = {
    "layer": "layers",
    "attention": "the attention of layers",
    "mlp": "the MLPs of layers",
    "conv": "the convolutions of layers",
    "convolution": "convolutions",
}
_BECOME = {
    "depth": "become one, which runs once",
    "share": "share one set of weight matrices",
    "basis": "combine one shared basis of {rank} vectors",
}


def _how(edit: Fuse) -> str:
    """Operator and alignment of an edit in words."""
    how = edit.operator if edit.keep is None else f"{edit.operator}, layer {edit.keep}"
    return how if edit.align == "none" else f"{how}, aligned by {edit.align}"


def _timed(plan: Plan) -> list[str]:
    """What a plan was chosen to take, if it was chosen for that."""
    if "latency_ms" not in plan.notes:
        return []
    times = plan.notes["latency_ms"]
    shares = [f"{times[name] / times['original']:.0%}" for name in ("predicted", "measured")]
    return [
        f"Chosen by what it takes on the machine named below: {shares[0]} of the original's time by the times of its "
        f"parts, and {shares[1]} when it was timed as a whole, before healing.",
        "",
    ]


def _address(recipe: Recipe) -> str:
    """What a result is loaded by, as Python."""
    if recipe.hub.push_to_hub is None:
        return '"path/to/this/model"'
    branch = "" if recipe.hub.revision is None else f', revision="{recipe.hub.revision}"'
    return f'"{recipe.hub.push_to_hub}"{branch}'


def model_card(
    recipe: Recipe, plan: Plan, results: dict[str, Any], command: str, pictures: Mapping[str, str] | None = None
) -> ModelCard:
    """The card of a run: what became of which layers, the figures, the command and the limits.

    Args:
        recipe: of the run.
        plan: that was carried out.
        results: what `results.json` holds.
        command: what the user typed.
        pictures: name of each file beside the card -> what it shows.
    """
    last = stages(results)[-1]
    part = results["metrics_on"]
    source = getattr(recipe.data, part) or recipe.data.train  # rows held out of train, where there is no validation
    dataset = recipe.data.name or Path(source).name
    split = source if recipe.data.name else part
    name = Path(recipe.model).name if Path(recipe.model).exists() else recipe.model
    made, tag = next(words for method, words in _METHODS.items() if getattr(recipe, method) is not None)
    evaluations = [
        EvalResult(
            task_type=TASKS[recipe.task].pipeline,
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_config=recipe.data.config,
            dataset_split=split,
            metric_type=metric,
            metric_value=results[last]["metrics"][metric],
        )
        for metric in _METRIC_NAMES
        if metric in results[last]["metrics"]
    ]
    data = ModelCardData(
        base_model=None if Path(recipe.model).exists() else recipe.model,  # the Hub takes repositories only
        datasets=[recipe.data.name] if recipe.data.name else None,
        library_name="transformers",
        pipeline_tag=TASKS[recipe.task].pipeline,
        tags=["hf-layerfuse", tag, "model-compression"],
        model_name=f"{name}, {made}",
        eval_results=evaluations,
    )
    stock = plan.layout().is_stock
    shares = bool(plan.layout().ties)
    auto_class = TASKS[recipe.task].auto_class
    imports = [f"from transformers import {auto_class}"]
    if not stock:
        imports = ["import hf_layerfuse  # teaches transformers this kind of checkpoint", *imports]
    limits = [
        *(["Sharing weights makes the file and the memory smaller. It does not make the model faster."] * shares),
        "Latency was measured on the machine named below; ratios carry over better than milliseconds.",
        "Nothing was chosen on the data that are reported here."
        if part == "test"
        else "The recipe names no test data: the figures are from those that healing was watched on.",
    ]
    metrics = results["before"]["metrics"]
    if "stride" in metrics:
        limits.append(f"Perplexity: windows of {metrics['max_length']} tokens, stride {metrics['stride']}.")
    environment = ", ".join(f"{key} {value}" for key, value in results["environment"].items())
    body = "\n".join(
        [
            f"# {name}, {made}",
            "",
            f"Made from `{name}` with [hf_layerfuse](https://pypi.org/project/hf-layerfuse/).",
            "",
            f"## Before and after, on {dataset} ({split})",
            "",
            markdown_table(rows(results)),
            "",
            f"## What became of its {plan.num_layers} {'convolutions' if plan.kinds == CHAIN else 'layers'}",
            "",
            *(f"- {line}" for line in describe(plan)),
            "",
            *_timed(plan),
            *(line for file, shows in (pictures or {}).items() for line in (f"![{shows}]({file})", "")),
            "## Use",
            "",
            "```python",
            *imports,
            "",
            f"model = {auto_class}.from_pretrained({_address(recipe)})",
            "```",
            "",
            "## Limits",
            "",
            *(f"- {limit}" for limit in limits),
            "",
            "## How it was made",
            "",
            "```bash",
            command,
            "```",
            "",
            f"Seed {recipe.seed}; {environment}. `plan.json` and `results.json` beside this card hold every decision "
            "and figure.",
        ]
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")
