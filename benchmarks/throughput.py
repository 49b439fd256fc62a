"""Speed of the healing loop and of `transformers.Trainer`, with the same model, batches, optimiser and precision.

    python benchmarks/throughput.py [--threads 2] [--steps 40]

The loss is cross-entropy alone, because the Trainer has no teacher. The two loops take turns several times, in both
orders, in one process. The result is the ratio of the medians. The benchmark writes benchmarks/results/throughput.json,
and exits with 1 if the ratio is below 0.95.
"""

import argparse
import copy
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState
from common import save
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from hf_layerfuse import HealRecipe, heal
from hf_layerfuse.pipeline.report.tables import text_table

RESULT = Path(__file__).resolve().parent / "results" / "throughput.json"
LEAST = 0.95
BATCH, LENGTH = 8, 128


def rows() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(3, 8192, (256, LENGTH), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


def ours(model: GPT2LMHeadModel, steps: int, precision: str) -> float:
    recipe = HealRecipe(steps=steps, kl_weight=0.0, mixed_precision=precision, learning_rate=1e-4)
    loader = DataLoader(rows(), BATCH, shuffle=True, drop_last=True)
    start = time.perf_counter()
    heal(model, loader, recipe)
    return time.perf_counter() - start


def trainers(model: GPT2LMHeadModel, steps: int, precision: str) -> float:
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=1e-4,
            weight_decay=0.01,
            lr_scheduler_type="cosine",
            warmup_steps=round(0.1 * steps),
            bf16=precision == "bf16",
            use_cpu=not torch.cuda.is_available(),
            report_to="none",
            save_strategy="no",
            logging_steps=steps,
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=rows())
        start = time.perf_counter()
        trainer.train()
        return time.perf_counter() - start


def measure(precision: str, steps: int, rounds: int) -> dict[str, Any]:
    """Seconds of both loops, run in turn, in both orders."""
    torch.manual_seed(0)
    tokens = {"n_positions": LENGTH, "vocab_size": 8192, "bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(n_layer=6, n_embd=256, n_head=4, **tokens))
    found: dict[str, list[float]] = {"ours": [], "Trainer": []}
    runs = {"ours": ours, "Trainer": trainers}
    for turn in range(rounds + 1):
        for name in sorted(runs, reverse=turn % 2 == 1):
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
            seconds = runs[name](copy.deepcopy(model), steps, precision)
            if turn:  # the first round warms up
                found[name].append(seconds)
    medians = {name: statistics.median(values) for name, values in found.items()}
    return {
        "precision": precision,
        "steps": steps,
        "seconds": found,
        "tokens_per_second": {name: steps * BATCH * LENGTH / value for name, value in medians.items()},
        "ratio": medians["Trainer"] / medians["ours"],
    }


def table(results: list[dict[str, Any]]) -> list[list[str]]:
    """One row per precision."""
    found = [["GPT-2 (6 x 256), 8 x 128 tokens", "Trainer (tokens/s)", "ours (tokens/s)", "ratio"]]
    for row in results:
        speeds = [f"{row['tokens_per_second'][name]:,.0f}" for name in ("Trainer", "ours")]
        found.append([row["precision"], *speeds, f"{row['ratio']:.2f}"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = [measure(precision, options.steps, options.rounds) for precision in ("no", "bf16")]
    save(results, RESULT)
    print(text_table(table(results)))
    slow = [row for row in results if row["ratio"] < LEAST]
    if slow:
        sys.exit(f"below {LEAST} of the Trainer's speed in {', '.join(row['precision'] for row in slow)}")


if __name__ == "__main__":
    main()
