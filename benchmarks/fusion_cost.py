"""Cost of `fuse` by depth and tokens: forward passes of the original over the calibration data, and memory.

    python benchmarks/fusion_cost.py [--threads 2]

The models are random GPT-2s, because costs depend on shapes alone. Half of their layers are kept. Each row runs in a
process of its own. Memory is anonymous memory, without mapped files such as the states of the tokens. It is the peak of
a search, less the moments and the memory for a forward pass of the original on one batch. Memory has separate runs, in
which glibc returns freed memory (MALLOC_MMAP_THRESHOLD_), because this takes time. The benchmark writes
benchmarks/results/fusion_cost.json, and exits with 1 if a limit is exceeded. Rows that are already in the file are not
measured again. Delete the file to start afresh.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from common import save
from transformers import GPT2Config, GPT2LMHeadModel

from hf_layerfuse import FusionRecipe
from hf_layerfuse.methods.fusion.search import search
from hf_layerfuse.pipeline.report.tables import text_table

RESULT = Path(__file__).resolve().parent / "results" / "fusion_cost.json"
TIMED = [(8, 256, 64), (8, 256, 128), (8, 256, 256), (4, 256, 128), (12, 256, 128)]
WATCHED = [(12, 256, 32), (12, 512, 16)]
"""Numbers of layers, widths, and numbers of windows of 256 tokens."""

EFFORTS = {"low": 6, "medium": 25}
"""Largest cost of each effort, in forward passes."""

ROUNDS = {"low": 3, "medium": 1}
"""Number of timed searches. The speed of a machine varies by a fifth; long searches average this out by themselves."""

MEMORY = 2.5
"""Largest memory of a search, in sizes of the model."""


def measure(layers: int, width: int, windows: int, effort: str) -> dict[str, Any]:
    """Time and memory of one search."""
    torch.manual_seed(0)
    tokens = {"n_positions": 256, "vocab_size": 8192, "bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(n_layer=layers, n_embd=width, n_head=4, **tokens)).eval()
    batches = [{"input_ids": torch.randint(0, 8192, (8, 256))} for _ in range(windows // 8)]

    def forward() -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            for batch in batches:
                model(**batch)
        return time.perf_counter() - start

    def peak(run: Any) -> tuple[Any, int]:
        gc.collect()
        before = _anonymous()
        with _Watch() as watch:
            found = run()
        return found, watch.peak - before

    def searching() -> float:
        start = time.perf_counter()
        search(model, FusionRecipe(keep_layers=layers // 2, effort=effort), batches)
        return time.perf_counter() - start

    forward()
    first, activations = peak(forward)
    seconds, needed = peak(searching)
    # each search is timed between two passes, so that both run at the same speed of the machine
    passes, searches = [first, forward()], [seconds]
    for _ in range(ROUNDS[effort] - 1):
        searches.append(searching())
        passes.append(forward())
    ratios = [2 * s / (before + after) for s, (before, after) in zip(searches, pairwise(passes), strict=True)]
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    # moments in float64 of the hidden units of two MLPs, from which units are selected
    units = 2 * 4 * width + 1
    moments = 8 * (units**2 + units * width + width**2)
    return {
        "layers": layers,
        "width": width,
        "tokens": windows * 256,
        "effort": effort,
        "seconds": searches,
        "forward_seconds": passes,
        "forwards": statistics.median(ratios),
        "model_bytes": size,
        "moments_bytes": moments,
        "forward_bytes": activations,
        "search_bytes": needed,
        "models": (size + needed - activations - moments) / size,
    }


def _anonymous() -> int:
    """Anonymous memory of this process in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


class _Watch:
    """Peak of the anonymous memory inside a `with` block, sampled every 10 ms."""

    def __enter__(self) -> "_Watch":
        self.peak, self.stop = _anonymous(), threading.Event()
        self.thread = threading.Thread(target=self._run)
        self.thread.start()
        return self

    def _run(self) -> None:
        while not self.stop.wait(0.01):
            self.peak = max(self.peak, _anonymous())

    def __exit__(self, *error: object) -> None:
        self.stop.set()
        self.thread.join()


def tables(results: dict[str, list[dict[str, Any]]]) -> list[list[list[str]]]:
    """A table of times and a table of memory, with one row per measurement."""
    shapes = ["effort", "layers", "width", "tokens"]
    shape = lambda row: [str(row[name]) for name in shapes]  # noqa: E731
    times = [[*shape(row), f"{row['forwards']:.1f}", str(EFFORTS[row["effort"]])] for row in results["time"]]
    sizes = [[*shape(row), f"{row['models']:.1f}", str(MEMORY)] for row in results["memory"]]
    head = [[*shapes, "forward passes", "allowed"], [*shapes, "memory / model", "allowed"]]
    return [[head[0], *times], [head[1], *sizes]]


def row(layers: int, width: int, windows: int, effort: str, threads: int, **environment: str) -> dict[str, Any]:
    """The row that `measure` returns in a process of its own."""
    words = ["--threads", threads, "--row", layers, width, windows, effort]
    command = [sys.executable, __file__, *map(str, words)]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment})
    measured = json.loads(found.stdout.splitlines()[-1])
    print(measured, flush=True)
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--row", nargs=4, metavar=("LAYERS", "WIDTH", "WINDOWS", "EFFORT"), help="measure one row, print JSON"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.row:
        print(json.dumps(measure(*map(int, options.row[:3]), options.row[3])))
        return
    results = json.loads(RESULT.read_text()) if RESULT.is_file() else {"time": [], "memory": []}
    given_back = {"MALLOC_MMAP_THRESHOLD_": "1000000"}
    for effort in EFFORTS:
        for kind, shapes, environment in (("time", TIMED, {}), ("memory", WATCHED, given_back)):
            known = [
                (found["layers"], found["width"], found["tokens"] // 256, found["effort"]) for found in results[kind]
            ]
            for shape in shapes:
                if (*shape, effort) not in known:
                    results[kind].append(row(*shape, effort, options.threads, **environment))
                    save(results, RESULT)
    print("\n\n".join(map(text_table, tables(results))))
    slow = [found for found in results["time"] if found["forwards"] > EFFORTS[found["effort"]]]
    large = [found for found in results["memory"] if found["models"] > MEMORY]
    if slow or large:
        sys.exit(f"limits exceeded: {len(slow)} times and {len(large)} sizes")


if __name__ == "__main__":
    main()
