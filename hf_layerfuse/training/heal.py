"""Retrain a fused model on Accelerate, with the original model as teacher."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from ..errors import LayerFuseError, RecipeError
from ..evaluation.fingerprint import fingerprint
from ..evaluation.modes import checkpoint_activations, dropout_of, outside_inference_mode, plain_outputs
from ..plan.heal_scope import HealScope
from ..recipe import HealRecipe
from .accelerator import accelerator_of, finish_trackers, one_training
from .homotopy import HomotopyPenalty
from .loop import Loop
from .lora import low_rank
from .objective import Batch
from .sharding import unshard_after

_OWN_PARAMETERS = (DistributedType.FSDP, DistributedType.DEEPSPEED)
"""Launchers that shard the student's parameters or run the optimiser themselves."""


@dataclasses.dataclass(frozen=True)
class HealReport:
    """Report of a healing; `dataclasses.asdict` of it is JSON.

    Attributes:
        steps: Optimiser steps taken; fewer than requested if `patience` ended the training.
        best_step: Step whose weights the student has now: that of the lowest validation loss, else the last.
        train_loss: Pairs (step, loss) of every step, before its update, averaged over the targets of all processes and
            accumulated batches.
        validation_loss: Pairs (step, loss) before the first step, every `eval_every` steps and at the end.
        homotopy: Pairs (step, a of each `Blend` activation by its path) of every validation.
        seconds: Wall-clock time with validation, summed over all sessions of an interrupted run.
        mixed_precision: Resolved precision: `no`, `bf16` or `fp16`.
        num_processes: Number of processes.
        distributed_type: Accelerate's name of the setup, such as `NO` or `MULTI_GPU`.
    """

    steps: int
    best_step: int
    train_loss: list[tuple[int, float]] = dataclasses.field(repr=False)  # long
    validation_loss: list[tuple[int, float]]
    homotopy: list[tuple[int, dict[str, float]]] = dataclasses.field(repr=False)
    seconds: float
    mixed_precision: str
    num_processes: int
    distributed_type: str


@outside_inference_mode
def heal(
    student: PreTrainedModel,
    train_batches: DataLoader,
    recipe: HealRecipe,
    *,
    teacher: PreTrainedModel | None = None,
    scope: HealScope | None = None,
    validation_batches: Iterable[Batch] | None = None,
    seed: int = 0,
    accelerator: Accelerator | None = None,
    checkpoints: Path | str | None = None,
) -> HealReport:
    """Train `student` in place for `recipe.steps` optimiser steps, and keep the weights with the best validation loss.

    The loss is `ce_weight` x cross-entropy, the model's own loss from `labels`, + `kl_weight` x distillation. Batches
    without labels have no cross-entropy. Distillation is T^2 x KL(teacher || student) on `logits` (Hinton et al. 2015,
    https://arxiv.org/abs/1503.02531): per row, or per position that predicts a next token. Models without logits
    learn the teacher's last hidden states instead, by the mean squared error over unmasked tokens. `hidden_weight` and
    `attention_weight` add the relative squared errors of inner states, over unmasked tokens.

    Under `accelerate launch` each process reads its share of the batches, so a step sees batch x processes x
    accumulation rows. All targets of a step have equal weight, whichever of these batches holds them: several
    processes or accumulated batches equal one large batch, also for texts of different lengths.

    With `checkpoints`, the state is written at every validation, and a call with the same arguments resumes from it. On
    one CPU process, a run that was killed at any moment and restarted ends with bit-identical weights.

    Args:
        student: Model to train, in float32 or bfloat16; it ends in eval mode, on the device of the accelerator.
        train_batches: Training batches, read repeatedly. The order of an epoch depends only on `seed` and the epoch, or
            on the `set_epoch` of a sampler such as `ByLength`. `heal` keeps the batch size.
        recipe: Settings of the training.
        teacher: Model with the same outputs; it is moved to the device and otherwise unchanged.
        scope: Parts of the student that are compared, frozen and mixed: `heal_scope(student, teacher, plan, recipe)`,
            with a threshold for `Blend` edits. Without it, no layers are compared and every parameter is trained.
        validation_batches: Batches of the held-out split, the same every time. Their loss is reported and selects the
            weights: cross-entropy, or distillation without labels.
        seed: Seed of the order of batches, and of dropout, which differs in each process and step.
        accelerator: Accelerator to use with its own mixed precision, compilation and trackers. `heal` sets its
            accumulation and the seed of its samplers.
        checkpoints: Folder for the state of this run, kept at the end; by default a temporary one, which holds the best
            weights.

    Returns:
        Losses by step, the step whose weights were kept, and how it was trained.

    Raises:
        RecipeError: The recipe requests distillation without a teacher, or of layers without pairs in `scope`; a
            tracker that is not installed; gradient checkpointing that the model does not support; or a homotopy
            without `Blend` edits. Also raised for mixed weights under FSDP or DeepSpeed.
        DataError: No batches, or batches without any loss to compute.
        CheckpointError: The checkpoints belong to another run or are damaged.
        TrainingError: A loss or a gradient is not finite, or the loss explodes; the previous checkpoint is kept.
        LayerFuseError: The student is in float16, its outputs do not fit the teacher's, or a checkpoint cannot be
            written; the previous one is kept.
    """
    scope = scope or HealScope()
    _check(student, recipe, teacher, scope)
    if not any(p.requires_grad for name, p in student.named_parameters() if name not in scope.frozen):
        raise RecipeError("every parameter is frozen, so there is nothing to train: freeze fewer of them.")
    own = accelerator is None
    accelerator = accelerator or accelerator_of(student, recipe)
    if scope.mixed and accelerator.distributed_type in _OWN_PARAMETERS:
        raise RecipeError(
            f"heal.mix trains the source weights of fused blocks, but {accelerator.distributed_type.value} "
            "trains only the weights of the student: launch with recipes/accelerate/multi-gpu.yaml, or set heal.mix to "
            "false."
        )
    run = {}
    if checkpoints is not None and accelerator.is_main_process:  # only the main process compares
        run = _identity(student, train_batches, recipe, teacher, scope)
        run |= {"seed": seed, "number of processes": accelerator.num_processes}
    with contextlib.ExitStack() as stack:
        stack.enter_context(one_training(accelerator, recipe, seed))
        stack.enter_context(plain_outputs(*filter(None, (student, teacher))))
        stack.enter_context(dropout_of(student, recipe.dropout))
        stack.enter_context(low_rank(student, recipe.lora_rank))
        stack.enter_context(_training(student, recipe, teacher, scope))
        stack.enter_context(unshard_after(student, accelerator.distributed_type == DistributedType.FSDP))
        folder = checkpoints
        if folder is None and validation_batches is not None:
            folder = stack.enter_context(_temporary_folder(accelerator))
        loop = Loop(student, train_batches, recipe, teacher, scope, accelerator)
        if loop.mixture is not None:
            stack.callback(loop.mixture.average)  # also after an error in the middle of a step
        if folder is not None:
            loop.resume(Path(folder), run)
            stack.callback(loop.checkpoints.close)
        if own and recipe.log_with:
            accelerator.init_trackers("hf_layerfuse", config=dataclasses.asdict(recipe))
            stack.callback(finish_trackers, accelerator)
        progress = loop.run(validation_batches, seed)
    return HealReport(
        steps=progress.step,
        best_step=progress.best_step,
        train_loss=progress.train_loss,
        validation_loss=progress.validation_loss,
        homotopy=progress.homotopy,
        seconds=progress.seconds,
        mixed_precision=accelerator.mixed_precision,
        num_processes=accelerator.num_processes,
        distributed_type=accelerator.distributed_type.value,
    )


def _identity(
    student: PreTrainedModel,
    train_batches: DataLoader,
    recipe: HealRecipe,
    teacher: PreTrainedModel | None,
    scope: HealScope,
) -> dict[str, Any]:
    """Models, data and settings that identify a training; checkpoints of others are not resumed."""
    run = {f"heal.{name}": value for name, value in dataclasses.asdict(recipe).items()}
    run |= {f"config.{name}": value for name, value in student.config.to_dict().items()}
    size = len(train_batches) if hasattr(train_batches.dataset, "__len__") else None
    return run | {
        "weights at the start": fingerprint(student),
        "weights of the teacher": fingerprint(teacher) if teacher is not None and recipe.needs_teacher else None,
        "frozen parameters": sorted(scope.frozen),
        "threshold": scope.threshold,
        "batches of an epoch": size,
        "batch size": train_batches.batch_size,
    }


@contextlib.contextmanager
def _training(
    student: PreTrainedModel, recipe: HealRecipe, teacher: PreTrainedModel | None, scope: HealScope
) -> Iterator[None]:
    """Change the models for training inside the `with` block, and restore them at its end."""
    trained = [name for name in scope.frozen if student.get_parameter(name).requires_grad]
    forward, caches = vars(student).get("forward"), getattr(student.config, "use_cache", None)
    recomputes = any(getattr(module, "gradient_checkpointing", False) for module in student.modules())
    teacher_modes = [] if teacher is None else [(module, module.training) for module in teacher.modules()]
    try:
        for name in scope.frozen:
            student.get_parameter(name).requires_grad_(False)
        if caches:
            student.config.use_cache = False  # nothing is generated here
        if recipe.gradient_checkpointing:
            checkpoint_activations(student, True)
        yield
    finally:
        if recipe.gradient_checkpointing and not recomputes:
            checkpoint_activations(student, False)
        if caches:
            student.config.use_cache = caches
        # Accelerate wraps `forward` for mixed precision. Its `unwrap_model` would also strip the decorators of
        # transformers, so the class's own `forward` is restored here.
        for name in ("forward", "_original_forward"):
            vars(student).pop(name, None)
        if forward is not None:
            student.forward = forward
        student.eval()
        for name in trained:
            student.get_parameter(name).requires_grad_(True)
        for module, training in teacher_modes:
            module.training = training


@contextlib.contextmanager
def _temporary_folder(accelerator: Accelerator) -> Iterator[str]:
    """One empty folder for all processes, on the disk of the main process."""
    with tempfile.TemporaryDirectory(prefix="layerfuse-") as own:
        yield broadcast_object_list([own])[0]
        accelerator.wait_for_everyone()


def _check(student: PreTrainedModel, recipe: HealRecipe, teacher: PreTrainedModel | None, scope: HealScope) -> None:
    for field, needed in (("kl_weight", None), ("hidden_weight", "hidden"), ("attention_weight", "attention")):
        weight = getattr(recipe, field)
        if weight > 0 and teacher is None:
            raise RecipeError(f"heal.{field}={weight} needs a teacher: pass teacher=, or set heal.{field} to 0.")
        if weight > 0 and needed and not any(match.kind == needed for match in scope.matches):
            raise RecipeError(
                f"heal.{field}={weight} needs pairs of layers: pass "
                f"scope=heal_scope(student, teacher, plan, recipe), or set heal.{field} to 0."
            )
    if recipe.homotopy_strength and not HomotopyPenalty(student, 0.0).activations:
        raise RecipeError(
            f"heal.homotopy_strength={recipe.homotopy_strength} moves Blend activations to lines, but "
            f"{type(student).__name__} has none: apply Blend edits first, or leave it out."
        )
    if recipe.gradient_checkpointing and not student.supports_gradient_checkpointing:
        raise RecipeError(f"{type(student).__name__} does not support heal.gradient_checkpointing: set it to false.")
    if any(parameter.dtype == torch.float16 for parameter in student.parameters()):
        raise LayerFuseError(
            "the student is in float16, whose small updates round to zero: load it with dtype=torch.float32; "
            "heal.mixed_precision sets the precision of the computation."
        )
