"""Fuse and retrain: the original, a model with dropped layers and our fused models, all on the same budget.

    python benchmarks/heal.py [JOB ...] [--targets "depth 50%" ...] [--methods ours ...] [--threads 2]

Several jobs can run at the same time, each with a part of the threads. Targets of one job can do so too, once its
original is done.

Data and checkpoints come from LAYERFUSE_DATA (default ../shared). All models are trained on the same batches, for the
same number of steps, with cross-entropy and with the original as teacher. The weights with the lowest validation loss
are kept. Each method chooses its learning rate and losses, out of the same few, on validation data after a shorter
training. Several rounds of fusing and retraining share the same number of steps.

All choices are made on training or validation data, and results are reported on test data: WikiText-2 test windows,
CIFAR-10 test images, and SST-2 validation sentences (the split that is usually reported; choices for SST-2 use rows of
train). Rows that are already in benchmarks/results/heal.json are not measured again. An interrupted training resumes
from its last checkpoint in outputs/heal.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import common
from retraining import JOBS, Job, Made, Step, measure, row_of, save, searched, tables, untouched
from transformers import PreTrainedModel

from hf_layerfuse import (
    apply,
)
from hf_layerfuse.pipeline.report.tables import text_table

RESULT = common.RESULTS / "heal.json"


def methods(job: Job, asked: dict[str, Any]) -> Iterator[tuple[str, int, Step]]:
    """Name, number of rounds and fusion step of each model to retrain; baselines first."""

    def dropped(model: PreTrainedModel, asked: dict[str, Any]) -> Made:
        plan = common.best_drop(job.base, asked["keep_layers"])
        return apply(model, plan), plan

    found = partial(searched, job.base, effort=job.effort)
    mean = partial(searched, job.base, operator="mean", cluster="adjacent", refit="none", effort="low")
    if asked.get("mode") != "share":
        yield "drop: best on validation", 1, dropped
        yield "ours, no refit", 1, partial(found, refit="none")
    else:
        yield "shared average", 1, mean
    yield "ours", 1, found
    if job.rounds > 1:
        yield "shared average", job.rounds, mean
        yield "ours", job.rounds, found


def run(name: str, targets: list[str] | None, wanted: list[str] | None) -> None:
    """Train all missing models of a job, or those of some targets and methods, and save after each."""
    job = JOBS[name]()
    every = [(target, asked, *method) for target, asked in job.targets.items() for method in methods(job, asked)]
    for given, there in ((targets, job.targets), (wanted, [row_of(*model[2:4]) for model in every])):
        names = ["original", *dict.fromkeys(there)]
        if unknown := [other for other in given or () if other not in names]:
            raise SystemExit(f"{name} does not have {', '.join(unknown)}: choose from {', '.join(names)}.")
    known = save(job, RESULT, {"models": {target: {} for target in ("original", *job.targets)}})
    todo = [
        model
        for model in every
        if (not targets or model[0] in targets) and (not wanted or row_of(*model[2:4]) in wanted)
    ]
    for model in [("original", {}, "original", 1, untouched), *todo]:
        for news in measure(job, known, *model):
            save(job, RESULT, news)


def main() -> None:
    parser = common.command_line(__doc__, JOBS)
    parser.add_argument(
        "--targets", nargs="*", help="targets to train, such as '3 layers' or 'share 50%%'; default: all"
    )
    parser.add_argument(
        "--methods", nargs="*", help="methods to train, such as ours, or 'ours, 3 rounds'; default: all"
    )
    options = common.parsed(parser)
    for name in options.jobs or JOBS:
        run(name, options.targets, options.methods)
    for rows in tables(common.load(RESULT)):
        print("\n" + text_table(rows))


if __name__ == "__main__":
    main()
