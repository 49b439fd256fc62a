"""Run the shipped recipes on real checkpoints and data, for the tables of the README.

    python benchmarks/recipes.py [JOB ...] [--threads 2] [--latency]

Data and checkpoints come from LAYERFUSE_DATA (default ../shared). Each job runs `fuse.py` as a user would, once for
each of its healing options, and each run also retrains the untouched original. The fused model and the original each
take the option, and the step, with the lowest validation loss. Jobs that differ only in their method share the
retrained original. Jobs that have a result are skipped, and interrupted ones resume. To run one again, delete
benchmarks/results/JOB.json and outputs/JOB-*. Model cards and their pictures go to model_cards/JOB. `--latency` times
the checkpoints of finished jobs again, for example if the machine was busy before.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import transformers

from hf_layerfuse import AutoFusedModel, Plan
from hf_layerfuse.cli import parse_overrides
from hf_layerfuse.evaluation.latency import latency_side_by_side
from hf_layerfuse.evaluation.whole_file import write_whole
from hf_layerfuse.models.loading import load_checkpoint
from hf_layerfuse.pipeline.report.plots import draw
from hf_layerfuse.pipeline.report.run_card import run_card
from hf_layerfuse.pipeline.report.sections import licence_of
from hf_layerfuse.pipeline.report.tables import rows, text_table
from hf_layerfuse.pipeline.results import RunResults
from hf_layerfuse.pipeline.run_data import against
from hf_layerfuse.recipe import Recipe, load_recipe
from hf_layerfuse.recipe.tasks import TASKS
from hf_layerfuse.training.heal import HealReport

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DATA = Path(os.environ.get("LAYERFUSE_DATA", "../shared"))

_LOCAL = ["--data.name", "null", "--data.config", "null"]
_WIKITEXT = [
    *("recipes/gpt2-wikitext2.yaml", "--model", f"{DATA}/models/gpt2-wikitext2", *_LOCAL),
    *("--data.train", f"{DATA}/data/wikitext2/train.txt.xz"),
    *("--data.validation", f"{DATA}/data/wikitext2/valid.txt.xz"),
    *("--data.test", f"{DATA}/data/wikitext2/test.txt.xz"),
    *("--heal.steps", "150", "--heal.batch_size", "8", "--heal.eval_every", "50"),
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
}
_RATES = {"gpt2": (1e-4, 3e-4), "bert": (2e-5, 5e-5)}
OPTIONS = {
    name: [{"heal.learning_rate": rate, "heal.dropout": 0.0} for rate in _RATES[name.split("-")[0]]] for name in JOBS
}
"""Fields of the healing that each job chooses from."""


@dataclass(frozen=True)
class Choice:
    """One healing option, and the lowest validation losses with it.

    Attributes:
        options: Fields of the recipe.
        healed: Lowest loss of the fused model; the loss before training counts too.
        original: The same of the original.
    """

    options: dict[str, float]
    healed: float
    original: float


@dataclass(frozen=True)
class JobResults:
    """Results of one job.

    Attributes:
        run: The run with the option that was chosen for the fused model, with the best of the retrained originals.
        choices: All options, in order.
    """

    run: RunResults
    choices: list[Choice]

    @classmethod
    def load(cls, name: str) -> "JobResults":
        path = RESULTS / f"{name}.json"
        tree = json.loads(path.read_text())
        return cls(RunResults.from_dict(tree, path), [Choice(**choice) for choice in tree["choices"]])

    def save(self, name: str) -> None:
        tree = self.run.to_dict() | {"choices": [asdict(choice) for choice in self.choices]}
        write_whole(RESULTS / f"{name}.json", json.dumps(tree, indent=1) + "\n")

    @property
    def chosen(self) -> int:
        """Index of the option of the fused model."""
        return min(range(len(self.choices)), key=lambda index: self.choices[index].healed)


def run(name: str, threads: int) -> JobResults:
    """Carry out one job, and take the best option by validation loss."""
    options, first = OPTIONS[name], _first_alike(name)
    runs = [_run(name, index, threads) for index in range(len(options))]
    originals = [RunResults.load(_output(first, index)).retrained for index in range(len(OPTIONS[first]))]
    lowest = {str(option): _lowest(each.report) for option, each in zip(OPTIONS[first], originals, strict=True)}
    choices = [
        Choice(option, _lowest(each.heal), lowest[str(option)]) for option, each in zip(options, runs, strict=True)
    ]
    job = JobResults(runs[0], choices)
    chosen = runs[job.chosen]
    best = min(originals, key=lambda original: _lowest(original.report))
    # one measurement in turn timed the models of a run; the retrained original has the shape of its original
    best = replace(best, measurement=best.measurement.with_latency(chosen.before.latency))
    return replace(job, run=replace(chosen, retrained=best))


def _run(name: str, index: int, threads: int) -> RunResults:
    """The results of one option of a job, run unless they are there."""
    if not (_output(name, index) / "results.json").is_file():
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "ACCELERATE_USE_CPU": "true"}
        words = [*_arguments(name, index), "--evaluate.retrain_original", str(_first_alike(name) == name).lower()]
        subprocess.run([sys.executable, "fuse.py", *words], check=True, cwd=ROOT, env=environment)
    return RunResults.load(_output(name, index))


def _output(name: str, index: int) -> Path:
    return ROOT / "outputs" / f"{name}-{index}"


def _first_alike(name: str) -> str:
    """The first job with the same model, data and healing, which retrains the original for all of them."""
    alike = {other: load_recipe(ROOT / words[0], parse_overrides(words[1:])) for other, words in JOBS.items()}
    same = {other: (each.model, each.data, each.heal, each.seed) for other, each in alike.items()}
    return next(other for other in JOBS if same[other] == same[name])


def _lowest(report: HealReport) -> float:
    return min(loss for _, loss in report.validation_loss)


def _arguments(name: str, index: int) -> list[str]:
    options = [word for field, value in OPTIONS[name][index].items() for word in (f"--{field}", str(value))]
    return [*JOBS[name], *options, "--output_dir", f"outputs/{name}-{index}"]


def _recipe(name: str, index: int) -> Recipe:
    arguments = _arguments(name, index)
    return load_recipe(ROOT / arguments[0], parse_overrides(arguments[1:]))


def time_again(name: str, job: JobResults, threads: int) -> JobResults:
    """The results with new latencies; the original and the result are timed in turn."""
    torch.set_num_threads(threads)
    results, recipe, output = job.run, _recipe(name, job.chosen), ROOT / "outputs" / f"{name}-{job.chosen}"
    original = load_checkpoint(
        recipe.model, auto_class=getattr(transformers, TASKS[recipe.task].auto_class), dtype=torch.float32
    )
    model = AutoFusedModel.from_pretrained(output, dtype=torch.float32)
    timed = latency_side_by_side(
        {"original": original, "fused": model}, sequence_length=recipe.data.max_length, repeats=20
    )
    before, after = (against(timed["original"], timed[each]) for each in timed)  # training changes no shape
    results = replace(
        results,
        before=results.before.with_latency(before),
        fused=results.fused.with_latency(after),
        healed=results.healed.with_latency(after),
        retrained=replace(results.retrained, measurement=results.retrained.measurement.with_latency(before)),
        # the number of threads of the timing, not of the training
        environment={**results.environment, "threads": str(threads)},
    )
    return replace(job, run=results)


def write_card(name: str, job: JobResults) -> None:
    """Write the card of a finished job, with its pictures, as a run does."""
    recipe, folder = _recipe(name, job.chosen), ROOT / "model_cards" / name
    plan = Plan.load(ROOT / "outputs" / f"{name}-{job.chosen}" / "plan.json")
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    drawn, test_data = draw(plan, job.run.heal, folder), "WikiText-2" if recipe.task == "causal-lm" else "SST-2"
    card = run_card(recipe, plan, job.run, drawn=drawn, licence=licence_of(recipe.model), test_data=test_data)
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
            run(name, options.threads).save(name)
            write_card(name, JobResults.load(name))
        if options.latency:
            time_again(name, JobResults.load(name), options.threads).save(name)
            write_card(name, JobResults.load(name))
        print(f"\n{name}\n{text_table(rows(JobResults.load(name).run))}")


if __name__ == "__main__":
    main()
