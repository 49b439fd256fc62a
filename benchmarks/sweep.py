"""Quality against compression, before and after healing, and the knee of the curve.

    python benchmarks/sweep.py [JOB ...] [--threads 2]

The models, data and budgets are those of benchmarks/heal.py, at every depth. Models that heal.py has trained are not
trained again. The knee is the point where the healed curve is farthest above its chord (Satopaa et al. 2011,
"Kneedle"): removing less gives up compression at little gain in quality, and removing more costs quality faster than
size. The knee is found on validation losses; the curves show test data. The benchmark writes
benchmarks/results/sweep.json and sweep.png.
"""

from functools import partial
from pathlib import Path
from typing import Any

import common
import retraining
from figures import figure, headline, label_of, retrained, title

from hf_layerfuse.math.knee import knee
from hf_layerfuse.pipeline.report.plots import Quality, plot_quality
from hf_layerfuse.pipeline.report.tables import text_table

RESULT = common.RESULTS / "sweep.json"
PLOT = common.RESULTS / "sweep.png"
KEEPS = {"minilm-sst2": (5, 4, 3, 2, 1), "gpt2": (9, 6, 4, 2)}
"""Numbers of layers to keep."""


def run(name: str) -> None:
    """Train all missing models, and save after each."""
    job = retraining.JOBS[name]()
    before = retraining.current(job, common.load(common.RESULTS / "heal.json").get(name, {}))
    known = retraining.save(job, RESULT, {"chosen": before["chosen"]})
    names = {asked["keep_layers"]: target for target, asked in job.targets.items() if "keep_layers" in asked}
    todo = [("original", {}, "original", 1, retraining.untouched)]
    todo += [
        (
            names.get(keep, f"{keep} layers"),
            {"keep_layers": keep},
            "ours",
            1,
            partial(retraining.searched, job.base, effort=job.effort),
        )
        for keep in KEEPS[name]
    ]
    for target, asked, method, *rest in todo:
        trained = before["models"].get(target, {})
        if method in trained:
            known = retraining.save(job, RESULT, {"models": {target: {method: trained[method]}}})
        for news in retraining.measure(job, known, target, asked, method, *rest):
            retraining.save(job, RESULT, news)


def curve(known: dict[str, Any]) -> tuple[list[dict[str, Any]], list[float], int]:
    """Models from large to small, the share of block parameters removed from each, and the index of the knee."""
    rows = [row for models in known["models"].values() for row in models.values()]
    models = sorted(rows, key=lambda row: -row["non_embedding_parameters"])
    whole = models[0]["non_embedding_parameters"]
    removed = [1 - row["non_embedding_parameters"] / whole for row in models]
    losses = [min(loss for _, loss in row["rounds"][-1]["validation_loss"]) for row in models]
    return models, removed, knee(removed, losses)


def table(results: dict[str, Any]) -> list[list[str]]:
    """One row per model."""
    found = [["model", "block parameters removed", "metric", "before training", "healed", ""]]
    for name, known in results.items():
        metric = headline(name)
        models, removed, best = curve(known)
        for place, row in enumerate(models):
            healed = retrained(row["after"], metric, row["rounds"][-1]["best_step"])
            figures = [figure(row["before"], metric), healed, "knee" if place == best else ""]
            named = title(name, models[0]["parameters"])
            found.append([named, f"{removed[place]:.0%}", metric.replace("_", " "), *figures])
    return found


def plot(results: dict[str, Any], path: Path) -> None:
    """Plot two curves and the knee of each checkpoint."""
    panels = []
    for name, known in results.items():
        metric = headline(name)
        models, removed, best = curve(known)
        curves = {
            label: [row[stage][metric] for row in models] for stage, label in (("before", "fused"), ("after", "healed"))
        }
        label, log = label_of(name), "perplexity" in metric
        panels.append(Quality(label, metric.replace("_", " "), removed, curves, best, log=log))
    plot_quality(panels, path)


def main() -> None:
    parser = common.command_line(__doc__, KEEPS)
    parser.add_argument(
        "--draw", action="store_true", help="make the table and the picture from existing results, without training"
    )
    options = common.parsed(parser)
    for name in () if options.draw else options.jobs or KEEPS:
        run(name)
    results = common.load(RESULT)
    print(text_table(table(results)))
    plot(results, PLOT)


if __name__ == "__main__":
    main()
