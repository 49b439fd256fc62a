"""Recompute one row of every results file with the code of its benchmark, and compare it with the file.

    python benchmarks/check.py [FILE ...] [--threads 2]

Data and checkpoints come from LAYERFUSE_DATA (default ../shared). Trainings take too long to repeat: for trained
models, this recomputes the original, or the fused model before its training. Files of another device are skipped. Times
are compared as ratios of models that take turns: leave the machine otherwise idle. Exits with 1 if a figure differs by
more than the tolerance of its kind.
"""

import argparse
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import architectures
import collapse
import common
import example
import fusion
import fusion_cost
import latency
import merge
import retraining
import startup
import throughput
import torch

import recipes
from hf_layerfuse.pipeline.report.tables import text_table
from hf_layerfuse.pipeline.results import RunResults

TOLERANCES = {"quality": 3e-3, "count": 0.0, "ratio of times": 0.25}
"""Largest relative difference of a figure, by its kind.

Quality may differ in the last bits of float32, or in two of the 872 sentences of SST-2. The speed of a machine varies.
"""


class Figure(NamedTuple):
    """One figure of a results file, and its recomputed value."""

    row: str
    kind: str
    stored: float
    found: float

    @property
    def agrees(self) -> bool:
        return math.isclose(self.stored, self.found, rel_tol=TOLERANCES[self.kind])


class Skipped(Exception):
    """A file cannot be checked on this machine; the message says why."""


Check = Callable[[Any], Iterator[Figure]]
"""Function of the contents of a results file that recomputes one of its rows."""


def _fusion(results: Any) -> Iterator[Figure]:
    """The best result of the engine on half of the layers of MiniLM, by the search of the lower effort."""
    job = common.JOBS["minilm-sst2"]()
    make = dict(fusion.depth_methods(job, 3))["ours: refit (low)"]
    found, stored = fusion.measure(job, make), results["minilm-sst2"]["3 layers"]["ours: refit (low)"]
    yield from _quality("MiniLM, 3 layers, ours: refit (low)", stored, found)


def _example(results: Any) -> Iterator[Figure]:
    """Size and quality that the first example of the README prints."""
    both = [
        dict(re.findall(r"^(\S[a-z ]*?)  +[\d,.]+ +([\d,.]+)", text, flags=re.MULTILINE))
        for text in (results["output"], example.output(results["code"]))
    ]
    for label, kind in (("parameters", "count"), ("cosine to the original", "quality")):
        yield Figure(f"example: {label}", kind, *(float(found[label].replace(",", "")) for found in both))


def _quality(row: str, stored: Any, found: Any) -> Iterator[Figure]:
    """Every metric, and the number of parameters, that the stored row has."""
    for metric in ("accuracy", "cross_entropy", "token_perplexity", "cosine"):
        if metric in stored:
            yield Figure(f"{row}: {metric.replace('_', ' ')}", "quality", stored[metric], found[metric])
    if "parameters" in stored and "parameters" in found:
        yield Figure(f"{row}: parameters", "count", stored["parameters"], found["parameters"])


def _fusion_cost(results: Any) -> Iterator[Figure]:
    """A search of the lower effort, in forward passes that are timed before and after it."""
    found = fusion_cost.row(4, 256, 128, "low", torch.get_num_threads())
    same = ("layers", "width", "tokens", "effort")
    [stored] = [row for row in results["time"] if all(row[name] == found[name] for name in same)]
    yield Figure("low effort, 4 layers: forward passes", "ratio of times", stored["forwards"], found["forwards"])


def _heal(results: Any) -> Iterator[Figure]:
    job = retraining.JOBS["gpt2"]()
    model, _ = retraining.searched(job.base, job.base.model, job.targets["depth 50%"], effort=job.effort)
    stored = results["gpt2"]["models"]["depth 50%"]["ours"]["before"]
    yield from _quality("GPT-2, depth 50%, ours, before training", stored, job.base.score(model.eval()))


def _sweep(results: Any) -> Iterator[Figure]:
    """A model that only the sweep has; the others are those of heal.json."""
    job = common.JOBS["minilm-sst2"]()
    model, _ = retraining.searched(job, job.model, {"keep_layers": 5})
    stored = results["minilm-sst2"]["models"]["5 layers"]["ours"]["before"]
    yield from _quality("MiniLM, 5 layers, before training", stored, job.score(model.eval()))


@cache
def _linear(count: int) -> dict[str, Any]:
    """Quality of MiniLM with linear MLPs, fitted."""
    job = common.JOBS["minilm-sst2"]()
    model, _ = collapse.Collapsing(job).fitted(count)
    return {**job.score(model.eval()), **fusion.parameter_counts(model)}


def _collapse(results: Any) -> Iterator[Figure]:
    yield from _quality("MiniLM, 4 MLPs, fitted", results["minilm-sst2"]["4"]["fitted"], _linear(4))


def _collapse_heal(results: Any) -> Iterator[Figure]:
    stored = results["minilm-sst2"]["models"]["4 MLPs"]["fitted"]["before"]
    yield from _quality("MiniLM, 4 MLPs, fitted, before training", stored, _linear(4))


def _latency(results: Any) -> Iterator[Figure]:
    for row in latency.speed(results["repeats"], ("BERT",)):
        [stored] = [other for other in results["speed"] if (other["model"], other["batch"]) == ("BERT", row["batch"])]
        label = f"BERT, 12 -> 6 layers, batch {row['batch']}: speed-up"
        yield Figure(label, "ratio of times", stored["speedup"], row["speedup"])


def _throughput(results: Any) -> Iterator[Figure]:
    found, stored = throughput.measure("no", steps=10, rounds=2), results[0]
    label = "float32: Trainer's seconds / ours, of 10 steps"
    yield Figure(label, "ratio of times", stored["ratio"], found["ratio"])


def _startup(results: Any) -> Iterator[Figure]:
    """The current checkout; the other one was an earlier release."""
    name = "28 layers, effort low"
    found = startup.scans(common.ROOT, startup.SEARCHES[name])
    yield Figure(f"{name}: scans of the weights", "count", results["searches"][name]["now"]["scans"], found["scans"])


def _merge(results: Any, device: str = "cpu") -> Iterator[Figure]:
    """The original with its batch norms folded: the other models depend on times, which choose the merges."""
    if device == "cuda" and not torch.cuda.is_available():
        raise Skipped("this machine has no GPU")
    job = merge.JOBS["resnet56"]()
    job.base.model.to(device)
    [(_, _, found)] = merge.rows(job, [1.0], ["batch norms folded"])
    stored, label = results["resnet56"]["100%"]["batch norms folded"], "ResNet-56, batch norms folded"
    yield from _quality(label, stored, found)
    shares = (row["ms"] / row["original_ms"] for row in (stored, found))
    yield Figure(f"{label}: share of the time", "ratio of times", *shares)


def _merge_heal(results: Any) -> Iterator[Figure]:
    """The original: its training found nothing better, so its weights are those of the checkpoint."""
    base = retraining.images_base(merge.resnet56_model())
    stored = results["resnet56"]["models"]["original"]["original"]
    assert stored["rounds"][-1]["best_step"] == 0, "the original has been trained: check another row"
    yield from _quality("ResNet-56, original, retrained", stored["after"], base.score(base.model))


def _recipe(name: str, results: Any) -> Iterator[Figure]:
    """The original and the fused model of a run of the recipe without healing."""
    with tempfile.TemporaryDirectory() as folder:
        words = [*recipes.JOBS[name], "--heal.steps", "0", "--evaluate.latency", "false"]
        command = [sys.executable, "fuse.py", *words, "--output_dir", f"{folder}/run"]
        subprocess.run(command, check=True, cwd=common.ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        found = RunResults.load(f"{folder}/run").to_dict()
    for stage, label in (("before", "the original"), ("fused", "fused, before healing")):
        for key in ("parameters", "bytes"):
            yield Figure(f"{label}: {key}", "count", results[stage][key], found[stage][key])
        yield from _quality(label, results[stage]["metrics"], found[stage]["metrics"])


def _architectures(results: Any) -> Iterator[Figure]:
    """The family with a factor in front of the residual sum: its heads, its cells and its refit."""
    name = "granite"
    found, stored = architectures.measured(name), results["families"][name]
    counts = [
        {
            "heads that work": sum(not architectures.refusal(each) for each in row["heads"].values()),
            "searches that work": sum(
                architectures.cell(row, search) == architectures.WORKS for search in architectures.SEARCHES
            ),
            "lines": row["lines"],
        }
        for row in (stored, found)
    ]
    for label in counts[0]:
        yield Figure(f"{name}: {label}", "count", *(each[label] for each in counts))
    after = [row["variants"][name]["after"] for row in (stored, found)]
    yield Figure(f"{name}: calibration loss", "quality", *after)


CHECKS: dict[str, Check] = {
    "fusion": _fusion,
    "fusion_cost": _fusion_cost,
    "heal": _heal,
    "sweep": _sweep,
    "collapse": _collapse,
    "collapse_heal": _collapse_heal,
    "latency": _latency,
    "merge": _merge,
    "merge_cuda": partial(_merge, device="cuda"),
    "merge_heal": _merge_heal,
    "startup": _startup,
    "architectures": _architectures,
    "example": _example,
    "throughput": _throughput,
    **{name: partial(_recipe, name) for name in recipes.JOBS},
}


def checked(name: str) -> list[list[str]]:
    """Rows of the report on one file: what was recomputed, both values, and the verdict."""
    try:
        figures = list(CHECKS[name](common.load(common.RESULTS / f"{name}.json")))
    except Skipped as reason:
        return [[name, f"skipped: {reason}", "", "", "", ""]]
    return [
        [
            name,
            figure.row,
            *(f"{value:,.6g}" for value in (figure.stored, figure.found)),
            f"{TOLERANCES[figure.kind]:.1%} ({figure.kind})",
            "same" if figure.agrees else "DIFFERENT",
        ]
        for figure in figures
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", choices=[*CHECKS, []], help=f"default: all of {', '.join(CHECKS)}")
    parser.add_argument("--threads", type=int, default=2)
    options = common.parsed(parser)
    rows = [["file", "recomputed row", "in the file", "recomputed", "tolerance", "verdict"]]
    for name in options.files or CHECKS:
        torch.manual_seed(0)
        rows += checked(name)
        print(text_table([rows[0], *(row for row in rows if row[0] == name)]) + "\n", flush=True)
    different = [row for row in rows if row[-1] == "DIFFERENT"]
    print(f"{len(rows) - 1} figures, {len(different)} of them different")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
