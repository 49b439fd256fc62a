"""Retrain a fused model on Accelerate, with the original model as teacher."""

import dataclasses
import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from accelerate.state import is_initialized
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from .errors import DataError, LayerFuseError, RecipeError
from .objective import Batch, Match, Objective
from .processes import process_state
from .recipe import HealRecipe


@dataclasses.dataclass(frozen=True)
class HealReport:
    """What happened while healing; `dataclasses.asdict` of it is JSON.

    Attributes:
        steps: optimiser steps taken.
        train_loss: (step, loss) of every step, before its update, averaged over processes and accumulated batches.
        validation_loss: (step, loss) before the first step, every `eval_every` steps and at the end.
        seconds: wall-clock time, validation included.
        mixed_precision: `no`, `bf16` or `fp16`, as resolved.
        num_processes: how many trained together.
        distributed_type: as Accelerate names it, such as `NO` or `MULTI_GPU`.
    """

    steps: int
    train_loss: list[tuple[int, float]]
    validation_loss: list[tuple[int, float]]
    seconds: float
    mixed_precision: str
    num_processes: int
    distributed_type: str


def heal(
    student: PreTrainedModel,
    train_batches: DataLoader,
    recipe: HealRecipe,
    *,
    teacher: PreTrainedModel | None = None,
    matches: Sequence[Match] = (),
    validation_batches: Iterable[Batch] | None = None,
    seed: int = 0,
    accelerator: Accelerator | None = None,
) -> HealReport:
    """Train `student` in place for `recipe.steps` optimiser steps.

    The loss is `ce_weight` x cross-entropy, the model's own loss from `labels`, + `kl_weight` x distillation. Batches
    without labels have no cross-entropy. Distillation is T^2 x KL(teacher || student) on `logits` (Hinton et al. 2015,
    https://arxiv.org/abs/1503.02531): per row, or per position that predicts a next token. Models without logits
    learn the teacher's last hidden states instead, by the mean squared error over unmasked tokens. `hidden_weight` and
    `attention_weight` add the relative squared errors of inner states, over unmasked tokens.

    Under `accelerate launch` each process reads its share of the batches, so a step sees batch x processes x
    accumulation rows.

    Args:
        student: the model to train, in float32 or bfloat16; it ends in eval mode, on the device of the accelerator.
        train_batches: read again and again, in the loader's order of that epoch; `heal` keeps its batch size.
        recipe: all settings of the training.
        teacher: model with the same outputs; moved to the device, otherwise left as it is.
        matches: whose outputs `hidden_weight` and `attention_weight` compare: `layer_map(student, teacher, plan)`.
        validation_batches: batches (the same ones every time) whose loss is reported: cross-entropy, or distillation
            where there are no labels.
        seed: of dropout, different in each process.
        accelerator: one that is set up already; its mixed precision holds then, and its accumulation is set from the
            recipe.

    Raises:
        RecipeError: the recipe asks for distillation without a teacher, or of layers without `matches`.
        DataError: there are no batches, or no loss can be taken from them.
        LayerFuseError: the student is in float16, its outputs do not fit the teacher's, or the loss is not finite.
    """
    _check(student, recipe, teacher, matches)
    accelerator = accelerator or _accelerator(student, recipe)
    accelerator.gradient_accumulation_steps, accelerator.step = recipe.gradient_accumulation_steps, 0
    # A step always averages the same number of batches, also where an epoch ends in the middle of it.
    accelerator.gradient_state.plugin_kwargs["sync_with_dataloader"] = False
    set_seed(seed, device_specific=True)

    optimizer = torch.optim.AdamW(_parameter_groups(student, recipe.weight_decay), lr=recipe.learning_rate)
    # A prepared scheduler moves once per process unless it was told otherwise: its length is counted in those moves.
    alone = accelerator.split_batches or not accelerator.step_scheduler_with_optimizer
    moves = 1 if alone else accelerator.num_processes
    warmup = round(recipe.warmup_ratio * recipe.steps)
    scheduler = get_cosine_schedule_with_warmup(optimizer, warmup * moves, recipe.steps * moves)
    forward = vars(student).get("forward")
    teacher_modes = [] if teacher is None else [(module, module.training) for module in teacher.modules()]
    train_loss: list[tuple[int, float]] = []
    validation_loss: list[tuple[int, float]] = []
    start = time.perf_counter()
    try:
        model, optimizer, loader, scheduler = accelerator.prepare(student, optimizer, train_batches, scheduler)
        if teacher is not None:
            teacher.to(accelerator.device).eval()
        objective, batches = Objective(recipe, student, teacher, matches), _cycle(loader)
        progress = tqdm(range(recipe.steps + 1), desc="heal", disable=None if accelerator.is_main_process else True)
        for step in progress:
            if step > 0:
                loss = _take_step(step, accelerator, model, optimizer, scheduler, objective, batches, recipe)
                train_loss.append((step, loss))
                progress.set_postfix(loss=f"{loss:.4f}")
            if validation_batches is not None and (step % recipe.eval_every == 0 or step == recipe.steps):
                validation_loss.append((step, _validate(student, validation_batches, objective, accelerator)))
    finally:
        # Accelerate wraps `forward` for mixed precision; its `unwrap_model` would strip the decorators of transformers
        # as well, so the class's own `forward` is brought back here.
        for name in ("forward", "_original_forward"):
            vars(student).pop(name, None)
        if forward is not None:
            student.forward = forward
        student.eval()
        for module, training in teacher_modes:
            module.training = training
    return HealReport(
        steps=recipe.steps,
        train_loss=train_loss,
        validation_loss=validation_loss,
        seconds=time.perf_counter() - start,
        mixed_precision=accelerator.mixed_precision,
        num_processes=accelerator.num_processes,
        distributed_type=accelerator.distributed_type.value,
    )


def _take_step(
    step: int,
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: AcceleratedOptimizer,
    scheduler: AcceleratedScheduler,
    objective: Objective,
    batches: Iterator[Batch],
    recipe: HealRecipe,
) -> float:
    """Take one optimiser step and return the loss before it, averaged over batches and processes."""
    model.train()
    total = torch.zeros((), device=accelerator.device)
    for batch in islice(batches, recipe.gradient_accumulation_steps):
        with accelerator.accumulate(model):
            with accelerator.autocast():
                loss = objective.train(model, batch)
            total += loss.detach() / recipe.gradient_accumulation_steps
            accelerator.backward(loss)
    mean = accelerator.reduce(total, "mean").item()  # all processes see the same value, so all stop together
    if not math.isfinite(mean):
        raise LayerFuseError(
            f"the loss is {mean} at step {step} of {recipe.steps}: lower heal.learning_rate={recipe.learning_rate}, "
            f"raise heal.warmup_ratio={recipe.warmup_ratio}, or set heal.mixed_precision to 'no'."
        )
    accelerator.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    return mean


def _validate(
    student: PreTrainedModel, batches: Iterable[Batch], objective: Objective, accelerator: Accelerator
) -> float:
    """Mean loss over all targets; each process takes its share of the batches, none twice."""
    total = targets = 0.0
    student.eval()
    with torch.no_grad(), accelerator.autocast():
        for batch in islice(batches, accelerator.process_index, None, accelerator.num_processes):
            batch = {name: value.to(accelerator.device) for name, value in batch.items()}
            count = objective.count(batch)
            if count:
                total += objective.validate(student, batch).item() * count
                targets += count
    total, targets = accelerator.reduce(torch.tensor([total, targets], device=accelerator.device), "sum").tolist()
    if not targets:
        raise DataError(
            "there are no validation batches: pass a DataLoader or a list, which can be read again and again."
        )
    return total / targets


def _cycle(batches: Iterable[Batch]) -> Iterator[Batch]:
    while True:
        batch = None
        for batch in batches:
            yield batch
        if batch is None:
            raise DataError("there are no training batches: use more rows or a smaller batch size.")


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Every trainable parameter once, however often it is shared; norms and biases do not decay."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in trainable if parameter.dim() >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trainable if parameter.dim() < 2], "weight_decay": 0.0},
    ]


def _check(
    student: PreTrainedModel, recipe: HealRecipe, teacher: PreTrainedModel | None, matches: Sequence[Match]
) -> None:
    for field, needed in (("kl_weight", None), ("hidden_weight", "hidden"), ("attention_weight", "attention")):
        weight = getattr(recipe, field)
        if weight > 0 and teacher is None:
            raise RecipeError(f"heal.{field}={weight} needs a teacher: pass teacher=, or set heal.{field} to 0.")
        if weight > 0 and needed and not any(match.kind == needed for match in matches):
            raise RecipeError(
                f"heal.{field}={weight} needs to know which layers answer to each other: pass "
                f"matches=layer_map(student, teacher, plan), or set heal.{field} to 0."
            )
    if any(parameter.dtype == torch.float16 for parameter in student.parameters()):
        raise LayerFuseError(
            "the student is in float16, whose small updates round to zero: load it with dtype=torch.float32; "
            "heal.mixed_precision decides what it computes in."
        )


def _accelerator(student: PreTrainedModel, recipe: HealRecipe) -> Accelerator:
    handlers = []
    if getattr(student, "base_model", None) is student:
        # A body without a head may have parts that its hidden states do not depend on, such as the pooler of BERT.
        handlers.append(DistributedDataParallelKwargs(find_unused_parameters=True))
    try:
        return Accelerator(mixed_precision=_mixed_precision(recipe), kwargs_handlers=handlers)
    except ValueError as error:
        raise RecipeError(f"heal.mixed_precision={recipe.mixed_precision!r} cannot be had here: {error}") from error


def _mixed_precision(recipe: HealRecipe) -> str | None:
    """What the recipe names; for `auto`, None (what Accelerate was told), else what the device is fast in.

    `accelerate launch` says "no" also where the user said nothing, so only another word of it counts.
    """
    if recipe.mixed_precision != "auto":
        return recipe.mixed_precision
    if is_initialized() or os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no":
        return None
    device = process_state().device
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    if device.type == "cpu":
        flags = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch cannot tell
        return "bf16" if flags.get("avx512_bf16") or flags.get("amx_bf16") else "no"
    return "no"
