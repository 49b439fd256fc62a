"""A run carries out a recipe: load, calibrate, plan, apply, verify, heal, evaluate, save."""

from __future__ import annotations

import dataclasses
import shlex
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import accelerate
import datasets
import torch
import transformers
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedModel, set_seed

from ..discovery import ensure_architecture
from ..errors import CheckpointError, PublishError, RecipeError
from ..evaluation.metrics import embeddings_of
from ..evaluation.timing import device_name
from ..methods import method_of
from ..methods.report import FusionReport
from ..models.architectures import architecture_for
from ..models.files import why_unreadable
from ..models.loading import load_checkpoint
from ..models.modeling import check_with_code
from ..models.paging import paged_model
from ..models.verify import verify
from ..plan import Plan
from ..recipe import Recipe
from ..training.distributed import process_state
from .companions import companions_of, copy_companions
from .fuse_checkpoint import fuse_layers
from .output import check_output, new_directory, stamp, unfinished
from .progress import say, steps
from .report.closing import closing
from .report.hub import check_publish, publish
from .report.plots import draw
from .report.run_card import run_card
from .report.sections import licence_of
from .report.tables import rows, text_table
from .results import SAMPLES, Measurement, RetrainedOriginal, RunResults
from .rounds import auto_class_of, fuse_and_heal, identity_of, retrain_original, round_to
from .run_data import RunData, save_weights
from .samples import sample_outputs


@steps()
def run(recipe: Recipe, command: str) -> RunResults:
    """Carry out a recipe and write its output directory: checkpoint, processor, plan, results and card.

    Args:
        recipe: Recipe of the whole run.
        command: Command line of the user, for `results.json`.

    Returns:
        The results, which `results.json` holds too; `healed` is set with `heal.steps` above 0.

    Raises:
        LayerFuseError: Problem that the user can fix, as one of its subclasses. A finished result that cannot be
            published stays in its directory.
    """
    state = process_state()
    data = recipe.data
    inputs = (recipe.model, *(() if data.name else (data.train, data.validation, data.test)))
    check_output(recipe.output_dir, recipe.overwrite, keep=inputs)
    if recipe.hub.push_to_hub is not None:
        check_publish(recipe.hub)  # before hours of work
    if recipe.low_memory:
        return _run_by_layers(recipe, command)
    companions = companions_of(recipe.model)
    original, processor, inputs = prepare_run(recipe)
    files = [stamp(path) for path in (recipe.model, data.train, data.validation, data.test)]
    # one fused model serves every way to heal it; later rounds of fusing depend on the healing before them
    other = ("overwrite", "output_dir", "with_code", "hub", *(("heal",) if recipe.heal.schedule == "one-shot" else ()))
    work = unfinished(recipe.output_dir, [files, identity_of(recipe, *other)])
    outcome = fuse_and_heal(recipe, original, inputs, work)
    fused, plan, healed = outcome.model, outcome.plan, None
    if recipe.heal.steps > 0:
        round_to(fused, inputs.dtype)
        healed = inputs.measure(fused, original, "the healed model")
    stages = {"before": (outcome.before, original), "fused": (outcome.fused, outcome.shaped)}
    stages |= {"healed": (healed, fused)} if recipe.heal.steps > 0 else {}
    retraining = None
    if recipe.evaluate.retrain_original:
        model, retraining = retrain_original(recipe, original, plan, inputs, work)
        # it has the shape of the original, and so its latency
        stages["retrained"] = inputs.measure(model, original, "the retrained original"), original
        del model
    timed = inputs.time(stages)
    if retraining is not None:
        timed["retrained"] = RetrainedOriginal(timed["retrained"], retraining)
    results = RunResults(
        **timed,
        rounds=outcome.rounds,
        metrics_on=inputs.reported,
        recipe=dataclasses.asdict(recipe),
        command=command,
        environment=_environment(),
        samples=sample_outputs(inputs, original, fused),
    )

    if state.is_main_process:
        say(f"saving and verifying {recipe.output_dir}")
        _save(recipe, fused, processor, inputs.dtype, plan, results, companions)
        shutil.rmtree(work, ignore_errors=True)
        _conclude(recipe, plan, results)
    state.wait_for_everyone()
    state.destroy_process_group()
    return results


def _run_by_layers(recipe: Recipe, command: str) -> RunResults:
    """Run a recipe with `low_memory`, in one process."""
    if process_state().num_processes > 1:
        raise RecipeError("low_memory=True has one layer in memory, in one process: start the run without accelerate.")
    set_seed(recipe.seed)
    say(f"opening {recipe.model}")
    original, weights = paged_model(recipe.model)
    ensure_architecture(original, method_of(recipe).architecture_type, stack=recipe.fusion.stack)
    weights.attach(original, architecture_for(original, stack=recipe.fusion.stack))
    processor = _processor(recipe, original)
    inputs = RunData(recipe, processor, original)
    kept: list[RunResults] = []

    def complete(path: Path, report: FusionReport, result: PreTrainedModel) -> None:
        say("measuring the original and the result")
        measured = [
            Measurement(
                parameters=parameters,
                non_embedding_parameters=parameters - embeddings_of(model),
                bytes=size,
                metrics=inputs.metrics(model, original),
            )
            for model, parameters, size in zip((original, result), report.parameters, report.bytes, strict=True)
        ]
        results = RunResults(
            before=measured[0],
            fused=measured[1],
            metrics_on=inputs.reported,
            recipe=dataclasses.asdict(recipe),
            command=command,
            environment=_environment(),
        )
        processor.save_pretrained(path)
        _describe(recipe, report.plan, results, path)
        kept.append(results)

    say("fusing layer by layer; if interrupted, rerun the same command to resume")
    report = fuse_layers(
        recipe.model,
        recipe.output_dir,
        recipe.fusion,
        inputs.calibration(),
        overwrite=recipe.overwrite,
        finish=complete,
    )
    _conclude(recipe, report.plan, kept[0])
    return kept[0]


def _conclude(recipe: Recipe, plan: Plan, results: RunResults) -> None:
    """Print the results of a finished run, and publish it if the recipe asks for that."""
    print(text_table(rows(results)))
    print(f"\n{closing(recipe, plan, results)}")
    if recipe.hub.push_to_hub is not None:
        say(f"publishing as {recipe.hub.push_to_hub}")
        print(f"Published: {_publish(recipe)}")


def prepare_run(recipe: Recipe) -> tuple[PreTrainedModel, Any, RunData]:
    """Load the model, its tokenizer or image processor, and the data of a recipe."""
    set_seed(recipe.seed)
    original, processor = _load(recipe)
    original.to(process_state().device)
    # a model that cannot be fused is refused before the data are read
    ensure_architecture(original, method_of(recipe).architecture_type, stack=getattr(recipe.method, "stack", None))
    if recipe.with_code:
        check_with_code(original.config)
    return original, processor, RunData(recipe, processor, original)


def _publish(recipe: Recipe) -> str:
    try:
        return publish(Path(recipe.output_dir), recipe.hub, f"{Path(recipe.model).name}, made smaller")
    except PublishError as error:
        words = ["hf", "upload", recipe.hub.push_to_hub, recipe.output_dir, ".", "--exclude", SAMPLES]
        words += ["--private"] * recipe.hub.private  # used only where the command creates the repository
        words += [] if recipe.hub.revision is None else ["--revision", recipe.hub.revision]
        command = shlex.join(words)
        raise PublishError(
            f"{error} The result is complete in {recipe.output_dir}; `{command}` publishes it."
        ) from error


def _load(recipe: Recipe) -> tuple[PreTrainedModel, Any]:
    say(f"loading {recipe.model}")
    trust = {"trust_remote_code": True} if recipe.trust_remote_code else {}
    model = load_checkpoint(recipe.model, auto_class=auto_class_of(recipe), dtype=torch.float32, **trust)
    return model, _processor(recipe, model, **trust)


def _processor(recipe: Recipe, model: PreTrainedModel, **trust: bool) -> Any:
    """The tokenizer or image processor of a model. The config of the model gets its padding token, if it lacks one."""
    auto_class = AutoImageProcessor if recipe.task == "image-classification" else AutoTokenizer
    try:
        processor = auto_class.from_pretrained(recipe.model, **trust)
    except (OSError, ValueError) as error:
        missing = (
            f"{recipe.model!r} has no tokenizer or image processor: save the one of its training in the same directory."
        )
        raise CheckpointError(why_unreadable(recipe.model) or missing) from error
    if auto_class is AutoTokenizer:
        if len(processor) < model.config.vocab_size // 2:  # from a config alone, transformers makes up an empty one
            raise CheckpointError(
                f"{recipe.model!r} has no tokenizer: {len(processor)} tokens for a vocabulary of "
                f"{model.config.vocab_size}. Save the one of its training in the same directory."
            )
        if processor.pad_token is None:
            processor.pad_token = processor.eos_token  # GPT-2 has none; the attention mask hides it
        if model.config.pad_token_id is None:
            model.config.pad_token_id = processor.pad_token_id
    return processor


def _environment() -> dict[str, str]:
    state = process_state()
    return {
        "hf_layerfuse": version("hf-layerfuse"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        "datasets": datasets.__version__,
        "device": device_name(state.device),
        "threads": str(torch.get_num_threads()),
        "processes": str(state.num_processes),
    }


def _save(
    recipe: Recipe,
    model: PreTrainedModel,
    processor: Any,
    dtype: torch.dtype,
    plan: Plan,
    results: RunResults,
    companions: Mapping[str, Path],
) -> None:
    with new_directory(recipe.output_dir, overwrite=recipe.overwrite) as path:
        save_weights(model, dtype, path, with_code=recipe.with_code)
        processor.save_pretrained(path)
        copy_companions(companions, path)
        _describe(recipe, plan, results, path)
        verify(model, path)


def _describe(recipe: Recipe, plan: Plan, results: RunResults, path: Path) -> None:
    """Write the plan, the results, the plots and the card into the directory of a result."""
    (path / "plan.json").write_text(plan.to_json(), encoding="utf-8")
    pictures = draw(plan, results.heal, path)
    results.save(path)
    beside = [file.name for file in path.iterdir()]
    card = run_card(recipe, plan, results, drawn=pictures, licence=licence_of(recipe.model), beside=beside)
    card.save(path / "README.md")
