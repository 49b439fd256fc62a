"""MLPs made linear without training: our fit against dropping them and against W2 W1, in one run.

    python benchmarks/collapse.py [JOB ...] [--threads 2]

Data and checkpoints come from LAYERFUSE_DATA (default ../shared), and are those of the fusion benchmark: which MLPs,
and with what weights, is decided on calibration data (training text), and test data are reported. Every method takes
the MLPs that cost it least when each alone is changed, on the same calibration sequences. A row that is in
benchmarks/results/collapse.json already is not measured again; delete the file to start afresh.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import fusion
import torch
from transformers import PreTrainedModel

from hf_layerfuse import CollapseRecipe, Drop, Plan, apply, search_collapse
from hf_layerfuse.adapters import adapter_for
from hf_layerfuse.calibration import Sample
from hf_layerfuse.evaluate import parameter_counts
from hf_layerfuse.prediction import calibration_loss
from hf_layerfuse.report import text_table

RESULT = fusion.RESULT.with_name("collapse.json")
COUNTS = {"minilm-sst2": (1, 2, 3, 4), "gpt2": (1, 2, 3, 4, 6)}

Made = tuple[PreTrainedModel, list[int]]
"""A model, and the layers whose MLPs were changed."""


def methods(job: fusion.Job) -> Iterator[tuple[str, Callable[[int], Made]]]:
    """Name of each method, and what it makes of a number of MLPs; baselines first."""
    depth, kind = job.model.config.num_hidden_layers, adapter_for(job.model).model_type
    judging = Sample.of(job.calibration).judging

    def without(layers: list[int]) -> PreTrainedModel:
        return apply(job.model, Plan(kind, depth, tuple(Drop("mlp", layer) for layer in sorted(layers))))

    @cache
    def order() -> list[int]:
        return sorted(range(depth), key=lambda layer: calibration_loss(without([layer]), job.model, judging))

    def dropped(count: int) -> Made:
        return without(order()[:count]), sorted(order()[:count])

    def searched(count: int, **options: Any) -> Made:
        found = search_collapse(job.model, CollapseRecipe(count=count, **options), job.calibration)
        return found.model, [edit.layer for edit in found.plan.edits]

    yield "dropped", dropped
    yield "W2 W1", partial(searched, refit="none")
    yield "fitted, deepest first", partial(searched, order="deepest")
    yield "fitted, maps alone", partial(searched, refit="maps")
    yield "fitted", searched


def run(name: str, results: dict[str, Any]) -> None:
    """Measure all rows of a job that are not there yet, and save after each."""
    job = fusion.JOBS[name]()
    rows = results.setdefault(name, {})
    if "original" not in rows:
        depth = job.model.config.num_hidden_layers
        rows["original"] = {**job.score(job.model), **parameter_counts(job.model), "depth": depth}
    for method, make in methods(job):
        for count in COUNTS[name]:
            known = rows.setdefault(str(count), {})
            if method in known:
                continue
            model, layers = make(count)
            known[method] = {**job.score(model.eval()), **parameter_counts(model), "layers": layers}
            print(f"{name}, {count}, {method}: {known[method]}", flush=True)
            fusion.save(results, RESULT)


def table(results: dict[str, Any], name: str) -> list[list[str]]:
    """One row a method, one column a number of linear MLPs; accuracy with the cross-entropy beside it."""
    rows, (metric, form) = results[name], fusion.HEADLINE[name]
    original = rows["original"]

    def cell(row: dict[str, Any]) -> str:
        beside = f" ({row['cross_entropy']:.3f})" if "cross_entropy" in row else ""
        return form.format(row[metric]) + beside

    head = [f"{name}, {metric.replace('_', ' ')}; original {cell(original)}"]
    head += [f"{count} of {original['depth']} MLPs" for count in COUNTS[name]]
    names = dict.fromkeys(method for count in COUNTS[name] for method in rows[str(count)])
    sizes = [rows[str(count)]["fitted"]["non_embedding_parameters"] for count in COUNTS[name]]
    whole = original["non_embedding_parameters"]
    return [
        head,
        ["block parameters", *(f"{size / whole:.0%}" for size in sizes)],
        *([method, *(cell(rows[str(count)][method]) for count in COUNTS[name])] for method in names),
    ]


def tables(results: dict[str, Any]) -> list[list[list[str]]]:
    """A table for each checkpoint."""
    return [table(results, name) for name in results]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("jobs", nargs="*", choices=[*COUNTS, []], help=f"default: all of {', '.join(COUNTS)}")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    results = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    for name in options.jobs or COUNTS:
        run(name, results)
    for rows in tables(results):
        print("\n" + text_table(rows))


if __name__ == "__main__":
    main()
