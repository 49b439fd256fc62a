"""The model card of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ...methods import method_of
from ...models.families import family_of
from ...plan import Plan
from ...plan.words import change_table
from ...recipe import Recipe
from ...recipe.tasks import TASKS
from ..results import RunResults
from .tables import (
    METRIC_NAMES,
    in_short,
    limitations_of,
    markdown_table,
    measured_on,
    name_of,
    recipe_text,
    rows,
)

_LICENCE = ("license", "license_name", "license_link")

_NO_LICENCE = "The card of the original states no licence, or could not be read. Its terms also apply here."


def licence_of(model: str) -> dict[str, str]:
    """Licence of a model, from its card; empty where it has no readable card.

    Args:
        model: Hub name, or path of a checkpoint with a `README.md`.

    Returns:
        The fields among `license`, `license_name` and `license_link` that the card has.
    """
    try:
        data = ModelCard.load(Path(model) / "README.md" if Path(model).exists() else model).data.to_dict()
    except (OSError, ValueError, yaml.YAMLError):  # the Hub client's errors are OSErrors
        return {}
    return {name: data[name] for name in _LICENCE if data.get(name)}


def model_card(
    recipe: Recipe,
    plan: Plan,
    results: RunResults,
    command: str,
    *,
    pictures: Mapping[str, str] | None = None,
    licence: Mapping[str, str] | None = None,
) -> ModelCard:
    """The card of a run: the changes to the layers, the results, the limits, and the recipe.

    Args:
        recipe: Recipe of the run.
        plan: Plan that was carried out.
        results: Results of the run.
        command: Command line of the user.
        pictures: Captions by the name of the file beside the card.
        licence: Licence of the original, from `licence_of`; the result has the same.

    Returns:
        The card, with the metrics of the last stage as `model-index`.
    """
    name = name_of(recipe)
    environment = ", ".join(f"{key} {value}" for key, value in results.environment.items())
    data = _front(recipe, results, licence or {})
    body = "\n".join(
        [
            f"# {name}, {method_of(recipe).done}",
            "",
            f"Made from `{name}` with [hf_layerfuse](https://pypi.org/project/hf-layerfuse/): "
            f"{in_short(results)}. {_size_of(plan)}",
            "",
            f"## Before and after, on {' ('.join(measured_on(recipe, results))})",
            "",
            markdown_table(rows(results)),
            "",
            f"## Changes to its {plan.num_layers} {family_of(plan).units}",
            "",
            markdown_table(change_table(plan), numbers=False),
            "",
            *_timed(plan),
            *(
                line
                for file, shows in (pictures or {}).items()
                for line in (f"![{shows}]({file})", "", f"*{shows}.*", "")
            ),
            "## Use",
            "",
            "```python",
            *_use(recipe, plan),
            "```",
            "",
            "## Limits",
            "",
            *(f"- {limit}" for limit in [*limitations_of(plan, results), *([] if licence else [_NO_LICENCE])]),
            "",
            "## How it was made",
            "",
            "```bash",
            command,
            "```",
            "",
            "<details><summary>Full recipe</summary>",
            "",
            "```yaml",
            recipe_text(recipe),
            "```",
            "",
            "</details>",
            "",
            f"Seed {recipe.seed}; {environment}. `plan.json` and `results.json` beside this card hold all decisions "
            "and results.",
        ]
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")


def _front(recipe: Recipe, results: RunResults, licence: Mapping[str, str]) -> ModelCardData:
    method = method_of(recipe)
    dataset, split = measured_on(recipe, results)
    metrics = results.last.metrics
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
        tags=["hf-layerfuse", method.tag, "model-compression"],
        model_name=f"{name_of(recipe)}, {method.done}",
        eval_results=evaluations,
        **licence,
    )


def _size_of(plan: Plan) -> str:
    if plan.layout().is_stock:
        return "It is a stock checkpoint: Transformers loads it like any other."
    return "Its `config.json` holds the plan."


def _timed(plan: Plan) -> list[str]:
    """Predicted and measured latency, if the plan was chosen by latency."""
    times = plan.notes.latency_ms
    if times is None or times.measured is None:
        return []
    shares = [f"{part / times.original:.0%}" for part in (times.predicted, times.measured)]
    return [
        f"The plan was chosen by latency on the machine named below. The times of its parts predict {shares[0]} of the "
        f"original's time. The whole model was measured at {shares[1]}, before healing.",
        "",
    ]


def _use(recipe: Recipe, plan: Plan) -> list[str]:
    """Python lines that load the result."""
    auto_class = TASKS[recipe.task].auto_class
    arguments = ['"path/to/this/model"' if recipe.hub.push_to_hub is None else f'"{recipe.hub.push_to_hub}"']
    if recipe.hub.revision is not None:
        arguments.append(f'revision="{recipe.hub.revision}"')
    first, note = [], ""
    if not plan.layout().is_stock and recipe.with_code:
        arguments.append("trust_remote_code=True")
        note = "  # runs the code in layerfuse/: read it first"
    elif not plan.layout().is_stock:
        first = ["import hf_layerfuse  # lets transformers load this kind of checkpoint"]
    call = f"model = {auto_class}.from_pretrained({', '.join(arguments)}){note}"
    return [*first, f"from transformers import {auto_class}", "", call]
