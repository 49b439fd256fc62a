"""Write the tables of the README from the JSON files of the benchmarks.

python benchmarks/readme.py
"""

import importlib
import json
import re
import sys
from pathlib import Path
from types import ModuleType

from hf_layerfuse.report import markdown_table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

_RUNS = {
    "bert-sst2": "MiniLM-L6, SST-2, 6 -> 4 layers, depth",
    "gpt2-depth": "GPT-2 (12 x 256), WikiText-2, 12 -> 8 layers, depth",
    "gpt2-share": "the same, share, a third less in the blocks",
}


def recipes() -> list[list[str]]:
    """One row a job: size and speed against the original, and quality before, after fusing and after healing."""
    table = [
        ["model and task", "metric", "bytes", "speed-up, batch 8", "original", "fused", "healed", "original, retrained"]
    ]
    for name, label in _RUNS.items():
        results = json.loads((RESULTS / f"{name}.json").read_text())
        metric = "accuracy" if "accuracy" in results["before"]["metrics"] else "token_perplexity"
        form = "{:.2%}" if metric == "accuracy" else "{:.1f}"
        stages = ("before", "fused", "healed", "original_healed")
        table.append(
            [
                label,
                metric.replace("_", " "),
                f"{results['healed']['bytes'] / results['before']['bytes']:.0%}",
                f"{results['healed']['latency']['8']['speedup']:.2f}",
                *(form.format(results[stage]["metrics"][metric]) for stage in stages),
            ]
        )
    return table


def benchmark(name: str) -> tuple[ModuleType, dict]:
    """Another benchmark, and its results."""
    folder = str(ROOT / "benchmarks")
    if folder not in sys.path:  # they import each other
        sys.path.insert(0, folder)
    return importlib.import_module(name), json.loads((RESULTS / f"{name}.json").read_text())


def filled(text: str) -> str:
    """The README with its tables as the JSON files have them."""
    fusion, fused = benchmark("fusion")
    cost, spent = benchmark("fusion_cost")
    latency, timed = benchmark("latency")
    heal, healed = benchmark("heal")
    collapse, linear = benchmark("collapse")
    merge, merged = benchmark("merge")
    sweep, swept = benchmark("sweep")
    throughput, speeds = benchmark("throughput")
    tables = {
        "recipes": [recipes()],
        "fusion": fusion.tables(fused),
        "cost": cost.tables(spent),
        "latency": latency.tables(timed),
        "heal": heal.tables(healed),
        "collapse": collapse.tables(linear),
        "collapse, retrained": heal.tables(heal.load(collapse.TRAINED)),
        "merge": merge.tables(merged),
        "merge, on a GPU": merge.tables(heal.load(merge.result("cuda"))),
        "merge, retrained": heal.tables(heal.load(merge.result("cpu", trained=True))),
        "sweep": [sweep.table(swept)],
        "throughput": [throughput.table(speeds)],
    }
    for name, made in tables.items():
        block = r"\g<1>" + "\n\n".join(map(markdown_table, made)) + r"\n\g<2>"
        text, count = re.subn(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", block, text, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"README.md has {count} places for the table {name!r}; it needs one.")
    return text


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
