"""Fuse and retrain: the original, a dropped, and our fused models on the same budget, in one run.

    python benchmarks/heal.py [JOB ...] [--targets "depth 50%" ...] [--methods ours ...] [--threads 2]

Several jobs can run side by side, each with a part of the threads, and so can targets of one whose original is done.

Data and checkpoints come from LAYERFUSE_DATA (default ../shared). Every model is trained on the same batches, for the
same number of steps, with cross-entropy and the original as teacher; the weights that are kept are those of the least
validation loss. Each method has the rate and losses, of the same few, that do best for it on validation data after a
shorter training. Where there are rounds of fusing and retraining, their steps add up to the same number.

Everything is chosen on training or validation data and reported on test data: WikiText-2 test windows, CIFAR-10 test
images, SST-2 validation sentences (the split that everybody reports; what has to be chosen is chosen on rows of train).
A row that is in benchmarks/results/heal.json already is not measured again; an interrupted training goes on from its
last checkpoint in outputs/heal.
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
    """Name, rounds and step of each model that is retrained, baselines first."""

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
    """Train all models of a job, or those of some targets and methods, that are not there yet, and save after each."""
    job = JOBS[name]()
    every = [(target, asked, *method) for target, asked in job.targets.items() for method in methods(job, asked)]
    for given, there in ((targets, job.targets), (wanted, [row_of(*model[2:4]) for model in every])):
        names = ["original", *dict.fromkeys(there)]
        if unknown := [other for other in given or () if other not in names]:
            raise SystemExit(f"{name} has {', '.join(names)}, and not {', '.join(unknown)}.")
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
    parser.add_argument("--targets", nargs="*", help="only these, such as '3 layers' or 'share 50%%'")
    parser.add_argument("--methods", nargs="*", help="only these, such as ours, or 'ours, 3 rounds'")
    options = common.parsed(parser)
    for name in options.jobs or JOBS:
        run(name, options.targets, options.methods)
    for rows in tables(common.load(RESULT)):
        print("\n" + text_table(rows))


if __name__ == "__main__":
    main()
