"""Memory of fusing a checkpoint layer by layer, beside fusing the loaded model.

    LAYERFUSE_MODELS=FOLDER python benchmarks/memory.py [JOB ...] [--threads 2]

Each row runs in a process of its own. Memory is its peak of resident memory, mapped files included; disk is the peak of
the temporary files. smollm2-135m needs HuggingFaceTB/SmolLM2-135M in FOLDER. The others are random Llamas of the shape
of larger models, because memory depends on shapes alone: the benchmark writes them layer by layer to outputs/models,
and deletes them in the end. The benchmark writes benchmarks/results/memory.json and a plot of resident memory over
time. Rows that are already in the file are not measured again; delete the file to start afresh.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from accelerate import init_empty_weights
from common import LANGUAGE_MODELS, RESULTS, ROOT, command_line, load, parsed, save, windows
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from hf_layerfuse import AutoFusedModel, fuse, fuse_checkpoint
from hf_layerfuse.pipeline.report.tables import text_table

RESULT = RESULTS / "memory.json"
GIB = 1 << 30

_SHAPE = {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 2048}
SHAPES = {
    "1.5b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 20, "num_attention_heads": 32},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
}

ROWS: dict[str, dict[str, Any]] = {
    "smollm2-135m": {"keep": 24, "windows": 192, "batch": 8, "limit": 2.0},
    "smollm2-135m, loaded": {"keep": 24, "windows": 48, "batch": 8},
    "1.5b": {"keep": 16, "windows": 16, "batch": 4, "limit": 3.0},
    "8b": {"keep": 26, "windows": 8, "batch": 2, "limit": 6.0, "operator": "freeze"},
}
"""Layers to keep, windows of 256 tokens, windows in a batch, and the largest memory in GiB."""


def make(path: Path, shape: dict[str, int], tied: bool) -> None:
    """Write a random Llama in bfloat16, one file for each layer."""
    path.mkdir(parents=True, exist_ok=True)
    with init_empty_weights():
        model = LlamaForCausalLM(LlamaConfig(**_SHAPE, **shape, tie_word_embeddings=tied, dtype="bfloat16"))
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(path)
    generator, files = torch.Generator().manual_seed(0), {}
    for name, weight in model.state_dict().items():
        if not (tied and name == "lm_head.weight"):
            part = name.split(".")[2] if ".layers." in name else name
            files.setdefault(f"model-{part}.safetensors", []).append((name, weight.shape))
    for file, weights in files.items():
        made = {
            name: (torch.ones(shape) if "norm" in name else 0.02 * torch.randn(shape, generator=generator)).bfloat16()
            for name, shape in weights
        }
        save_file(made, path / file, metadata={"format": "pt"})
    places = {name: file for file, weights in files.items() for name, _ in weights}
    (path / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": places}))


class _Watch:
    """Resident memory and temporary files of this process inside a `with` block, sampled twice a second."""

    def __enter__(self) -> "_Watch":
        self.samples: list[tuple[float, float]] = []
        self.disk, self.start, self.stop = 0, time.perf_counter(), threading.Event()
        self.thread = threading.Thread(target=self._run)
        self.thread.start()
        return self

    def _run(self) -> None:
        while not self.stop.wait(0.5):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            resident = pages * resource.getpagesize() / GIB
            self.samples.append((round(time.perf_counter() - self.start, 1), round(resident, 3)))
            self.disk = max(self.disk, sum(map(_size, Path("/proc/self/fd").iterdir())))

    def __exit__(self, *error: object) -> None:
        self.stop.set()
        self.thread.join()


def _size(file: Path) -> int:
    """Number of bytes of an open temporary file; 0 for other files."""
    try:
        return os.stat(file).st_size if os.readlink(file).endswith("(deleted)") else 0
    except OSError:
        return 0


def measure(name: str) -> dict[str, Any]:
    """Memory and time of one row."""
    row, model = ROWS[name], name.partition(",")[0]
    path, output = LANGUAGE_MODELS / model, ROOT / "outputs" / "memory"
    if model in SHAPES:
        generator = torch.Generator().manual_seed(1)
        rows = torch.randint(0, _SHAPE["vocab_size"], (row["windows"], 256), generator=generator)
        batches = [{"input_ids": part} for part in rows.split(row["batch"])]
    else:
        batches = windows(AutoTokenizer.from_pretrained(path), "train", row["windows"], size=row["batch"])
    recipe = {"keep_layers": row["keep"], "effort": "low", "operator": row.get("operator", "auto")}
    shutil.rmtree(output, ignore_errors=True)
    start = time.perf_counter()
    with _Watch() as watch:
        if name.endswith("loaded"):
            report = fuse(AutoFusedModel.from_pretrained(path), **recipe, batches=batches).fusion_report
        else:
            report = fuse_checkpoint(path, output, **recipe, batches=batches, memory=0)
    shutil.rmtree(output, ignore_errors=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "layers": [report.plan.num_layers, row["keep"]],
        "tokens": row["windows"] * 256,
        "weights_bytes": report.bytes[0],
        "peak_bytes": peak,
        "disk_bytes": watch.disk,
        "seconds": time.perf_counter() - start,
        "loss": [report.plan.notes.refit.before, report.plan.notes.refit.after],
        "samples": watch.samples[:: max(1, len(watch.samples) // 200)],
    }


def tables(results: dict[str, Any]) -> list[list[list[str]]]:
    """A table with one row per measurement."""
    head = [
        "model",
        "layers",
        "tokens",
        "weights, GiB",
        "peak memory, GiB",
        "allowed",
        "temporary files, GiB",
        "minutes",
    ]
    rows = [
        [
            name,
            " to ".join(map(str, found["layers"])),
            f"{found['tokens']:,}",
            *(f"{found[key] / GIB:.2f}" for key in ("weights_bytes", "peak_bytes")),
            f"{ROWS[name]['limit']:.0f}" if "limit" in ROWS[name] else "",
            f"{found['disk_bytes'] / GIB:.2f}",
            f"{found['seconds'] / 60:.1f}",
        ]
        for name, found in results.items()
    ]
    return [[head, *rows]]


def plot(results: dict[str, Any], path: Path) -> None:
    figure, axes = plt.subplots(1, len(results), figsize=(4 * len(results), 3), squeeze=False)
    for axis, (name, found) in zip(axes[0], results.items(), strict=True):
        axis.plot([at / 60 for at, _ in found["samples"]], [resident for _, resident in found["samples"]])
        axis.axhline(found["weights_bytes"] / GIB, linestyle=":", color="grey")
        axis.set(title=name, xlabel="minutes", ylabel="resident memory, GiB (dotted: weights)", ylim=(0, None))
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = command_line(__doc__, ROWS)
    parser.add_argument("--row", help="measure one row, print JSON")
    options = parsed(parser)
    if options.row:
        print(json.dumps(measure(options.row)))
        return
    results = load(RESULT)
    for name in options.jobs or ROWS:
        if name in results:
            continue
        if name in SHAPES and not (LANGUAGE_MODELS / name / SAFE_WEIGHTS_INDEX_NAME).exists():
            make(LANGUAGE_MODELS / name, SHAPES[name], tied=name == "1.5b")
        command = [sys.executable, __file__, "--row", name, "--threads", str(options.threads)]
        # freed memory goes back to the system, as from allocators that servers use
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
        found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
        results[name] = json.loads(found.stdout.splitlines()[-1])
        save(results, RESULT)
        if name in SHAPES:
            shutil.rmtree(LANGUAGE_MODELS / name)
    print("\n\n".join(map(text_table, tables(results))))
    plot(results, RESULT.with_suffix(".png"))
    large = [name for name, found in results.items() if found["peak_bytes"] / GIB > ROWS[name].get("limit", 1e9)]
    if large:
        sys.exit(f"limits exceeded: {', '.join(large)}")


if __name__ == "__main__":
    main()
