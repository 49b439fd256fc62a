"""What depth fusing buys in time, and what loading through `AutoFusedModel` costs.

    python benchmarks/latency.py [--repeats 30] [--threads 2]

Speed: a model of 12 layers, the same fused to 6, and the same without any layer (embeddings, final norm and head) are
timed in turn in one run. Were layers all that counts, 6 of 12 would leave t0 + (t12 - t0) / 2; `of ideal` is the
speed-up that was had over that one. Loading: the stock class and `AutoFusedModel` read one file in turn.

Weights are random: they do not change the time. Writes benchmarks/results/latency.json and prints a table.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

from hf_layerfuse import AutoFusedModel, adapter_for, fuse
from hf_layerfuse.latency import latency_side_by_side
from hf_layerfuse.report import text_table

RESULTS = Path(__file__).parent / "results" / "latency.json"

OF_IDEAL, LOADING = 0.95, 1.15  # what is asked of a quiet machine

MODELS = {
    "GPT-2": (GPT2LMHeadModel, GPT2Config(n_embd=384, n_head=6, n_layer=12, vocab_size=8192)),
    "BERT": (
        BertForSequenceClassification,
        BertConfig(hidden_size=384, num_attention_heads=6, num_hidden_layers=12, intermediate_size=1536),
    ),
    "ViT": (
        ViTForImageClassification,
        ViTConfig(hidden_size=384, num_attention_heads=6, num_hidden_layers=12, intermediate_size=1536, image_size=112),
    ),
    "Llama": (
        LlamaForCausalLM,
        LlamaConfig(
            hidden_size=384,
            num_attention_heads=6,
            num_key_value_heads=2,
            num_hidden_layers=12,
            intermediate_size=1024,
            vocab_size=8192,
        ),
    ),
}


def without_layers(model: PreTrainedModel) -> PreTrainedModel:
    """What is left of a model when its list of layers is empty."""
    adapter = adapter_for(model)
    model.set_submodule(adapter.layers_path(model), nn.ModuleList())
    return model


def speed(repeats: int) -> list[dict]:
    """One row per architecture and batch size."""
    rows = []
    for name, (head, config) in MODELS.items():
        torch.manual_seed(0)
        model = head(config)
        models = {
            "original": model,
            "fused": fuse(model, keep_layers=6, check=False),
            "no layers": without_layers(head(config)),
        }
        timed = latency_side_by_side(models, sequence_length=128, repeats=repeats)
        for batch in timed["original"]:
            whole, half, rest = (timed[which][batch]["median_ms"] for which in models)
            ideal = whole / (rest + (whole - rest) / 2)
            rows.append(
                {
                    "model": name,
                    "batch": batch,
                    "original_ms": whole,
                    "fused_ms": half,
                    "no_layers_ms": rest,
                    "spread_ms": {which: timed[which][batch]["spread_ms"] for which in models},
                    "speedup": whole / half,
                    "ideal_speedup": ideal,
                    "of_ideal": whole / half / ideal,
                }
            )
    return rows


def loading(repeats: int) -> dict:
    """Median seconds to load one file by each class, in turn, and the ratio."""
    times: dict[str, list[float]] = {"stock": [], "AutoFusedModel": []}
    with tempfile.TemporaryDirectory() as directory:
        GPT2LMHeadModel(GPT2Config()).save_pretrained(directory)
        size = sum(file.stat().st_size for file in Path(directory).glob("*.safetensors"))
        order = [("stock", GPT2LMHeadModel), ("AutoFusedModel", AutoFusedModel)]
        for _ in range(repeats + 1):
            order.reverse()  # neither is always the one that runs on a warm cache
            for name, loads in order:
                start = time.perf_counter()
                loads.from_pretrained(directory)
                times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}  # the first one warms the disk
    return {"bytes": size, "seconds": medians, "ratio": medians["AutoFusedModel"] / medians["stock"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.utils.logging.disable_progress_bar()
    results = {
        "machine": platform.machine(),
        "threads": options.threads,
        "repeats": options.repeats,
        "dtype": "float32",
        "sequence_length": 128,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "speed": speed(options.repeats),
        "loading": loading(options.repeats),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(text_table(table(results)))
    print(f"\nloading: AutoFusedModel takes {results['loading']['ratio']:.3f} of the time of the stock class")
    slow = [row for row in results["speed"] if row["of_ideal"] < OF_IDEAL]
    if slow or results["loading"]["ratio"] > LOADING:
        sys.exit(f"missed: speed-up at least {OF_IDEAL} of the ideal, loading at most {LOADING} of the stock class")


def table(results: dict) -> list[list[str]]:
    """The rows that the README shows."""
    return [
        ["12 -> 6 layers", "batch", "original (ms)", "fused (ms)", "speed-up", "ideal", "of ideal"],
        *(
            [
                row["model"],
                str(row["batch"]),
                f"{row['original_ms']:.1f}",
                f"{row['fused_ms']:.1f}",
                f"{row['speedup']:.2f}",
                f"{row['ideal_speedup']:.2f}",
                f"{row['of_ideal']:.2f}",
            ]
            for row in results["speed"]
        ),
    ]


if __name__ == "__main__":
    main()
