"""The model card of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .plan import CHAIN, MergeConvs, Plan
from .recipe import Recipe
from .report import METRIC_NAMES, changes, markdown_table, rows, stages
from .tasks import TASKS

_METHODS = {
    "fusion": ("fused", "layer-fusion"),
    "collapse": ("collapsed", "layer-collapse"),
    "merge": ("merged", "layer-merge"),
}
"""Section of a recipe -> what its results are, and the tag of their cards."""

_LICENCE = ("license", "license_name", "license_link")


def licence_of(model: str) -> dict[str, str]:
    """What the card of a model says of its licence; nothing where it has no card, or none that can be read.

    Args:
        model: Hub name, or path of a checkpoint with a `README.md`.
    """
    try:
        data = ModelCard.load(Path(model) / "README.md" if Path(model).exists() else model).data.to_dict()
    except (OSError, ValueError, yaml.YAMLError):  # errors of the Hub are of the operating system to its client
        return {}
    return {name: data[name] for name in _LICENCE if data.get(name)}


def model_card(
    recipe: Recipe,
    plan: Plan,
    results: Mapping[str, Any],
    command: str,
    *,
    pictures: Mapping[str, str] | None = None,
    licence: Mapping[str, str] | None = None,
) -> ModelCard:
    """The card of a run: what became of which layers, the figures, the limits, and how it was made.

    Args:
        recipe: of the run.
        plan: that was carried out.
        results: what `results.json` holds.
        command: what the user typed.
        pictures: name of each file beside the card -> what it shows.
        licence: of the original, as `licence_of` finds it, which is that of the result.
    """
    made, _ = _method(recipe)
    name = _name(recipe)
    environment = ", ".join(f"{key} {value}" for key, value in results["environment"].items())
    data = _front(recipe, results, licence or {})
    body = "\n".join(
        [
            f"# {name}, {made}",
            "",
            f"Made from `{name}` with [hf_layerfuse](https://pypi.org/project/hf-layerfuse/): "
            f"{_in_short(results)}. {_size_of(plan)}",
            "",
            f"## Before and after, on {' ('.join(_measured_on(recipe, results))})",
            "",
            markdown_table(rows(results)),
            "",
            f"## What became of its {plan.num_layers} {'convolutions' if plan.kinds == CHAIN else 'layers'}",
            "",
            markdown_table(_table(plan)),
            "",
            *_timed(plan),
            *(line for file, shows in (pictures or {}).items() for line in (f"![{shows}]({file})", "")),
            "## Use",
            "",
            "```python",
            *_use(recipe, plan),
            "```",
            "",
            "## Limits",
            "",
            *(f"- {limit}" for limit in _limits(plan, results, licence)),
            "",
            "## How it was made",
            "",
            "```bash",
            command,
            "```",
            "",
            "<details><summary>The recipe, all of it</summary>",
            "",
            "```yaml",
            yaml.safe_dump(_plain(recipe), sort_keys=False, allow_unicode=True).rstrip(),
            "```",
            "",
            "</details>",
            "",
            f"Seed {recipe.seed}; {environment}. `plan.json` and `results.json` beside this card hold every decision "
            "and figure.",
        ]
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")


def _method(recipe: Recipe) -> tuple[str, str]:
    return next(words for method, words in _METHODS.items() if getattr(recipe, method) is not None)


def _name(recipe: Recipe) -> str:
    return Path(recipe.model).name if Path(recipe.model).exists() else recipe.model


def _measured_on(recipe: Recipe, results: Mapping[str, Any]) -> tuple[str, str]:
    """Data set and split of the figures."""
    part = results["metrics_on"]
    source = getattr(recipe.data, part) or recipe.data.train  # rows held out of train, where there is no validation
    return (recipe.data.name, source) if recipe.data.name else (Path(source).name, part)


def _front(recipe: Recipe, results: Mapping[str, Any], licence: Mapping[str, str]) -> ModelCardData:
    made, tag = _method(recipe)
    dataset, split = _measured_on(recipe, results)
    metrics = results[stages(results)[-1]]["metrics"]
    evaluations = [
        EvalResult(
            task_type=TASKS[recipe.task].pipeline,
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_config=recipe.data.config,
            dataset_split=split,
            metric_type=metric,
            metric_value=metrics[metric],
        )
        for metric in METRIC_NAMES
        if metric in metrics
    ]
    return ModelCardData(
        base_model=None if Path(recipe.model).exists() else recipe.model,  # the Hub takes repositories only
        datasets=[recipe.data.name] if recipe.data.name else None,
        library_name="transformers",
        pipeline_tag=TASKS[recipe.task].pipeline,
        tags=["hf-layerfuse", tag, "model-compression"],
        model_name=f"{_name(recipe)}, {made}",
        eval_results=evaluations,
        **licence,
    )


def _in_short(results: Mapping[str, Any]) -> str:
    """The result in one sentence, by its share of parameters, its speed, and its first metric."""
    before, after = results["before"], results[stages(results)[-1]]
    said = [f"{after['parameters'] / before['parameters']:.0%} of the parameters"]
    for batch, milliseconds in list((before["latency_ms"] or {}).items())[-1:]:
        said.append(f"{milliseconds / after['latency_ms'][batch]:.2f} times as fast at batch {batch}")
    for metric in [metric for metric in METRIC_NAMES if metric in before["metrics"]][:1]:
        values = (f"{stage['metrics'][metric]:.4g}" for stage in (after, before))
        said.append("{} {} (before: {})".format(METRIC_NAMES[metric], *values))
    return ", ".join(said)


def _size_of(plan: Plan) -> str:
    if plan.layout().is_stock:
        return "It is a stock checkpoint, which Transformers loads as any other."
    return "Its `config.json` holds the plan that shapes it."


def _table(plan: Plan) -> list[list[str]]:
    """Which blocks became which."""
    pairs = [[blocks[0].upper() + blocks[1:], become] for blocks, become in changes(plan)]
    if len({layer for edit in plan.edits for layer in edit.layers}) < plan.num_layers:
        pairs.append(["All others", "as they are"])
    elif any(edit.keep and len(edit.layers) == 1 for edit in plan.edits if isinstance(edit, MergeConvs)):
        pairs.append(["All others", "as they are, with batch norms folded"])
    return [["of the original", "in the result"], *pairs]


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


def _use(recipe: Recipe, plan: Plan) -> list[str]:
    """What loads the result, as Python."""
    auto_class = TASKS[recipe.task].auto_class
    arguments = ['"path/to/this/model"' if recipe.hub.push_to_hub is None else f'"{recipe.hub.push_to_hub}"']
    if recipe.hub.revision is not None:
        arguments.append(f'revision="{recipe.hub.revision}"')
    first = []
    if not plan.layout().is_stock and recipe.with_code:
        arguments.append("trust_remote_code=True")  # runs the code in this repository
    elif not plan.layout().is_stock:
        first = ["import hf_layerfuse  # teaches transformers this kind of checkpoint"]
    call = f"model = {auto_class}.from_pretrained({', '.join(arguments)})"
    code = "  # runs the code in layerfuse/: read it" if "trust_remote_code=True" in arguments else ""
    return [*first, f"from transformers import {auto_class}", "", call + code]


def _limits(plan: Plan, results: Mapping[str, Any], licence: Mapping[str, str] | None) -> list[str]:
    limits = []
    if plan.layout().ties:
        limits.append("Sharing weights makes the file and the memory smaller. It does not make the model faster.")
    if results["before"]["latency_ms"]:
        limits.append("Latency was measured on the machine named below; ratios carry over better than milliseconds.")
    limits.append(
        "Nothing was chosen on the data that are reported here."
        if results["metrics_on"] == "test"
        else "The recipe names no test data: the figures are from those that healing was watched on."
    )
    if "healed" not in results:
        limits.append("It was not retrained after its layers were changed.")
    metrics = results["before"]["metrics"]
    if "stride" in metrics:
        limits.append(f"Perplexity: windows of {metrics['max_length']} tokens, stride {metrics['stride']}.")
    limits.append("What the original gets wrong, and what it is biased in, is not mended, and may be worse.")
    if not licence:
        limits.append("The card of the original states no licence, or could not be read. Its terms hold for this too.")
    return limits


def _plain(recipe: Recipe) -> dict[str, Any]:
    """A recipe as it is in a file: without sections that it has not."""
    return {name: value for name, value in dataclasses.asdict(recipe).items() if value is not None}
