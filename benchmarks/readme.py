"""Write the tables of the README and of the pages in docs/ from the JSON files of the benchmarks.

python benchmarks/readme.py
"""

import importlib
import re
import sys
import textwrap
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType

from hf_layerfuse.pipeline.report.tables import markdown_table
from hf_layerfuse.pipeline.results import RunResults

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))

_RUNS = {
    "bert-sst2": ("minilm-sst2", "layers fused: 6 -> 4"),
    "bert-sst2-collapse": ("minilm-sst2", "2 of 6 MLPs linear"),
    "gpt2-depth": ("gpt2", "layers fused: 12 -> 8"),
}
"""Checkpoint and change of each job of the recipe benchmark."""


def recipes() -> list[list[str]]:
    """One row per job: size, speed-up, and quality of the original and the fused model before and after training."""
    figures = script("figures")
    stages = ("original", "original, retrained", "fused", "healed")
    table = [["what was done", "model, data and metric", "bytes", "speed-up, batch 8", *stages]]
    for name, (checkpoint, done) in _RUNS.items():
        run = RunResults.from_dict(results(name), RESULTS / f"{name}.json")
        metric = figures.headline(checkpoint)
        named = f"{figures.title(checkpoint, run.before.parameters)}: {metric.replace('_', ' ')}"
        size, speed = f"{run.healed.bytes / run.before.bytes:.0%}", f"{run.healed.latency[8].speedup:.2f}"
        before, fused = (figures.figure(stage.metrics, metric) for stage in (run.before, run.fused))
        after = [(run.retrained.measurement, run.retrained.report), (run.healed, run.heal)]
        original, healed = (figures.retrained(stage.metrics, metric, report.best_step) for stage, report in after)
        table.append([done, named, size, speed, before, original, fused, healed])
    return table


def script(name: str) -> ModuleType:
    """The module of another file in this folder."""
    folder = str(ROOT / "benchmarks")
    if folder not in sys.path:  # they import each other
        sys.path.insert(0, folder)
    return importlib.import_module(name)


def benchmark(name: str) -> tuple[ModuleType, dict]:
    """Another benchmark, and its results."""
    return script(name), results(name)


def results(name: str) -> dict:
    """The results in a file of `benchmarks/results`; an empty dict if the file does not exist."""
    return script("common").load(RESULTS / f"{name}.json")


Table = list[list[str]]

_HEADLINES = {
    "layers fused: 12 -> 6": ("heal", "gpt2", "depth 50%", "ours"),
    "layers fused: 6 -> 3": ("heal", "minilm-sst2", "3 layers", "ours"),
    "weights shared by all layers, with residuals": ("heal", "gpt2", "share 70%", "ours"),
    "6 of 12 MLPs linear": ("collapse", "gpt2", "6 MLPs", "fitted"),
    "convolutions merged to 60% of the time": ("merge", "resnet56", "60% of the time", "ours, segments trained"),
}
"""Benchmark, checkpoint, target and method of each row, by its label."""


def headlines(trained: dict[str, list[Table]]) -> Table:
    """One row per kind of edit: quality before and after retraining, beside the original's."""
    names = script("figures").MODELS
    stages = ("original", "original, retrained", "fused", "fused, retrained")
    rows = [["what was done", "model, data and metric", "block parameters", *stages]]
    for done, (name, model, label, method) in _HEADLINES.items():
        table = next(table for table in trained[name] if table[0][0].startswith(f"{names[model]}, "))
        original = next(row for row in table if row[1] == "original")
        row = next(row for row in table if row[:2] == [label, method])
        rows.append([done, table[0][0], row[2], *original[3:5], *row[3:5]])
    return rows


_PEERS = {
    "ours (effort low)": "ours: refit (low)",
    "ReplaceMe (Shopkhoev et al., 2025)": "ReplaceMe",
    "LaCo (Yang et al., 2024)": "LaCo",
    "layers dropped: the best subset on validation data": "drop: best on validation",
    "layers dropped: UIDL (Gromov et al., 2024)": "drop: angular (UIDL)",
    "layers dropped: ShortGPT (Men et al., 2024)": "drop: block influence",
    "layers averaged": "average",
}
"""Method of the fusion benchmark, by its label."""

_HALVED = {"gpt2": ("6 layers", "12 -> 6"), "minilm-sst2": ("3 layers", "6 -> 3"), "minilm": ("3 layers", "6 -> 3")}
"""Target and change of each checkpoint of the fusion benchmark."""


def peers(fused: dict) -> Table:
    """One row per method, the original first: quality with half of the layers, without training."""
    figures = script("figures")
    table = [
        [
            "",
            *(
                f"{figures.title(name, fused[name]['original']['parameters'])}: {change} layers"
                for name, (_, change) in _HALVED.items()
            ),
        ]
    ]
    for label, method in {"the original": None, **_PEERS}.items():
        row = [label]
        for name, (target, _) in _HALVED.items():
            measured = fused[name][target][method] if method else fused[name]["original"]
            metric = figures.headline(name)
            row.append(f"{metric.replace('_', ' ')} {figures.figure(measured, metric)}")
        table.append(row)
    return table


def of(methods: Sequence[str], tables: list[Table]) -> list[Table]:
    """The rows of some methods. The second column has the method."""
    return [[table[0], *(row for row in table[1:] if row[1] in methods)] for table in tables]


@cache
def tables() -> dict[str, list[Table]]:
    """All tables that a page may have, by the name in its marker."""
    fusion, fused = benchmark("fusion")
    cost, spent = benchmark("fusion_cost")
    latency, timed = benchmark("latency")
    retraining, healed = script("retraining"), results("heal")
    collapse, linear = benchmark("collapse")
    merge, merged = benchmark("merge")
    sweep, swept = benchmark("sweep")
    architectures, known = benchmark("architectures")
    throughput, speeds = benchmark("throughput")
    trained = {
        "heal": retraining.tables(healed),
        "collapse": retraining.tables(script("common").load(collapse.TRAINED)),
        "merge": retraining.tables(script("common").load(merge.result("cpu", trained=True))),
    }
    budgets = of(("original", "batch norms folded", "ours"), merge.tables(merged))
    images = [any(row[1] == "batch norms folded" for row in table) for table in budgets]
    return {
        "headlines": [headlines(trained)],
        "recipes": [recipes()],
        "peers": [peers(fused)],
        "fusion": fusion.tables(fused),
        "fusion, in short": of(("original", "ours", "ours, 3 rounds"), trained["heal"]),
        "cost": cost.tables(spent),
        "latency": latency.tables(timed),
        "latency budget, in short": [table for table, image in zip(budgets, images, strict=True) if not image],
        "heal": trained["heal"],
        "collapse": collapse.tables(linear),
        "collapse, retrained": trained["collapse"],
        "collapse, in short": of(("original", "fitted", "homotopy"), trained["collapse"]),
        "merge": merge.tables(merged),
        "merge, in short": [table for table, image in zip(budgets, images, strict=True) if image],
        "merge, on a GPU": merge.tables(script("common").load(merge.result("cuda"))),
        "merge, retrained": trained["merge"],
        "sweep": [sweep.table(swept)],
        "architectures": [architectures.table(known)],
        "architectures, refused": [architectures.refusals(known)],
        "throughput": [throughput.table(speeds)],
    }


_OF_WORDS = ("architectures", "architectures, refused")
"""Tables whose cells are words, which are aligned to the left."""

_OUTPUT = re.compile(r"(<!-- output: (.+?) -->\n).*?(<!-- end -->)", flags=re.DOTALL)
_SENTENCE = re.compile(r"(<!-- sentence: (.+?) -->\n).*?(<!-- end -->)", flags=re.DOTALL)
_PLACE = re.compile(r"(<!-- table: (.+?) -->\n).*?(<!-- end -->)", flags=re.DOTALL)


def summary(name: str) -> str:
    """The counts of a benchmark in words, wrapped as the pages are."""
    module, found = benchmark(name)
    return textwrap.fill(module.summary(found), 128)


def shown(name: str) -> list[str]:
    """The tables of a name in Markdown."""
    return [markdown_table(table, numbers=name not in _OF_WORDS) for table in tables()[name]]


def filled(text: str) -> str:
    """A page whose tables, sentences and outputs are filled from the JSON files."""
    text = _SENTENCE.sub(lambda place: f"{place[1]}{summary(place[2])}\n{place[3]}", text)
    text = _OUTPUT.sub(
        lambda place: f"{place[1]}```text\n{results(place[2])['output'].rstrip()}\n```\n{place[3]}", text
    )
    return _PLACE.sub(lambda place: place[1] + "\n\n".join(shown(place[2])) + "\n" + place[3], text)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
