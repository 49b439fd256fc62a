"""Time to import the package and to print help, and scans of a model's weights, against another checkout.

    git worktree add /tmp/before 04540d3
    python benchmarks/startup.py --against /tmp/before [--repeats 5]

Each command runs in a process of its own, and the two checkouts take turns. A scan reads all weights of a model to find
NaN and infinite values; the model is a random Llama of 32 layers. Writes benchmarks/results/startup.json.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT, save

from hf_layerfuse.pipeline.report.tables import text_table

SCANS = """
import json, sys, time, warnings
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from hf_layerfuse import fuse

warnings.simplefilter("ignore")
torch.manual_seed(0)
torch.set_num_threads(2)
tokens = {"vocab_size": 128, "max_position_embeddings": 64, "pad_token_id": 0}
heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 32}
model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, **tokens)).eval()
batches = [{"input_ids": torch.randint(1, 128, (2, 16))} for _ in range(4)]
every = len(list(model.parameters()))
scan, read, spent = torch.isfinite, 0, 0.0

def counted(tensor):
    global read, spent
    start = time.perf_counter()
    found = scan(tensor).all()
    read, spent = read + isinstance(tensor, torch.nn.Parameter), spent + time.perf_counter() - start
    return found

torch.isfinite = counted
start = time.perf_counter()
fuse(model, batches=batches, check=False, **json.loads(sys.argv[1]))
print(json.dumps({"scans": read / every, "scan_seconds": spent, "seconds": time.perf_counter() - start}))
"""

SEARCHES = {
    "28 layers, effort low": {"keep_layers": 28, "effort": "low"},
    "28 layers, effort medium": {"keep_layers": 28, "effort": "medium"},
    "80% of the latency, effort low": {"latency_budget": 0.8, "latency_repeats": 1, "effort": "low"},
}


def commands(checkout: Path) -> dict[str, list[str]]:
    """Arguments of Python for each command, by its name."""
    entry = re.search(r'^hf-layerfuse = "(.+):(.+)"$', (checkout / "pyproject.toml").read_text(), re.MULTILINE)
    module, function = entry.groups()
    console = f"import sys; sys.argv = ['hf-layerfuse', '--help']; from {module} import {function}; {function}()"
    return {
        "import hf_layerfuse": ["-c", "import hf_layerfuse"],
        "hf-layerfuse --help": ["-c", console],
        "fuse.py --help": [str(checkout / "fuse.py"), "--help"],
    }


def run(checkout: Path, arguments: list[str]) -> str:
    """Run Python on a checkout, and return its output."""
    quiet = {"PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | quiet,
        cwd=checkout,
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return done.stdout


def scans(checkout: Path, asked: dict[str, Any]) -> dict[str, float]:
    """Scans of the weights per parameter in one search of a checkout, and their seconds."""
    return json.loads(run(checkout, ["-c", SCANS, json.dumps(asked)]))


def seconds(checkouts: dict[str, Path], repeats: int) -> dict[str, dict[str, list[float]]]:
    """Wall-clock seconds of each command in each checkout, in turn. The first round is not counted."""
    found: dict[str, dict[str, list[float]]] = {}
    for turn in range(repeats + 1):
        for version, checkout in checkouts.items():
            for name, arguments in commands(checkout).items():
                start = time.perf_counter()
                run(checkout, arguments)
                if turn:
                    found.setdefault(name, {}).setdefault(version, []).append(time.perf_counter() - start)
    return found


def table(results: dict[str, Any]) -> list[list[str]]:
    """One row for each command and each search."""
    rows = [["", "before", "now", "ratio"]]
    for name, times in results["seconds"].items():
        before, now = (statistics.median(times[version]) for version in ("before", "now"))
        rows.append([f"{name} (s)", f"{before:.2f}", f"{now:.2f}", f"{before / now:.1f}"])
    for name, found in results["searches"].items():
        before, now = found["before"], found["now"]
        rows.append(
            [
                f"scans of the weights, {name}",
                f"{before['scans']:.0f} ({before['scan_seconds']:.2f} of {before['seconds']:.1f} s)",
                f"{now['scans']:.0f} ({now['scan_seconds']:.2f} of {now['seconds']:.1f} s)",
                f"{before['scans'] / now['scans']:.1f}",
            ]
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", type=Path, required=True, help="checkout to compare with")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    checkouts = {"before": options.against.resolve(), "now": ROOT}
    searches = {
        name: {version: scans(path, asked) for version, path in checkouts.items()} for name, asked in SEARCHES.items()
    }
    results = {"seconds": seconds(checkouts, options.repeats), "searches": searches}
    save(results, RESULTS / "startup.json")
    print(text_table(table(results)))


if __name__ == "__main__":
    main()
