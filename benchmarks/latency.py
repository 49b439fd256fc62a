"""Speed-up of fused layers and linear MLPs, and loading time of `AutoFusedModel`.

    python benchmarks/latency.py [--repeats 30] [--threads 2]

Speed: a model of 12 layers, the same model fused to 6, and the same model without layers (embeddings, final norm and
head) are timed in turn, in one run. If only the number of layers mattered, 6 of 12 layers would take
t0 + (t12 - t0) / 2; `of ideal` is the measured speed-up divided by this ideal one.

Collapse: an MLP and the linear map that replaces it are timed in turn by themselves. Then the model with 6 of 12 linear
MLPs and the original are timed in turn. The prediction times the MLPs inside the original, and assumes that a linear
MLP takes less time in proportion to its operations. `of predicted` is the measured speed-up divided by the predicted
one.

Loading: the stock class and `AutoFusedModel` read one file in turn.

Weights are random, because they do not change the time. The benchmark writes benchmarks/results/latency.json, prints
tables, and exits with 1 if a limit is missed.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
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

from hf_layerfuse import AutoFusedModel, Linearize, Plan, apply, architecture_for, fuse
from hf_layerfuse.evaluation.latency import latency_side_by_side
from hf_layerfuse.pipeline.report.tables import text_table

RESULTS = Path(__file__).parent / "results" / "latency.json"

OF_IDEAL, LOADING = 0.95, 1.15  # limits on an otherwise idle machine
LINEAR_MLP, OF_PREDICTED = 6, 0.05  # least speed-up of an MLP of four times the width; largest error of the prediction
TOKENS = 128

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
    """The model with an empty list of layers."""
    architecture = architecture_for(model)
    model.set_submodule(architecture.layers_path(model), nn.ModuleList())
    return model


def speed(repeats: int, names: Iterable[str] = MODELS) -> list[dict]:
    """One row per architecture and batch size."""
    rows = []
    for name in names:
        torch.manual_seed(0)
        head, config = MODELS[name]
        model = head(config)
        models = {
            "original": model,
            "fused": fuse(model, keep_layers=6, check=False),
            "no layers": without_layers(head(config)),
        }
        timed = latency_side_by_side(models, sequence_length=TOKENS, repeats=repeats)
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


def collapsing(repeats: int) -> list[dict]:
    """One row per architecture and batch size: an MLP and its linear map, and a model with six of them."""
    rows, layers = [], range(3, 9)
    for name, (head, config) in MODELS.items():
        torch.manual_seed(0)
        model = head(config).eval()
        kind = config.model_type
        small = apply(model, Plan(kind, 12, tuple(map(Linearize, layers)))).eval()
        parts = {"mlp": mlp_of(model, 5), "map": mlp_of(small, 5)}
        left = matrices_of(small, 5) / matrices_of(model, 5)  # share of the operations: one per entry and token
        with mlps_timed(model, layers) as inside:
            timed = latency_side_by_side({"original": model, "linear": small}, sequence_length=TOKENS, repeats=repeats)
        for batch, whole in timed["original"].items():
            tokens = whole["input_shape"][1] if len(whole["input_shape"]) == 2 else (112 // 16) ** 2 + 1
            mlp, linear = calls_side_by_side(parts, torch.randn(batch, tokens, config.hidden_size), repeats)
            found = whole["median_ms"] / timed["linear"][batch]["median_ms"]
            mlps = len(layers) * statistics.median(inside[batch * tokens])
            predicted = whole["median_ms"] / (whole["median_ms"] - (1 - left) * mlps)
            rows.append(
                {
                    "model": name,
                    "batch": batch,
                    "gated": kind == "llama",
                    "mlp_ms": mlp,
                    "map_ms": linear,
                    "mlp_speedup": mlp / linear,
                    "original_ms": whole["median_ms"],
                    "six_mlps_ms": mlps,
                    "operations_left": left,
                    "linear_ms": timed["linear"][batch]["median_ms"],
                    "speedup": found,
                    "predicted_speedup": predicted,
                    "of_predicted": found / predicted,
                }
            )
    return rows


@contextmanager
def mlps_timed(model: PreTrainedModel, layers: Iterable[int]) -> Iterator[dict[int, list[float]]]:
    """Milliseconds of each call of these MLPs inside the model, by the number of tokens."""
    architecture, times, started = architecture_for(model), defaultdict(list), []

    def begin(module: nn.Module, args: tuple) -> None:
        if not started:
            started.append(time.perf_counter())

    def end(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        times[output.shape[:-1].numel()].append(1000 * (time.perf_counter() - started.pop()))

    with ExitStack() as hooks:
        for layer in map(architecture.layer_list(model).__getitem__, layers):
            for role in {"gate", "in"} & set(architecture.mlp):
                hooks.callback(layer.get_submodule(architecture.mlp[role]).register_forward_pre_hook(begin).remove)
            hooks.callback(layer.get_submodule(architecture.mlp["out"]).register_forward_hook(end).remove)
        yield times


def matrices_of(model: PreTrainedModel, index: int) -> int:
    """Number of entries in the matrices of a layer's MLP."""
    architecture = architecture_for(model)
    layer = architecture.layer_list(model)[index]
    inside = [layer.get_submodule(path) for role, path in architecture.mlp.items() if role != "norm"]
    return sum(module.weight.numel() for module in inside if hasattr(module, "weight"))


def mlp_of(model: PreTrainedModel, index: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """The MLP of a layer, or the linear map that replaces it, without norm and residual sum."""
    architecture = architecture_for(model)
    layer = architecture.layer_list(model)[index]
    maps = {role: layer.get_submodule(path) for role, path in architecture.mlp.items() if role != "norm"}
    act = layer.get_submodule(architecture.activation)
    if "gate" in maps:
        return lambda x: maps["out"](act(maps["gate"](x)) * maps["in"](x))
    return lambda x: maps["out"](act(maps["in"](x)))


@torch.inference_mode()
def calls_side_by_side(parts: dict[str, Callable], x: torch.Tensor, repeats: int) -> list[float]:
    """Median milliseconds of each function of x, called in turn; the first ten rounds warm up."""
    times: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(10 + 5 * repeats):
        for name, part in parts.items():
            start = time.perf_counter()
            part(x)
            times[name].append(1000 * (time.perf_counter() - start))
    return [statistics.median(values[10:]) for values in times.values()]


def loading(repeats: int) -> dict:
    """Median seconds to load one file by each class, in turn, and the ratio."""
    times: dict[str, list[float]] = {"stock": [], "AutoFusedModel": []}
    with tempfile.TemporaryDirectory() as directory:
        GPT2LMHeadModel(GPT2Config()).save_pretrained(directory)
        size = sum(file.stat().st_size for file in Path(directory).glob("*.safetensors"))
        order = [("stock", GPT2LMHeadModel), ("AutoFusedModel", AutoFusedModel)]
        for _ in range(repeats + 1):
            order.reverse()  # so that neither always finds a warm cache
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
        "sequence_length": TOKENS,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "speed": speed(options.repeats),
        "collapse": collapsing(options.repeats),
        "loading": loading(options.repeats),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    for rows in tables(results):
        print(text_table(rows) + "\n")
    print(f"loading: AutoFusedModel takes {results['loading']['ratio']:.3f} times as long as the stock class")
    slow = [row for row in results["speed"] if row["of_ideal"] < OF_IDEAL]
    # a gated MLP of less than four times the width has fewer operations to save
    slow += [row for row in results["collapse"] if not row["gated"] and row["mlp_speedup"] < LINEAR_MLP]
    slow += [row for row in results["collapse"] if abs(row["of_predicted"] - 1) > OF_PREDICTED]
    if slow or results["loading"]["ratio"] > LOADING:
        sys.exit(
            f"missed a limit: speed-up at least {OF_IDEAL} of the ideal; a linear MLP {LINEAR_MLP} times as fast; the "
            f"model's speed-up within {OF_PREDICTED:.0%} of the prediction; loading time at most {LOADING} times the "
            "stock class's"
        )


def tables(results: dict) -> list[list[list[str]]]:
    """The tables of the pages: fused layers, and linear MLPs."""
    collapse = [
        [
            "6 of 12 MLPs linear",
            "batch",
            "MLP (ms)",
            "map (ms)",
            "MLP speed-up",
            "speed-up",
            "predicted",
            "of predicted",
        ],
        *(
            [
                row["model"],
                str(row["batch"]),
                f"{row['mlp_ms']:.2f}",
                f"{row['map_ms']:.2f}",
                f"{row['mlp_speedup']:.1f}",
                f"{row['speedup']:.2f}",
                f"{row['predicted_speedup']:.2f}",
                f"{row['of_predicted']:.2f}",
            ]
            for row in results["collapse"]
        ),
    ]
    return [_depth(results), collapse]


def _depth(results: dict) -> list[list[str]]:
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
