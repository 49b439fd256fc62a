"""A recipe carried out: load, calibrate, plan, apply, verify, heal, evaluate, save."""

from __future__ import annotations

import copy
import dataclasses
import json
import platform
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import accelerate
import datasets
import torch
import transformers
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedModel, set_seed

from . import __version__, evaluate
from .adapters import adapter_for
from .collate import CollateText
from .data import calibration_batches, load_splits, loader, prepare, text_of
from .errors import CheckpointError
from .grouping import groups_of
from .heal import heal
from .latency import latency_side_by_side
from .layermap import fused_parameters, layer_map, mixed_weights
from .methods.fusion import plan_fusion
from .modeling import expand, load_checkpoint
from .output import MARK, check_output, new_directory, unfinished
from .plan import Plan
from .processes import process_state
from .recipe import TARGETS, FusionRecipe, Recipe
from .report import model_card, rows, text_table
from .schedule import compose, keeps_of, steps_of
from .search import search
from .tasks import TASKS
from .teacher import with_teacher
from .verify import verify, warn_if_useless


def run(recipe: Recipe, command: str) -> dict[str, Any]:
    """Carry out a recipe and write its output directory: checkpoint, processor, plan, results and card.

    Args:
        recipe: the whole run.
        command: what the user typed, for the card.

    Returns:
        What `results.json` holds: `before`, `fused` and, with `heal.steps` above 0, `healed`.

    Raises:
        LayerFuseError: one of its children, for each thing that the user can mend.
    """
    state = process_state()
    data = recipe.data
    inputs = (recipe.model, *(() if data.name else (data.train, data.validation, data.test)))
    check_output(recipe.output_dir, recipe.overwrite, keep=inputs)
    set_seed(recipe.seed)

    original, processor = _load(recipe)
    original.to(state.device)
    adapter_for(original)  # an unknown architecture is refused before the data are read
    inputs = _Inputs(recipe, processor, original)
    files = [_stamp(path) for path in (recipe.model, data.train, data.validation, data.test)]
    # one fused model serves every way to heal it; what is fused further depends on how it was healed before
    other = ("overwrite", "output_dir", *(("heal",) if recipe.heal.schedule == "one-shot" else ()))
    work = unfinished(recipe.output_dir, [files, _identity(recipe, *other)])
    fused, plan, results = _fuse_and_heal(recipe, original, inputs, work)
    if recipe.heal.steps > 0:
        _round(fused, inputs.dtype)
        results["healed"] = inputs.measure(fused, original, "the healed model")
    results |= {"metrics_on": inputs.reported, "recipe": dataclasses.asdict(recipe), "environment": _environment()}

    if state.is_main_process:
        _save(recipe, fused, processor, inputs.dtype, plan, results, command)
        shutil.rmtree(work, ignore_errors=True)
        print(text_table(rows(results)))
        print(f"\nWritten to {recipe.output_dir}")
    state.wait_for_everyone()
    state.destroy_process_group()
    return results


def _auto_class(recipe: Recipe) -> Any:
    return getattr(transformers, TASKS[recipe.task].auto_class)


def _identity(recipe: Any, *without: str) -> dict[str, Any]:
    """What makes a run what it is."""
    fields = {name: value for name, value in dataclasses.asdict(recipe).items() if name not in without}
    return {**fields, "version": __version__, "processes": process_state().num_processes}


def _stamp(path: str | None) -> list[int] | None:
    """Number, size and date of the files that a path names, which change when they do; None is no path."""
    if path is None or not Path(path).exists():
        return None
    stats = [file.stat() for file in (Path(path), *Path(path).rglob("*")) if file.is_file()]
    return [len(stats), sum(stat.st_size for stat in stats), max((stat.st_mtime_ns for stat in stats), default=0)]


def _rounds(recipe: Recipe, original: PreTrainedModel, inputs: _Inputs) -> list[tuple[int | None, int]]:
    """For each round, the blocks that stay distinct (None: what the recipe asks for) and the steps of healing."""
    if recipe.heal.schedule == "one-shot":
        return [(None, recipe.heal.steps)]
    plan = plan_fusion(original, recipe.fusion, inputs.calibration())
    keeps = keeps_of(plan.num_layers, len(groups_of(plan, plan.edits[0].kind)), recipe.heal)
    return list(zip(keeps, steps_of(recipe.heal.steps, len(keeps)), strict=True))


def _fuse_and_heal(
    recipe: Recipe, original: PreTrainedModel, inputs: _Inputs, work: Path
) -> tuple[PreTrainedModel, Plan, dict[str, Any]]:
    """All rounds of fusing and healing: the model, one plan for all of them, and what was measured."""
    rounds = _rounds(recipe, original, inputs)
    fused, plan, results, reports = original, None, {}, []
    for number, (keep, steps) in enumerate(rounds, 1):
        source = expand(fused) if plan else original
        target = {} if keep is None else dict.fromkeys(TARGETS) | {"keep_layers": keep}
        stage = work / f"fused-{number}"
        if not (stage / MARK).is_file():
            _fuse(dataclasses.replace(recipe.fusion, **target), source, original, inputs, stage)
        fused = load_checkpoint(stage, auto_class=_auto_class(recipe), dtype=torch.float32).to(original.device)
        fused.config.name_or_path = fused.name_or_path = original.name_or_path
        step = Plan.load(stage / "plan.json")
        plan = compose(plan, step) if plan else step
        results |= json.loads((stage / MARK).read_text(encoding="utf-8"))
        if steps > 0:
            say(f"healing for {steps} steps; where it is interrupted, the same command goes on")
            healing = dataclasses.replace(recipe.heal, steps=steps)
            report = heal(
                fused,
                inputs.train_loader(original),
                healing,
                teacher=original,
                matches=layer_map(fused, original, plan),
                frozen=fused_parameters(fused, plan) if healing.freeze_fused else (),
                mixed=mixed_weights(fused, source, step, inputs.calibration()) if healing.mix else None,
                validation_batches=inputs.validation_batches(),
                seed=recipe.seed + number - 1,
                checkpoints=unfinished(work / f"heal-{number}", _identity(healing)),
            )
            reports.append({"keep_layers": keep, **dataclasses.asdict(report)})
    if reports:
        results["heal"] = reports[-1]
    if len(reports) > 1:
        results["rounds"] = reports
    return fused, plan, results


def _fuse(
    fusion: FusionRecipe, source: PreTrainedModel, original: PreTrainedModel, inputs: _Inputs, stage: Path
) -> None:
    """Fuse a model, measure it, and leave it, its plan and its figures in a folder, whole or not at all."""
    state = process_state()
    batches = inputs.calibration()
    say("fusing")
    found = search(source, fusion, batches)
    fused = _round(found.model, inputs.dtype)
    warn_if_useless(original, fused, batches)
    results = {} if source is not original else {"before": inputs.measure(original, original, "the original")}
    results["fused"] = inputs.measure(fused, original, "the fused model")
    if state.is_main_process:
        with new_directory(stage) as path:
            fused.save_pretrained(path)
            (path / "plan.json").write_text(found.plan.to_json(), encoding="utf-8")
            (path / MARK).write_text(json.dumps(results) + "\n", encoding="utf-8")
    state.wait_for_everyone()


def say(message: str) -> None:
    """One line on standard error, from the main process."""
    if process_state().is_main_process:
        print(f"[layerfuse] {message}", file=sys.stderr, flush=True)


def _load(recipe: Recipe) -> tuple[PreTrainedModel, Any]:
    say(f"loading {recipe.model}")
    trust = {"trust_remote_code": True} if recipe.trust_remote_code else {}
    auto_class = AutoImageProcessor if recipe.task == "image-classification" else AutoTokenizer
    model = load_checkpoint(recipe.model, auto_class=_auto_class(recipe), dtype=torch.float32, **trust)
    try:
        processor = auto_class.from_pretrained(recipe.model, **trust)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{recipe.model!r} has no tokenizer or image processor: save the one it was trained with beside it."
        ) from error
    if auto_class is AutoTokenizer:
        if len(processor) < model.config.vocab_size // 2:  # from a config alone, transformers makes up an empty one
            raise CheckpointError(
                f"{recipe.model!r} has no tokenizer: {len(processor)} tokens for a vocabulary of "
                f"{model.config.vocab_size}. Save the one it was trained with beside it."
            )
        if processor.pad_token is None:
            processor.pad_token = processor.eos_token  # GPT-2 has none; the attention mask hides it
        if model.config.pad_token_id is None:
            model.config.pad_token_id = processor.pad_token_id
    return model, processor


def _round(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Round weights to what the file will hold, so that the figures are those of the file."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
    return model


def _save_weights(model: PreTrainedModel, dtype: torch.dtype, path: Path) -> None:
    if model.dtype != dtype:
        model = copy.deepcopy(model).to(dtype)
    model.save_pretrained(path)


class _Inputs:
    """The data of a run, prepared once, and the measurements that are taken on them."""

    def __init__(self, recipe: Recipe, processor: Any, model: PreTrainedModel) -> None:
        say("reading the data")
        self.recipe, self.processor = recipe, processor
        # the result is saved in the data type of the original's file, whatever it was computed in
        self.dtype = _file_dtype(recipe)
        label2id = model.config.label2id if TASKS[recipe.task].labels else None
        self.splits = load_splits(recipe.data, recipe.task, recipe.seed, label2id=label2id)
        self.reported = "test" if "test" in self.splits else "validation"
        self.train = self._prepare("train", training=True)
        self._report_batches: Any = None

    def _prepare(self, split: str, *, training: bool = False) -> Any:
        return prepare(self.splits[split], self.processor, self.recipe.data, self.recipe.task, training=training)

    def _batches(self, split: str) -> Any:
        size, task = self.recipe.evaluate.batch_size, self.recipe.task
        return loader(self._prepare(split), self.processor, size, shuffle=False, seed=0, task=task)

    def calibration(self) -> list[Any]:
        recipe = self.recipe
        size = recipe.evaluate.batch_size
        return calibration_batches(
            self.train, self.processor, recipe.data, recipe.task, batch_size=size, seed=recipe.seed
        )

    def train_loader(self, teacher: PreTrainedModel) -> Any:
        recipe, rows, top_k = self.recipe, self.train, self.recipe.heal.teacher_top_k
        if top_k is not None:
            top_k = min(top_k, teacher.config.vocab_size if recipe.task == "causal-lm" else teacher.config.num_labels)
            collate = CollateText(self.processor)
            settings = {"temperature": recipe.heal.temperature, "batch_size": recipe.evaluate.batch_size}
            with process_state().main_process_first():
                rows = with_teacher(rows, teacher, collate, top_k=top_k, **settings)
        options = {"seed": recipe.seed, "task": recipe.task, "augment": recipe.data.augment, "top_k": top_k}
        return loader(rows, self.processor, recipe.heal.batch_size, shuffle=True, **options)

    def validation_batches(self) -> Any:
        return self._batches("validation")

    def measure(self, model: PreTrainedModel, original: PreTrainedModel, name: str) -> dict[str, Any] | None:
        """Size, speed and quality of a model whose weights are rounded already; on the main process alone."""
        state = process_state()
        figures = None
        if state.is_main_process:
            say(f"measuring {name}")
            with tempfile.TemporaryDirectory(prefix="layerfuse-") as directory:
                _save_weights(model, self.dtype, Path(directory))
                if model is not original:
                    verify(model, Path(directory))
                figures = {**evaluate.parameter_counts(model), "bytes": evaluate.bytes_on_disk(directory)}
            figures |= self._latency(model, original) | {"metrics": self._metrics(model, original)}
        state.wait_for_everyone()
        return figures

    def _latency(self, model: PreTrainedModel, original: PreTrainedModel) -> dict[str, Any]:
        settings = self.recipe.evaluate
        if not settings.latency:
            return {"latency_ms": None}
        # side by side with the original, so that a busy machine does not look like a slower model
        timed = latency_side_by_side(
            {"original": original, "model": model},
            sequence_length=self.recipe.data.max_length,
            repeats=settings.latency_repeats,
        )
        return {
            "latency_ms": {str(batch): figures["median_ms"] for batch, figures in timed["model"].items()},
            "latency": {
                str(batch): {**figures, "speedup": timed["original"][batch]["median_ms"] / figures["median_ms"]}
                for batch, figures in timed["model"].items()
            },
        }

    def _metrics(self, model: PreTrainedModel, original: PreTrainedModel) -> dict[str, Any]:
        data, settings = self.recipe.data, self.recipe.evaluate
        if self.recipe.task == "causal-lm":
            return evaluate.perplexity(
                model,
                self.processor,
                text_of(self.splits[self.reported], data),
                max_length=data.max_length,
                stride=settings.stride,
                batch_size=settings.batch_size,
                max_windows=data.max_test_samples,
            )
        if self._report_batches is None:
            self._report_batches = self._batches(self.reported)
        if self.recipe.task == "feature-extraction":
            return evaluate.embedding_fidelity(model, original, self._report_batches)
        return evaluate.classification(model, self._report_batches)


def _file_dtype(recipe: Recipe) -> torch.dtype:
    trust = {"trust_remote_code": True} if recipe.trust_remote_code else {}
    dtype = transformers.AutoConfig.from_pretrained(recipe.model, **trust).dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _environment() -> dict[str, str]:
    state = process_state()
    device = torch.cuda.get_device_name(state.device) if state.device.type == "cuda" else f"cpu {platform.machine()}"
    return {
        "hf_layerfuse": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        "datasets": datasets.__version__,
        "device": device,
        "threads": str(torch.get_num_threads()),
        "processes": str(state.num_processes),
    }


def _save(
    recipe: Recipe,
    model: PreTrainedModel,
    processor: Any,
    dtype: torch.dtype,
    plan: Plan,
    results: dict[str, Any],
    command: str,
) -> None:
    with new_directory(recipe.output_dir, overwrite=recipe.overwrite) as path:
        _save_weights(model, dtype, path)
        processor.save_pretrained(path)
        (path / "plan.json").write_text(plan.to_json(), encoding="utf-8")
        (path / MARK).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        model_card(recipe, plan, results, command).save(path / "README.md")
        verify(model, path)
