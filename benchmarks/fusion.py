"""Fusion without training: every stage of the engine, compared with the baselines in one run.

    python benchmarks/fusion.py [JOB ...] [--targets "8 layers" ...] [--threads 2]

Data and checkpoints come from LAYERFUSE_DATA (default ../shared). All choices are made on calibration data (training
text) or validation data, and results are reported on test data: WikiText-2 test lines and windows, and SST-2 validation
sentences (the split that is usually reported; choices for SST-2 use rows of train). Rows that are already in
benchmarks/results/fusion.json are not measured again. Delete the file to start afresh. SmolLM2 135M and Gemma 3 270M
are measured if they are asked for; their checkpoints are LAYERFUSE_MODELS/smollm2-135m and LAYERFUSE_MODELS/gemma3-270m
(default outputs/models).
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import common
import matplotlib
from common import JOBS, Job, best_drop, drops
from figures import figure, headline, label_of, title
from transformers import PreTrainedModel

from hf_layerfuse import Fuse, FusionRecipe, Plan, apply
from hf_layerfuse.calibration.recorder import observe
from hf_layerfuse.calibration.refit.refit import refit
from hf_layerfuse.calibration.samples import Sample
from hf_layerfuse.evaluation.metrics import parameter_counts
from hf_layerfuse.math.similarity import Angular
from hf_layerfuse.methods.fusion.grouping import even
from hf_layerfuse.methods.fusion.planner import layer_importances
from hf_layerfuse.methods.fusion.search import search
from hf_layerfuse.models.architectures import architecture_for
from hf_layerfuse.pipeline.report.tables import text_table

RESULT = common.RESULTS / "fusion.json"
PLOT = common.RESULTS / "fusion.png"

MODELS = {**JOBS, "smollm2-135m": common.smollm2, "gemma3-270m": common.gemma3}
"""Checkpoints. Without a choice, those of `JOBS` are measured."""

METHODS = (
    "drop: block influence",
    "drop: angular (UIDL)",
    "drop: best on validation",
    "average",
    "LaCo",
    "ReplaceMe",
    "ours: align",
    "ours: auto, no refit",
    "ours: refit (low)",
    "ours (medium)",
)
"""Methods that are compared on the checkpoints of `JOBS`."""


def groups(job: Job, keep: int, operator: str, align: str = "none") -> Plan:
    depth = job.model.config.num_hidden_layers
    edits = (Fuse("layer", g, operator=operator, align=align) for g in even(depth, keep) if len(g) > 1)
    return Plan(architecture_for(job.model).model_type, depth, tuple(edits))


def angular_run(job: Job, count: int) -> range:
    """The run of `count` layers across which the residual stream turns least (UIDL, Gromov et al. 2024)."""
    measure = Angular()
    architecture = architecture_for(job.model)
    observe(job.model, architecture, job.calibration, {"layer": measure.update})
    turned = measure.distance()
    start = min(range(len(turned) - count), key=lambda i: turned[i, i + count].item())
    return range(start + 1, start + 1 + count)


def depth_methods(job: Job, keep: int) -> Iterator[tuple[str, Callable[[], PreTrainedModel]]]:
    """Name of each method, and the function that makes its model of `keep` layers; baselines first."""
    depth = job.model.config.num_hidden_layers
    made = lambda plan: apply(job.model, plan)  # noqa: E731

    def influence() -> PreTrainedModel:
        order = layer_importances(job.model, Sample.of(job.calibration))
        return made(drops(job, sorted(range(depth), key=order.__getitem__)[: depth - keep]))

    def replace_me() -> PreTrainedModel:
        plan = drops(job, angular_run(job, depth - keep))
        student = made(plan)
        refit(student, job.model, plan, job.calibration, "linear")
        return student

    yield "drop: block influence", influence
    yield "drop: last layers", lambda: made(drops(job, range(keep, depth)))
    yield "drop: angular (UIDL)", lambda: made(drops(job, angular_run(job, depth - keep)))
    yield "drop: best on validation", lambda: made(best_drop(job, keep))
    yield "average", lambda: made(groups(job, keep, "mean"))
    yield "LaCo", lambda: made(groups(job, keep, "telescope"))
    yield "ReplaceMe", replace_me
    ours = partial(searched, job, keep_layers=keep)
    yield "ours: align", partial(ours, operator="mean", align="rotation", refit="none", effort="low")
    yield "ours: auto, no refit", partial(ours, refit="none")
    yield "ours: refit (low)", partial(ours, effort="low")
    yield "ours (medium)", ours


def searched(job: Job, **options: Any) -> PreTrainedModel:
    return search(job.model, FusionRecipe(**options), job.calibration).model


def measure(job: Job, make: Callable[[], PreTrainedModel]) -> dict[str, Any]:
    """Metrics on test data, and numbers of parameters."""
    student = make().eval()
    return {**job.score(student), **parameter_counts(student)}


def run(name: str, results: dict[str, Any], targets: list[str] | None) -> None:
    """Measure all missing rows of a job, or those of some targets, and save after each."""
    job = MODELS[name]()
    rows = results.setdefault(name, {})
    if "original" not in rows:
        rows["original"] = {**job.score(job.model), **parameter_counts(job.model)}
    todo = [
        (f"{keep} layers", method, make)
        for keep in job.keeps
        for method, make in depth_methods(job, keep)
        if method in (job.methods or METHODS)
    ]
    for blocks, rank in job.shares:
        target = f"share, {blocks} blocks"
        sharing = partial(searched, job, keep_layers=blocks, mode="share", effort="low")
        if rank == 0:
            plain = {"operator": "mean", "cluster": "adjacent", "refit": "none"}
            todo.append((target, "average", partial(sharing, **plain)))
        todo.append((target, f"ours (low), rank {rank}", partial(sharing, rank=rank)))
    for target, method, make in todo:
        if targets and target not in targets:
            continue
        if method not in rows.setdefault(target, {}):
            rows[target][method] = measure(job, make)
            print(f"{name}, {target}, {method}: {rows[target][method]}", flush=True)
            common.save(results, RESULT)


def table(results: dict[str, Any], name: str, targets: str) -> list[list[str]]:
    """One row per method, one column per target whose name contains `targets`.

    With shared weights, sizes differ: the share of block parameters that is left follows in brackets.
    """
    rows, metric = results[name], headline(name)
    original = rows["original"]
    columns = sorted((target for target in rows if targets in target), key=_size, reverse=True)
    methods = dict.fromkeys(method for column in columns for method in rows[column])
    named = f"{title(name, original['parameters'])}: {metric.replace('_', ' ')}"
    # the original's cosine to itself is 1
    first = [named if metric == "cosine" else f"{named}; original {figure(original, metric)}", *columns]
    whole = original["non_embedding_parameters"]

    def cell(row: dict[str, Any] | None) -> str:
        if row is None:
            return ""
        size = f" ({row['non_embedding_parameters'] / whole:.0%})" if targets == "share" else ""
        return figure(row, metric) + size

    return [first, *([method, *(cell(rows[column].get(method)) for column in columns)] for method in methods)]


def tables(results: dict[str, Any]) -> list[list[list[str]]]:
    """One table per checkpoint and kind of target."""
    kinds = [(name, kind) for name in results for kind in ("layers", "share")]
    return [table(results, *pair) for pair in kinds if any(pair[1] in target for target in results[pair[0]])]


def _size(target: str) -> int:
    return int("".join(filter(str.isdigit, target)))


def plot(results: dict[str, Any]) -> None:
    """Plot quality against size, with one line per method."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    picture, axes = plt.subplots(1, len(results), figsize=(5 * len(results), 4.2), squeeze=False)
    for axis, (name, rows) in zip(axes[0], results.items(), strict=True):
        metric = headline(name)
        columns = sorted((target for target in rows if "layers" in target), key=_size, reverse=True)
        for i, method in enumerate(dict.fromkeys(m for column in columns for m in rows[column])):
            found = [rows[column][method] for column in columns if method in rows[column]]
            sizes = [row["parameters"] / rows["original"]["parameters"] for row in found]
            style = (
                {"marker": "o", "linewidth": 2.2} if method.startswith("ours") else {"marker": ".", "linestyle": ":"}
            )
            axis.plot(sizes, [row[metric] for row in found], label=method, color=f"C{i}", **style)
        axis.axhline(rows["original"][metric], color="grey", linewidth=0.8)
        axis.set(title=label_of(name), xlabel="share of the parameters", ylabel=metric.replace("_", " "))
        if "perplexity" in metric:
            # without a limit, averages that break the model would compress all other lines into one
            most = 10 * rows["original"][metric]
            axis.set_yscale("log")
            axis.set_ylim(0.95 * rows["original"][metric], most)
            axis.set_ylabel(f"{metric.replace('_', ' ')} (up to {most:.0f})")
    axes[0, -1].legend(fontsize=7)
    picture.tight_layout()
    picture.savefig(PLOT, dpi=130)


def main() -> None:
    parser = common.command_line(__doc__, MODELS)
    parser.add_argument(
        "--targets", nargs="*", help="targets to measure, such as '8 layers' or 'share, 6 blocks'; default: all"
    )
    options = common.parsed(parser)
    results = common.load(RESULT)
    for name in options.jobs or JOBS:
        run(name, results, options.targets)
    for rows in tables(results):
        print("\n" + text_table(rows))
    plot(results)


if __name__ == "__main__":
    main()
