"""What `fuse` costs: forward passes of the original over the calibration data, and memory, as depth and tokens grow.

    python benchmarks/fusion_cost.py [--threads 2]

Random GPT-2s of width 256, half of whose layers are kept: costs depend on shapes alone. Every row is a process of its
own, whose anonymous memory is watched; files that are mapped, such as the states of the tokens, are not in it. Writes
benchmarks/results/fusion_cost.json and exits with 1 where a limit is missed.
"""

import argparse
import gc
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from hf_layerfuse import FusionRecipe
from hf_layerfuse.report import text_table
from hf_layerfuse.search import search

RESULT = Path(__file__).resolve().parent / "results" / "fusion_cost.json"
SIZES = [(12, 8), (12, 16), (12, 32), (6, 16), (24, 16)]
"""Layers, and windows of 256 tokens."""

EFFORTS = {"low": 6, "medium": 25}
"""The most forward passes that each may cost."""


def measure(layers: int, windows: int, effort: str) -> dict[str, Any]:
    """Time and memory of one search."""
    torch.manual_seed(0)
    config = GPT2Config(n_layer=layers, n_embd=256, n_head=4, n_positions=256, vocab_size=2048)
    model = GPT2LMHeadModel(config).eval()
    batches = [{"input_ids": torch.randint(0, 2048, (8, 256))} for _ in range(windows // 8)]

    def forward() -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            for batch in batches:
                model(**batch)
        return time.perf_counter() - start

    forward()
    passes = [forward() for _ in range(3)]
    gc.collect()
    before, watch = _anonymous(), _Watch()
    start = time.perf_counter()
    with watch:
        search(model, FusionRecipe(keep_layers=layers // 2, effort=effort), batches)
    seconds = time.perf_counter() - start
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return {
        "layers": layers,
        "tokens": windows * 256,
        "effort": effort,
        "seconds": seconds,
        "forward_seconds": sorted(passes)[1],
        "forwards": seconds / sorted(passes)[1],
        "model_bytes": size,
        "peak_bytes": watch.peak - before + size,
    }


def _anonymous() -> int:
    """Anonymous memory of this process in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


class _Watch:
    """The most anonymous memory inside a `with` block, looked at every 10 ms."""

    def __enter__(self) -> None:
        self.peak, self.stop = 0, threading.Event()
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        while not self.stop.wait(0.01):
            self.peak = max(self.peak, _anonymous())

    def __exit__(self, *error: object) -> None:
        self.stop.set()
        self.thread.join()


def table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """One row a measurement."""
    head = ["layers", "tokens", "effort", "forward passes", "allowed", "peak memory / model"]
    body = [
        [
            str(row["layers"]),
            str(row["tokens"]),
            row["effort"],
            f"{row['forwards']:.1f}",
            str(EFFORTS[row["effort"]]),
            f"{row['peak_bytes'] / row['model_bytes']:.1f}",
        ]
        for row in rows
    ]
    return [head, *body]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--row", nargs=3, metavar=("LAYERS", "WINDOWS", "EFFORT"), help="measure one row, print JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.row:
        layers, windows, effort = options.row
        print(json.dumps(measure(int(layers), int(windows), effort)))
        return
    rows = []
    for effort in EFFORTS:
        for layers, windows in SIZES:
            command = [sys.executable, __file__, "--threads", str(options.threads)]
            command += ["--row", str(layers), str(windows), effort]
            found = subprocess.run(command, check=True, capture_output=True, text=True)
            rows.append(json.loads(found.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
    RESULT.write_text(json.dumps(rows, indent=1) + "\n")
    print("\n" + text_table(table(rows)))
    if any(row["forwards"] > EFFORTS[row["effort"]] for row in rows):
        sys.exit("a cost is above what is allowed")


if __name__ == "__main__":
    main()
