"""The model card of a run."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from huggingface_hub import EvalResult, ModelCard

from ...methods import method_of
from ...plan import Plan
from ...recipe import Recipe
from ...recipe.tasks import TASKS
from ..results import RunResults
from .portable import PLACEHOLDER, is_local, portable
from .sections import changes, document, front_matter, introduction, limits, losses, measured, pictures, use
from .tables import METRIC_NAMES, in_short, limitations_of, measured_on, name_of, recipe_text, rows


def run_card(
    recipe: Recipe,
    plan: Plan,
    results: RunResults,
    *,
    drawn: Mapping[str, str] | None = None,
    licence: Mapping[str, str] | None = None,
    beside: Collection[str] = (),
    test_data: str | None = None,
) -> ModelCard:
    """Write the model card of a run: the changes to the layers, the results, the limits, and the recipe.

    Args:
        recipe: Recipe of the run.
        plan: Plan that was carried out.
        results: Results of the run.
        drawn: Captions by the name of the file beside the card.
        licence: Licence of the original, from `licence_of`; the result has the same.
        beside: Names of all other files beside the card.
        test_data: Name of the data of the results, where they are local files.

    Returns:
        The card, with the metrics of the last stage as `model-index` if the data are on the Hub.
    """
    method, licence, shown = method_of(recipe), licence or {}, portable(recipe)
    task, original = TASKS[recipe.task], name_of(recipe)
    dataset, split = measured_on(recipe, results)
    on_hub = recipe.data.name is not None and not is_local(recipe.data.name)
    fields = {}
    if on_hub:  # a model-index needs a data set of the Hub
        fields = {
            "datasets": [dataset],
            "model_name": f"{original}, {method.done}",
            "eval_results": _evaluations(recipe, results),
        }
    source = recipe.hub.push_to_hub or f"{PLACEHOLDER}{shown.output_dir}"
    environment = ", ".join(f"{key} {value}" for key, value in results.environment.items())
    return document(
        front_matter(method, recipe.model, task.pipeline, licence, beside, **fields),
        introduction(original, method, plan, in_short(results)),
        measured(f"{dataset if on_hub else test_data or 'local data'} ({split})", rows(results)),
        changes(plan),
        _timed(plan),
        losses(plan),
        pictures(drawn or {}),
        use(plan, task.auto_class, source, revision=recipe.hub.revision, with_code=recipe.with_code),
        limits(limitations_of(plan, results), original, licence),
        _how(shown, results),
        [f"Seed {recipe.seed}; {environment}.", *_records(beside)],
    )


def _evaluations(recipe: Recipe, results: RunResults) -> list[EvalResult]:
    dataset, split = measured_on(recipe, results)
    metrics = results.last.metrics
    return [
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


def _how(recipe: Recipe, results: RunResults) -> list[str]:
    """Command and recipe that anyone can run."""
    text, processes = recipe_text(recipe), int(results.environment.get("processes", 1))
    replaced = f", replace each `{PLACEHOLDER}...` with your own file or folder" if PLACEHOLDER in text else ""
    command = "hf-layerfuse run recipe.yaml"
    if processes > 1:
        command = f"accelerate launch --num_processes {processes} -m hf_layerfuse recipe.yaml"
    return [
        "## How it was made",
        "",
        f"To repeat the run, save the recipe below as `recipe.yaml`{replaced}, and run:",
        "",
        "```bash",
        command,
        "```",
        "",
        "<details><summary>Full recipe</summary>",
        "",
        "```yaml",
        text,
        "```",
        "",
        "</details>",
        "",
    ]


def _records(beside: Collection[str]) -> list[str]:
    """Sentence about the records of a run beside its card."""
    names = [f"`{name}`" for name in ("plan.json", "results.json") if name in beside]
    return ["", f"All decisions and results are beside this card, in {' and '.join(names)}."] if names else []
