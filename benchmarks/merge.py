"""Convolutions merged within a latency budget, against merging without removing any and removing without merging.

    python benchmarks/merge.py [JOB ...] [--threads 2] [--train] [--budgets 0.5 ...] [--methods ours ...]

Data and checkpoints come from LAYERFUSE_DATA (default ../shared). What is merged is decided on 512 training images and
on latencies that are measured here, for each number of threads once (outputs/merge); test images are reported.
Latencies of a model and of the original are measured in turn, on a machine that ought to do nothing else. With
`--train`, models are retrained, and so is the original, on the same budget.

A row that is in benchmarks/results/merge.json, or merge_heal.json, already is not measured again; delete the files to
start afresh.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import fusion
import heal
import torch
from transformers import PreTrainedModel

from hf_layerfuse import HealRecipe, MergeRecipe, Plan, RecipeError, search_merge
from hf_layerfuse.evaluate import parameter_counts
from hf_layerfuse.report import text_table
from hf_layerfuse.search import Found
from hf_layerfuse.timing import interleaved

RESULT, TRAINED = (fusion.RESULT.with_name(name) for name in ("merge.json", "merge_heal.json"))
FOLDER = fusion.ROOT / "outputs" / "merge"
BUDGETS = (0.75, 0.6, 0.5, 0.4)
BATCH = 8
"""Images of a forward pass that is timed."""

METHODS: dict[str, dict[str, Any]] = {
    "activations removed": {"choose": "activations"},
    "convolutions removed": {"choose": "convolutions"},
    "ours, not fitted": {"refit": "none"},
    "ours": {},
}
RETRAINED = {**METHODS, "ours, merged after training": {"method": "open"}}


def resnet56() -> heal.Job:
    """With 800 batches of training, and the answers of the original beside the labels."""
    job = heal.resnet56()
    recipe = HealRecipe(steps=800, batch_size=64, eval_every=200, temperature=4.0, teacher_top_k=10)
    return heal.images("resnet56", job.base.model, recipe, heal.rates(1e-3), pilot=200)


JOBS: dict[str, Callable[[], heal.Job]] = {"resnet56": resnet56}


def searched(job: heal.Job, budget: float, model: PreTrainedModel, options: dict[str, Any]) -> Found:
    folder = FOLDER / f"{job.name}-{torch.get_num_threads()}"
    recipe = MergeRecipe(budget=budget, batch_size=BATCH, max_kernel=5, tables=str(folder), **options)
    return search_merge(model, recipe, job.base.calibration)


def timed(model: PreTrainedModel, original: PreTrainedModel) -> dict[str, Any]:
    """Milliseconds of both for a batch, in turn."""
    images = torch.randn(BATCH, 3, original.config.image_size, original.config.image_size)
    with torch.inference_mode():
        runs = {"ms": partial(model, pixel_values=images), "original_ms": partial(original, pixel_values=images)}
        found = interleaved(runs, model.device, repeats=40, warmup=5)
    return {name: value.median for name, value in found.items()} | {"spread_ms": found["ms"].spread}


def rows(job: heal.Job, budgets: Sequence[float], methods: Sequence[str]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Budget, method and what was measured without any training."""
    original = job.base.model
    for budget in budgets:
        for method in methods:
            start = time.perf_counter()
            try:
                found = searched(job, budget, original, METHODS[method])
            except RecipeError as error:
                yield f"{budget:.0%}", method, {"refused": str(error)}
                continue
            seconds = time.perf_counter() - start
            times = found.plan.notes["latency_ms"]
            model = found.model.eval()
            yield (
                f"{budget:.0%}",
                method,
                {
                    **job.base.score(model),
                    **parameter_counts(model),
                    **timed(model, original),
                    "predicted_ms": times["predicted"],
                    "predicted_share": times["predicted"] / times["original"],
                    "threads": torch.get_num_threads(),
                    "seconds": seconds,
                    "segments": [[e.start, e.end, list(e.keep)] for e in found.plan.edits if len(e.layers) != 1],
                },
            )


def run(name: str, budgets: Sequence[float], methods: Sequence[str]) -> None:
    """Measure all rows of a job that are not there yet, and save after each."""
    job = JOBS[name]()
    known = heal.load(RESULT).get(name, {})
    if "original" not in known:
        known["original"] = {**job.base.score(job.base.model), **parameter_counts(job.base.model)}
    todo = [budget for budget in budgets if any(m not in known.get(f"{budget:.0%}", {}) for m in methods)]
    for budget, method, row in rows(job, todo, methods):
        known.setdefault(budget, {})[method] = row
        print(f"{name}, {budget}, {method}: {row}", flush=True)
        with heal.updated(RESULT) as results:
            results[name] = known


def train(name: str, budgets: Sequence[float], methods: Sequence[str]) -> None:
    """Retrain what is not there yet, and save after each model."""
    job = JOBS[name]()
    targets = {f"{budget:.0%} of the time": {"budget": budget} for budget in budgets}
    job = replace(job, targets=targets, pilots=tuple(targets)[:1])
    known = heal.save(job, TRAINED, {})

    def made(options: dict[str, Any], model: PreTrainedModel, asked: dict[str, Any]) -> tuple[PreTrainedModel, Plan]:
        found = searched(job, asked["budget"], model, options)
        return found.model, found.plan

    models = [("original", {}, "original", 1, heal.untouched)]
    models += [(t, asked, m, 1, partial(made, RETRAINED[m])) for t, asked in targets.items() for m in methods]
    for model in models:
        for news in heal.measure(job, known, *model):
            heal.save(job, TRAINED, news)


def table(results: dict[str, Any], name: str) -> list[list[str]]:
    """One row a budget and method: quality, and time against the original's, predicted and measured."""
    found = results[name]
    original = found["original"]
    made = [[f"{name}, budget", "method", "accuracy", "cross-entropy", "predicted", "measured", "parameters"]]
    made.append(["100%", "original", f"{original['accuracy']:.2%}", f"{original['cross_entropy']:.3f}", *["100%"] * 3])
    for budget, methods in found.items():
        for method, row in methods.items() if budget != "original" else ():
            if "refused" in row:
                made.append([budget, method, *["out of reach", "", "", "", ""]])
                continue
            shares = row["predicted_share"], row["ms"] / row["original_ms"]
            made.append(
                [
                    budget,
                    method,
                    f"{row['accuracy']:.2%}",
                    f"{row['cross_entropy']:.3f}",
                    *(f"{share:.0%}" for share in shares),
                    f"{row['parameters'] / original['parameters']:.0%}",
                ]
            )
    return made


def tables(results: dict[str, Any]) -> list[list[list[str]]]:
    """A table for each checkpoint."""
    return [table(results, name) for name in results]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("jobs", nargs="*", choices=[*JOBS, []], help=f"default: all of {', '.join(JOBS)}")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--train", action="store_true", help="retrain models, and measure nothing without training")
    parser.add_argument("--budgets", nargs="*", type=float, default=BUDGETS)
    parser.add_argument("--methods", nargs="*", help=f"only these of {', '.join(RETRAINED)}")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    for name in options.jobs or JOBS:
        if options.train:
            train(name, options.budgets, options.methods or list(RETRAINED))
        else:
            run(name, options.budgets, options.methods or list(METHODS))
    for made in [*tables(heal.load(RESULT)), *heal.tables(heal.load(TRAINED))]:
        print("\n" + text_table(made))


if __name__ == "__main__":
    main()
