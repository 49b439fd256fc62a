"""Write the tables of the README and of the pages in docs/ from the JSON files of the benchmarks.

python benchmarks/readme.py
"""

import importlib
import re
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType

from hf_layerfuse.pipeline.report.tables import markdown_table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))

_RUNS = {
    "bert-sst2": "MiniLM-L6, SST-2, 6 -> 4 layers, depth",
    "bert-sst2-collapse": "the same, 2 of 6 MLPs linear",
    "gpt2-depth": "GPT-2 (12 x 256), WikiText-2, 12 -> 8 layers, depth",
    "gpt2-share": "the same, share, a third less in the blocks",
}


def recipes() -> list[list[str]]:
    """One row per job: size, speed-up, and quality of the original, the fused and the healed model."""
    table = [
        ["model and task", "metric", "bytes", "speed-up, batch 8", "original", "fused", "healed", "original, retrained"]
    ]
    for name, label in _RUNS.items():
        job = script("recipes").JobResults.load(name)
        before, fused, healed = job.run.before, job.run.fused, job.run.healed
        metric = "accuracy" if "accuracy" in before.metrics else "token_perplexity"
        form = "{:.2%}" if metric == "accuracy" else "{:.1f}"
        table.append(
            [
                label,
                metric.replace("_", " "),
                f"{healed.bytes / before.bytes:.0%}",
                f"{healed.latency[8].speedup:.2f}",
                *(form.format(stage.metrics[metric]) for stage in (before, fused, healed, job.original)),
            ]
        )
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
        "throughput": [throughput.table(speeds)],
    }


_PLACE = re.compile(r"(<!-- table: (.+?) -->\n).*?(<!-- end -->)", flags=re.DOTALL)


def filled(text: str) -> str:
    """A page whose tables are filled from the JSON files."""
    return _PLACE.sub(
        lambda place: place[1] + "\n\n".join(map(markdown_table, tables()[place[2]])) + "\n" + place[3], text
    )


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
