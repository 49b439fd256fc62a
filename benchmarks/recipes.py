"""Run the shipped recipes on real checkpoints and data, for the tables of the README.

    python benchmarks/recipes.py [JOB ...] [--threads 2] [--latency]

Data and checkpoints come from LAYERFUSE_DATA (default ../shared). Each job runs `fuse.py` as a user would, then
retrains the untouched original with the same budget, for a fair comparison. Jobs that have a result are skipped. To run
one again, delete benchmarks/results/JOB.json. Model cards and their pictures go to model_cards/JOB. `--latency` times
the checkpoints of finished jobs again, for example if the machine was busy before.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer

from hf_layerfuse import AutoFusedModel, Plan
from hf_layerfuse.cli import parse_overrides
from hf_layerfuse.data.labels import class_names
from hf_layerfuse.data.prepare import loader, prepare, text_of
from hf_layerfuse.data.splits import load_splits
from hf_layerfuse.evaluation import metrics as evaluate
from hf_layerfuse.evaluation.latency import latency_side_by_side
from hf_layerfuse.models.loading import load_checkpoint
from hf_layerfuse.pipeline.report.card import licence_of, model_card
from hf_layerfuse.pipeline.report.plots import draw
from hf_layerfuse.pipeline.report.tables import rows, text_table
from hf_layerfuse.pipeline.results import RunResults
from hf_layerfuse.pipeline.run_data import against
from hf_layerfuse.recipe import Recipe, load_recipe
from hf_layerfuse.recipe.tasks import TASKS
from hf_layerfuse.training.heal import heal

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DATA = Path(os.environ.get("LAYERFUSE_DATA", "../shared"))

_LOCAL = ["--data.name", "null", "--data.config", "null"]
_WIKITEXT = [
    *("recipes/gpt2-wikitext2.yaml", "--model", f"{DATA}/models/gpt2-wikitext2", *_LOCAL),
    *("--data.train", f"{DATA}/data/wikitext2/train.txt.xz"),
    *("--data.validation", f"{DATA}/data/wikitext2/valid.txt.xz"),
    *("--data.test", f"{DATA}/data/wikitext2/test.txt.xz"),
    *("--heal.steps", "200", "--heal.batch_size", "8", "--heal.learning_rate", "3e-4"),
]
_SST2 = [
    *("--model", f"{DATA}/models/minilm-l6-sst2", *_LOCAL),
    *("--data.train", f"{DATA}/data/sst2/train.tsv.xz", "--data.test", f"{DATA}/data/sst2/dev.tsv"),
    *("--heal.steps", "300"),
]
JOBS = {
    "bert-sst2": ["recipes/bert-sst2.yaml", *_SST2, "--fusion.keep_layers", "4"],
    "bert-sst2-collapse": ["recipes/collapse-bert-sst2.yaml", *_SST2, "--collapse.count", "2"],
    "gpt2-depth": _WIKITEXT,
    "gpt2-share": [*_WIKITEXT, "--fusion.mode", "share", "--fusion.ratio", "0.33", "--fusion.rank", "auto"],
}


@dataclass(frozen=True)
class Retraining:
    """Retrained original.

    Attributes:
        metrics: Metrics on test data.
        seconds: Seconds of its training.
        best_step: Step whose weights were kept; None in results that kept the last one.
    """

    metrics: dict[str, Any]
    seconds: float
    best_step: int | None = None


@dataclass(frozen=True)
class JobResults:
    """Results of one job: its run, and the retrained original."""

    run: RunResults
    original: Retraining

    @classmethod
    def load(cls, name: str) -> "JobResults":
        path = RESULTS / f"{name}.json"
        tree = json.loads(path.read_text())
        return cls(RunResults.from_dict(tree, path), Retraining(**tree["original_healed"]))

    def save(self, name: str) -> None:
        tree = self.run.to_dict() | {"original_healed": asdict(self.original)}
        (RESULTS / f"{name}.json").write_text(json.dumps(tree, indent=1) + "\n")


def run(name: str, threads: int) -> JobResults:
    """Carry out one job and retrain the original."""
    output, arguments = ROOT / "outputs" / name, _arguments(name)
    if not (output / "results.json").is_file():
        launch = ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        launch += ["--num_cpu_threads_per_process", str(threads)]
        command = [sys.executable, "-m", "accelerate.commands.launch", *launch, "fuse.py", *arguments]
        subprocess.run(command, check=True, cwd=ROOT)
    results = RunResults.load(output)
    return JobResults(results, _known_retraining(results.recipe) or retrain_original(_recipe(name), threads))


def _arguments(name: str) -> list[str]:
    return [*JOBS[name], "--output_dir", f"outputs/{name}"]


def _recipe(name: str) -> Recipe:
    arguments = _arguments(name)
    return load_recipe(ROOT / arguments[0], parse_overrides(arguments[1:]))


def _known_retraining(recipe: Mapping[str, Any]) -> Retraining | None:
    """The retrained original of a finished job that differs only in its method; None if there is no such job."""
    for name in sorted(JOBS):
        if (RESULTS / f"{name}.json").is_file():
            other = JobResults.load(name)
            if all(other.run.recipe[key] == recipe[key] for key in ("model", "data", "heal", "seed")):
                return other.original
    return None


def retrain_original(recipe: Recipe, threads: int) -> Retraining:
    """Heal the original with the batches, steps and losses of the fused model, and measure it."""
    torch.set_num_threads(threads)
    data, task = recipe.data, recipe.task
    model = load_checkpoint(recipe.model, auto_class=getattr(transformers, TASKS[task].auto_class), dtype=torch.float32)
    teacher = load_checkpoint(
        recipe.model, auto_class=getattr(transformers, TASKS[task].auto_class), dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(recipe.model)
    classes = class_names(model.config) if task == "text-classification" else None
    splits = load_splits(data, task, recipe.seed, classes=classes)
    train = prepare(splits["train"], tokenizer, data, task, training=True)
    batches = loader(train, tokenizer, recipe.heal.batch_size, shuffle=True, seed=recipe.seed, task=task)
    size = recipe.evaluate.batch_size
    held_out = prepare(splits["validation"], tokenizer, data, task, training=False)
    validation = loader(held_out, tokenizer, size, shuffle=False, seed=0, task=task)
    # both keep the step of the lowest validation loss, step 0 included
    report = heal(model, batches, recipe.heal, teacher=teacher, seed=recipe.seed, validation_batches=validation)
    if task == "causal-lm":
        metrics = evaluate.perplexity(
            model, tokenizer, text_of(splits["test"], data), max_length=data.max_length, batch_size=size
        )
    else:
        test = prepare(splits["test"], tokenizer, data, task, training=False)
        metrics = evaluate.classification(model, loader(test, tokenizer, size, shuffle=False, seed=0, task=task))
    return Retraining(metrics, report.seconds, report.best_step)


def time_again(name: str, results: RunResults, threads: int) -> RunResults:
    """The results with new latencies; the original and the result are timed in turn."""
    torch.set_num_threads(threads)
    recipe, output = _recipe(name), ROOT / "outputs" / name
    original = load_checkpoint(
        recipe.model, auto_class=getattr(transformers, TASKS[recipe.task].auto_class), dtype=torch.float32
    )
    model = AutoFusedModel.from_pretrained(output, dtype=torch.float32)
    models = {"before": original, "fused": model, "healed": model}  # healing changes no shape
    timed = latency_side_by_side(models, sequence_length=recipe.data.max_length, repeats=20)
    stages = {}
    for stage, figures in results.stages.items():
        latency = against(timed["before"], timed[stage])
        times = {batch: row.median_ms for batch, row in latency.items()}
        stages[stage] = replace(figures, latency_ms=times, latency=latency)
    # the number of threads of the timing, not of the training
    return replace(results, **stages, environment={**results.environment, "threads": str(threads)})


def write_card(name: str, results: RunResults) -> None:
    """Write the card of a finished job, with its pictures, as a run does."""
    recipe, plan, folder = _recipe(name), Plan.load(ROOT / "outputs" / name / "plan.json"), ROOT / "model_cards" / name
    folder.mkdir(exist_ok=True)
    command = shlex.join(["accelerate", "launch", "fuse.py", *_arguments(name)])
    pictures = draw(plan, results.heal, folder)
    card = model_card(recipe, plan, results, command, pictures=pictures, licence=licence_of(recipe.model))
    card.save(folder / "README.md")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("jobs", nargs="*", choices=[*JOBS, []], help=f"default: all of {', '.join(JOBS)}")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--latency", action="store_true", help="time the checkpoints of finished jobs again")
    options = parser.parse_args()
    os.chdir(ROOT)
    RESULTS.mkdir(exist_ok=True)
    for name in options.jobs or JOBS:
        if not (RESULTS / f"{name}.json").is_file():
            results = run(name, options.threads)
            results.save(name)
            write_card(name, results.run)
        results = JobResults.load(name)
        if options.latency:
            results = replace(results, run=time_again(name, results.run, options.threads))
            results.save(name)
            write_card(name, results.run)
        print(f"\n{name}\n{text_table(rows(results.run))}")


if __name__ == "__main__":
    main()
