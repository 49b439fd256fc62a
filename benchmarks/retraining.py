"""Jobs, training, result files and tables for retraining fused models and the original with the same budget."""

import contextlib
import copy
import fcntl
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from cifar_resnet import cifar10, published
from datasets import Dataset
from figures import difference, figure, headline, title
from figures import retrained as healed
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, PreTrainedModel

from hf_layerfuse import (
    AutoFusedModel,
    Blend,
    FusionRecipe,
    HealRecipe,
    Plan,
    TrainingError,
    apply,
    expand,
    heal,
    heal_scope,
    linearize_mlps,
    merge_convs,
)
from hf_layerfuse.data.collate import ROW, TEACHER_IDS, TEACHER_LOGPROBS, CollateImages, CollateText
from hf_layerfuse.data.sampler import ByLength
from hf_layerfuse.evaluation.fingerprint import fingerprint
from hf_layerfuse.evaluation.metrics import classification, parameter_counts
from hf_layerfuse.evaluation.timing import device_name
from hf_layerfuse.methods.fusion.search import search
from hf_layerfuse.models.architectures import architecture_for
from hf_layerfuse.pipeline.results import Goal
from hf_layerfuse.pipeline.rounds import target_of
from hf_layerfuse.training.schedule import compose, shares_of, steps_of
from hf_layerfuse.training.teacher_cache import with_teacher

CHECKPOINTS = common.ROOT / "outputs" / "heal"


THRESHOLD = 0.05
"""Largest distance from a line at which an activation counts as linear."""


Collate = Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]


@dataclass
class Job:
    """A checkpoint and its training data.

    Attributes:
        name: Key in JOBS.
        base: The model, calibration, validation and test data of the fusion benchmark.
        rows: Training rows.
        collate: Function that turns rows into a batch.
        validation: Batches with labels.
        recipe: Budget of all rounds together.
        options: Fields of the recipe that each method chooses from.
        targets: Fields of the fusion recipe, by name of the target.
        pilots: Targets that make this choice. Any other target uses the choice of the first pilot of its mode.
        pilot: Number of steps of the short trainings that make the choice.
        rounds: Number of rounds of fusing and retraining, for methods that alternate.
        effort: Effort of our search.
        ragged: Whether rows are texts of different lengths, which are batched with texts of about the same length.
        workers: Number of processes that prepare batches, for a GPU that would otherwise wait.
    """

    name: str
    base: common.Job
    rows: Sequence[dict[str, Any]]
    collate: Collate
    validation: list[dict[str, torch.Tensor]]
    recipe: HealRecipe
    options: list[dict[str, float]]
    targets: dict[str, dict[str, Any]]
    pilots: tuple[str, ...]
    pilot: int
    rounds: int = 1
    effort: str = "medium"
    ragged: bool = False
    workers: int = 0

    def loader(self, seed: int) -> DataLoader:
        """Training batches."""
        size, options = self.recipe.batch_size, {"shuffle": True}
        if self.ragged:
            lengths = [len(row["input_ids"]) for row in self.rows]
            options = {"sampler": ByLength(lengths, size, seed)}
        options |= {"drop_last": True, "collate_fn": self.collate, "num_workers": self.workers}
        return DataLoader(self.rows, size, **options)

    def pilot_of(self, target: str) -> str:
        """The target whose options a target uses: itself, or the first pilot of its mode."""
        if target in self.pilots or target not in self.targets:
            return target
        mode = self.targets[target].get("mode")
        return next(name for name in self.pilots if self.targets[name].get("mode") == mode)


def rates(*values: float) -> list[dict[str, float]]:
    return [{"learning_rate": value} for value in values]


def gpt2() -> Job:
    base = common.gpt2()
    path = common.DATA / "models" / "gpt2-wikitext2"
    tokenizer = AutoTokenizer.from_pretrained(path)
    labelled = [{**batch, "labels": batch["input_ids"]} for batch in common.windows(tokenizer, "valid", 64)]
    targets = {f"depth {share}%": {"keep_layers": keep} for share, keep in ((25, 9), (50, 6), (70, 4), (80, 2))}
    targets |= {
        f"share {share}%": {"ratio": share / 100, "mode": "share", "rank": "auto"} for share in (25, 50, 70, 80)
    }
    # under one epoch, overfitting is unlikely
    recipe = HealRecipe(steps=400, batch_size=8, eval_every=100, teacher_top_k=64, dropout=0.0)
    windows = common.windows(tokenizer, "train", recipe.steps * recipe.batch_size)
    ids = torch.cat([batch["input_ids"] for batch in windows]).tolist()
    rows = {"input_ids": ids, "labels": ids}
    return Job(
        "gpt2",
        base,
        answered("windows", rows, base.model, recipe, stacked, batch_size=16),
        stacked,
        labelled,
        recipe,
        rates(3e-4, 1e-3),
        targets,
        pilots=("depth 50%", "share 50%"),
        pilot=100,
        effort="low",
    )


def answered(
    name: str, columns: dict[str, list], teacher: PreTrainedModel, recipe: HealRecipe, collate: Collate, batch_size: int
) -> Dataset:
    """Rows with cached outputs of the teacher, which runs once for all models instead of in every step."""
    folder = CHECKPOINTS / f"{name}-{len(columns['labels'])}"
    if not folder.is_dir():
        temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
        Dataset.from_dict(columns).save_to_disk(temporary)
        with contextlib.suppress(OSError):  # another process has written the same rows
            temporary.rename(folder)
        shutil.rmtree(temporary, ignore_errors=True)
    # rows read from disk have a stable fingerprint, which is the key of the cached outputs
    settings = {"top_k": recipe.teacher_top_k, "temperature": recipe.temperature, "batch_size": batch_size}
    with torch.autocast("cpu", torch.bfloat16):
        return with_teacher(Dataset.load_from_disk(folder), teacher, collate, **settings)


def stacked(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch of rows of one length, with the outputs of the teacher as (rows, tokens, k)."""
    batch = {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}
    shape = (*batch["input_ids"].shape, -1)
    return {name: value.view(shape) if name.startswith("teacher") else value for name, value in batch.items()}


def minilm_sst2() -> Job:
    base = common.minilm_sst2()
    path = common.DATA / "models" / "minilm-l6-sst2"
    tokenizer = AutoTokenizer.from_pretrained(path)
    pairs = common.sst2_train()
    random.Random(0).shuffle(pairs)

    def rows(part: list[list[str]]) -> list[dict[str, Any]]:
        ids = tokenizer([text for text, _ in part], truncation=True, max_length=96)["input_ids"]
        return [{"input_ids": row, "labels": int(label)} for row, (_, label) in zip(ids, part, strict=True)]

    collate = CollateText(tokenizer)
    held_out = rows(pairs[-1280:])
    validation = [collate(held_out[i : i + 64]) for i in range(0, len(held_out), 64)]
    recipe = HealRecipe(steps=1600, batch_size=32, eval_every=200)
    options = [*rates(3e-5, 1e-4, 3e-4), {"learning_rate": 1e-4, "hidden_weight": 1.0}]
    targets = {f"{keep} layers": {"keep_layers": keep} for keep in (4, 3, 2)}
    train = rows(pairs[:-1280])
    return Job(
        "minilm-sst2", base, train, collate, validation, recipe, options, targets, tuple(targets), 400, ragged=True
    )


def resnet56() -> Job:
    model = published(common.DATA / "models" / "resnet-cifar10" / "resnet56.safetensors")
    recipe = HealRecipe(steps=3000, batch_size=64, eval_every=300, patience=4, temperature=4.0, teacher_top_k=10)
    job = images("resnet56", model, recipe, rates(1e-3, 2e-3), pilot=200)
    targets = {"70% shared": {"ratio": 0.7, "mode": "share", "rank": 4}}
    return replace(job, targets=targets, pilots=tuple(targets), rounds=3, effort="low")


def images(name: str, model: PreTrainedModel, recipe: HealRecipe, options: list[dict[str, float]], pilot: int) -> Job:
    """An image classifier with 40,000 training images of CIFAR-10, without targets."""
    base = images_base(model)
    train, labels = cifar10(common.DATA / "data" / "cifar10", "train")
    collate, views = Views(train[:40_000]), range(recipe.steps * recipe.batch_size)
    rows = {ROW: [*views], "labels": [int(labels[view % 40_000]) for view in views]}
    data = Dataset.from_dict(rows)
    if recipe.needs_teacher and recipe.teacher_top_k is not None:
        data = answered("views", rows, model, recipe, collate, batch_size=64)
    workers = int(torch.cuda.is_available())
    return Job(name, base, data, collate, base.validation, recipe, options, {}, (), pilot, workers=workers)


def grown(name: str, model: PreTrainedModel, steps: int) -> PreTrainedModel:
    """A classifier that is trained once on CIFAR-10 from scratch, and kept in outputs/grown.

    On a GPU, each batch has twice as many images. The config records the training.
    """
    folder = CHECKPOINTS.with_name("grown") / name
    if not (folder / "config.json").is_file():
        size = 128 if torch.cuda.is_available() else 64
        recipe = HealRecipe(steps=steps, batch_size=size, learning_rate=1e-3, eval_every=500, kl_weight=0.0)
        job = images(name, model, recipe, [], 0)
        heal(
            model,
            job.loader(0),
            recipe,
            validation_batches=job.validation,
            checkpoints=folder.with_name(f"{name}-training"),
        )
        model.config.trained = f"{steps} batches of {size} images, on {device_name(model.device)}"
        temporary = folder.with_name(f"{name}.{os.getpid()}.tmp")
        model.save_pretrained(temporary)
        temporary.rename(folder)
    return AutoFusedModel.from_pretrained(folder, dtype=torch.float32).eval()


def images_base(model: PreTrainedModel) -> common.Job:
    """A CIFAR-10 classifier with its data for measurements without training."""
    (train, labels), (test, answers) = (cifar10(common.DATA / "data" / "cifar10", split) for split in ("train", "test"))
    held_out = [
        {"pixel_values": x, "labels": y}
        for x, y in zip(train[40_000:42_500].split(250), labels[40_000:42_500].split(250), strict=True)
    ]
    tested = [{"pixel_values": x, "labels": y} for x, y in zip(test.split(499), answers.split(499), strict=True)]
    calibration = [{"pixel_values": x} for x in train[:40_000:78].split(64)]
    return common.Job(model, calibration, held_out, lambda student: classification(student, tested), keeps=())


class Views:
    """Batches of images, which are shifted and mirrored in a new way each time they are read."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images, self.move = images, CollateImages(moves=True)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        views = [{"labels": 0, **row, "pixel_values": self.images[row[ROW] % len(self.images)]} for row in rows]
        answers = [name for name in rows[0] if name in (TEACHER_IDS, TEACHER_LOGPROBS)]
        return self.move(views) | {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in answers}


JOBS: dict[str, Callable[[], Job]] = {"minilm-sst2": minilm_sst2, "gpt2": gpt2, "resnet56": resnet56}


Made = tuple[PreTrainedModel, Plan]


Step = Callable[[PreTrainedModel, dict[str, Any]], Made]
"""Function of a model and the fields of a target. It returns a smaller model and its plan."""


def searched(base: common.Job, model: PreTrainedModel, asked: dict[str, Any], **options: Any) -> Made:
    result = search(model, FusionRecipe(**asked, **options), base.calibration)
    return result.model, result.plan


def untouched(model: PreTrainedModel, asked: dict[str, Any]) -> Made:
    architecture = architecture_for(model)
    nothing = Plan(architecture.model_type, model.config.num_hidden_layers, kinds=architecture.kinds)
    return apply(model, nothing), nothing


def chosen(job: Job, name: str, asked: dict[str, Any], step: Step, choices: list[dict]) -> dict[str, Any]:
    """The validation loss after a short training with each option, and the best option; None if training exploded.

    A single option needs no training. If another method made the same weights, its entry of `choices` is returned.
    """
    fused, plan = step(job.base.model, asked)
    weights, losses = fingerprint(fused), []
    for known in choices:
        if known["weights"] == weights:
            return known
    if len(job.options) == 1:
        return {"options": job.options, "steps": job.pilot, "losses": [], "best": job.options[0], "weights": weights}
    for option in job.options:
        student = copy.deepcopy(fused)
        recipe = recipe_of(job, plan, steps=job.pilot, eval_every=job.pilot, **option)
        scope = heal_scope(student, job.base.model, plan, recipe)
        try:
            report = heal(
                student,
                job.loader(0),
                recipe,
                teacher=job.base.model,
                scope=scope,
                validation_batches=job.validation,
            )
        except TrainingError:
            losses.append(None)
        else:
            losses.append(report.validation_loss[-1][1])
    print(f"{name}: {losses}", flush=True)
    if all(loss is None for loss in losses):
        raise SystemExit(f"{name}: training explodes with each of {job.options}: give the job lower rates.")
    best = job.options[losses.index(min(loss for loss in losses if loss is not None))]
    return {"options": job.options, "steps": job.pilot, "losses": losses, "best": best, "weights": weights}


def uses_homotopy(plan: Plan) -> bool:
    """Whether activations become lines during training, so that maps are merged at the end."""
    return any(isinstance(edit, Blend) for edit in plan.edits)


def recipe_of(job: Job, plan: Plan, **options: Any) -> HealRecipe:
    """The budget of a job with these options, and with a homotopy penalty if activations become lines."""
    return replace(job.recipe, **options, homotopy_strength="auto" if uses_homotopy(plan) else 0.0)


def retrained(
    job: Job, name: str, asked: dict[str, Any], rounds: int, step: Step, option: dict[str, float], rows: list[dict]
) -> dict[str, Any]:
    """Metrics on test data before and after retraining, size, and training history of a model.

    Each of several rounds removes its part of the ratio, by the exponential schedule, and gets its part of the steps.
    If another method retrained the same weights with the same option, its entry of `rows` is returned.
    """
    model, source, plan, parts = job.base.model, job.base.model, None, []
    shares = shares_of(replace(job.recipe, schedule="exponential", rounds=rounds))
    for number, (share, steps) in enumerate(zip(shares, steps_of(job.recipe, rounds), strict=True)):
        goal = target_of(Goal(ratio=share * asked["ratio"]), source, model) if "ratio" in asked else {}
        student, made = step(source, asked | goal)
        plan = made if plan is None else compose(plan, made)
        start = {"weights": fingerprint(student), "option": option}
        known = [row for row in rows if rounds == 1 and row.get("start") == start]
        if known:
            return known[0]
        before = job.base.score(student.eval())
        recipe = recipe_of(job, plan, steps=steps, **option)
        scope = heal_scope(student, model, plan, recipe)
        report = heal(
            student,
            job.loader(number),
            recipe,
            teacher=model,
            scope=replace(scope, threshold=THRESHOLD if uses_homotopy(plan) else None),
            validation_batches=job.validation,
            seed=number,
            checkpoints=CHECKPOINTS / f"{name}-{number}",
        )
        parts.append({"before": before, "budget": steps, **asdict(report)})
        if uses_homotopy(plan):
            student, _ = linearize_mlps(student, threshold=THRESHOLD)
        if any(not getattr(edit, "merged", True) for edit in plan.edits):
            student, _ = merge_convs(student)
        if rounds > 1:
            source = expand(student)
    for number, part in enumerate(parts):
        shutil.rmtree(CHECKPOINTS / f"{name}-{number}")
        del part["train_loss"]
    after = job.base.score(student)
    sizes = parameter_counts(student)
    return {"before": parts[-1]["before"], "after": after, **sizes, "start": start, "rounds": parts}


def row_of(method: str, rounds: int) -> str:
    return f"{method}, {rounds} rounds" if rounds > 1 else method


def measure(
    job: Job, known: dict[str, Any], target: str, asked: dict[str, Any], method: str, rounds: int, step: Step
) -> Iterator[dict[str, Any]]:
    """Choose the options of one model of a target and train it, if the results are not known.

    This adds new results to `known`, and yields them for `save`.
    """
    row = row_of(method, rounds)
    models = known["models"].setdefault(target, {})
    if row in models:
        return
    pilot = job.pilot_of(target)
    choice, choices = f"{pilot}, {method}", known["chosen"]
    if choice not in choices:
        choices[choice] = chosen(job, choice, job.targets.get(pilot, asked), step, list(choices.values()))
        yield {"chosen": {choice: choices[choice]}}
    folder = re.sub(r"\W+", "-", f"{job.name} {target} {row}")
    models[row] = retrained(job, folder, asked, rounds, step, known["chosen"][choice]["best"], list(models.values()))
    print(f"{target}, {row}: {models[row]}", flush=True)
    yield {"models": {target: {row: models[row]}}}


def current(job: Job, known: dict[str, Any]) -> dict[str, Any]:
    """Results that have the current budget. Those with other numbers of steps are measured again."""
    models = {
        target: {
            method: row
            for method, row in rows.items()
            if [part.get("budget", part["steps"]) for part in row["rounds"]] == steps_of(job.recipe, len(row["rounds"]))
        }
        for target, rows in known.get("models", {}).items()
    }
    choices = known.get("chosen", {}).items()
    return {"chosen": {name: row for name, row in choices if row.get("steps") == job.pilot}, "models": models}


@contextlib.contextmanager
def updated(path: Path) -> Iterator[dict[str, Any]]:
    """The results of all jobs, written back at the end of the block. Other processes wait until then."""
    CHECKPOINTS.mkdir(parents=True, exist_ok=True)
    with (CHECKPOINTS / f"{path.stem}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        results = common.load(path)
        yield results
        common.save({name: results[name] for name in sorted(results, key=_place)}, path)


def save(job: Job, path: Path, news: dict[str, Any]) -> dict[str, Any]:
    """Add new rows and choices of a job to its results in a file, remove outdated ones, and return the results.

    Other results stay: other jobs, or other targets of this job, may run at the same time.
    """
    with updated(path) as results:
        known = results[job.name] = current(job, results.get(job.name, {}))
        for target, rows in news.get("models", {}).items():
            known["models"].setdefault(target, {}).update(rows)
        known["chosen"].update(news.get("chosen", {}))
    return known


def _place(name: str) -> int:
    """Position of a job in a results file; jobs of other benchmarks come last."""
    return [*JOBS, name].index(name)


def table(results: dict[str, Any], name: str) -> list[list[str]]:
    """One row per model: size, quality before and after retraining, and difference from the retrained original."""
    rows, metric = results[name]["models"], headline(name)
    original = rows["original"]["original"]
    first = f"{title(name, original['parameters'])}: {metric.replace('_', ' ')}"
    found = [[first, "method", "block parameters", "before training", "retrained", "difference"]]
    for target, models in rows.items():
        for method, row in sorted(models.items(), key=lambda item: item[0].startswith("ours")):  # baselines first
            size = f"{row['non_embedding_parameters'] / original['non_embedding_parameters']:.0%}"
            after = healed(row["after"], metric, row["rounds"][-1]["best_step"])
            lost = "" if row is original else difference(row["after"], original["after"], metric)
            found.append([target, method, size, figure(row["before"], metric), after, lost])
    return found


def tables(results: dict[str, Any]) -> list[list[list[str]]]:
    """One table per checkpoint whose original has been retrained."""
    return [table(results, name) for name in results if results[name]["models"].get("original")]
