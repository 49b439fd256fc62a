"""Retrain a fused model on Accelerate, with the original model as teacher."""

import contextlib
import dataclasses
import math
import os
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import is_initialized
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, broadcast_object_list, set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from .checkpoint import Checkpoints, Progress
from .errors import DataError, LayerFuseError, RecipeError
from .lora import low_rank
from .mixture import Mixture
from .objective import Batch, Match, Objective
from .processes import process_state
from .recipe import HealRecipe
from .sharding import one_unit_for_shared

EXPLOSION = 10
"""A training loss so many times that of the first step, or 1 where that was less, has exploded."""


@dataclasses.dataclass(frozen=True)
class HealReport:
    """What happened while healing; `dataclasses.asdict` of it is JSON.

    Attributes:
        steps: optimiser steps taken, fewer than asked for where `patience` ended the training.
        best_step: the step whose weights the student has now: that of the least validation loss, else the last.
        train_loss: (step, loss) of every step, before its update, averaged over processes and accumulated batches.
        validation_loss: (step, loss) before the first step, every `eval_every` steps and at the end.
        seconds: wall-clock time, validation included; of all sittings, where it was interrupted.
        mixed_precision: `no`, `bf16` or `fp16`, as resolved.
        num_processes: how many trained together.
        distributed_type: as Accelerate names it, such as `NO` or `MULTI_GPU`.
    """

    steps: int
    best_step: int
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
    frozen: Collection[str] = (),
    mixed: Mapping[str, Sequence[Tensor]] | None = None,
    validation_batches: Iterable[Batch] | None = None,
    seed: int = 0,
    accelerator: Accelerator | None = None,
    checkpoints: Path | str | None = None,
) -> HealReport:
    """Train `student` in place for `recipe.steps` optimiser steps, and leave it with the weights that validated best.

    The loss is `ce_weight` x cross-entropy, the model's own loss from `labels`, + `kl_weight` x distillation. Batches
    without labels have no cross-entropy. Distillation is T^2 x KL(teacher || student) on `logits` (Hinton et al. 2015,
    https://arxiv.org/abs/1503.02531): per row, or per position that predicts a next token. Models without logits
    learn the teacher's last hidden states instead, by the mean squared error over unmasked tokens. `hidden_weight` and
    `attention_weight` add the relative squared errors of inner states, over unmasked tokens.

    Under `accelerate launch` each process reads its share of the batches, so a step sees batch x processes x
    accumulation rows.

    With `checkpoints`, the state is written at every validation, and a call with the same arguments goes on from
    there: on one CPU process, a run that was killed at any moment and started again ends with the same weights, to the
    bit, as one that was not.

    Args:
        student: the model to train, in float32 or bfloat16; it ends in eval mode, on the device of the accelerator.
        train_batches: read again and again; the order of an epoch depends on `seed` and the epoch alone. `heal` keeps
            its batch size.
        recipe: all settings of the training.
        teacher: model with the same outputs; moved to the device, otherwise left as it is.
        matches: whose outputs `hidden_weight` and `attention_weight` compare: `layer_map(student, teacher, plan)`.
        frozen: names of parameters that stay as they are, such as `fused_parameters(student, plan)`.
        mixed: weights that parameters are mixed from while training, `mixed_weights(student, teacher, plan)`; see
            `Mixture`.
        validation_batches: batches (the same ones every time) whose loss is reported, and decides which weights are
            kept: cross-entropy, or distillation where there are no labels.
        seed: of the order of batches, and of dropout, different in each process and step.
        accelerator: one that is set up already; its mixed precision and trackers hold then. Its accumulation and the
            seed of its samplers are set here.
        checkpoints: folder for the state of this run, kept at the end; by default a temporary one, which keeps the best
            weights.

    Raises:
        RecipeError: the recipe asks for distillation without a teacher, or of layers without `matches`, for a tracker
            that is not installed, or for gradient checkpointing of a model that has none.
        DataError: there are no batches, or no loss can be taken from them.
        CheckpointError: `checkpoints` are those of another run, or damaged.
        LayerFuseError: the student is in float16, its outputs do not fit the teacher's, a checkpoint cannot be written,
            or the loss is not finite or explodes; the checkpoint before that is kept.
    """
    _check(student, recipe, teacher, matches)
    if not any(p.requires_grad for name, p in student.named_parameters() if name not in frozen):
        raise RecipeError("every parameter is frozen, so there is nothing to train: freeze fewer of them.")
    own = accelerator is None
    accelerator = accelerator or _accelerator(student, recipe)
    accelerator.gradient_accumulation_steps, accelerator.step = recipe.gradient_accumulation_steps, 0
    # A step always averages the same number of batches, also where an epoch ends in the middle of it.
    accelerator.gradient_state.plugin_kwargs["sync_with_dataloader"] = False
    accelerator.dataloader_config.use_seedable_sampler, accelerator.dataloader_config.data_seed = True, seed
    with contextlib.ExitStack() as stack:
        stack.enter_context(low_rank(student, recipe.lora_rank))
        stack.enter_context(_training(student, recipe, teacher, frozen))
        folder = checkpoints
        if folder is None and validation_batches is not None:
            folder = stack.enter_context(_temporary_folder(accelerator))
        mixture = Mixture(student, mixed) if mixed else None
        loop = _Loop(student, train_batches, recipe, teacher, matches, mixture, validation_batches, seed, accelerator)
        if folder is not None:
            loop.resume(Path(folder))
        if own and recipe.log_with:
            accelerator.init_trackers("hf_layerfuse", config=dataclasses.asdict(recipe))
            stack.callback(accelerator.end_training)
        progress = loop.run()
    return HealReport(
        steps=progress.step,
        best_step=progress.best_step,
        train_loss=progress.train_loss,
        validation_loss=progress.validation_loss,
        seconds=progress.seconds,
        mixed_precision=accelerator.mixed_precision,
        num_processes=accelerator.num_processes,
        distributed_type=accelerator.distributed_type.value,
    )


class _Loop:
    """One training, prepared by Accelerate; `progress` says where it stands."""

    def __init__(
        self,
        student: PreTrainedModel,
        train_batches: DataLoader,
        recipe: HealRecipe,
        teacher: PreTrainedModel | None,
        matches: Sequence[Match],
        mixture: Mixture | None,
        validation_batches: Iterable[Batch] | None,
        seed: int,
        accelerator: Accelerator,
    ) -> None:
        self.student, self.recipe, self.seed, self.accelerator = student, recipe, seed, accelerator
        self.mixture, self.validation_batches = mixture, validation_batches
        mixed = set(map(id, mixture.targets if mixture else ()))
        trained = [p for p in student.parameters() if p.requires_grad and id(p) not in mixed]
        if mixture is not None:
            mixture.to(accelerator.device)
            accelerator.prepare_model(mixture, evaluation_mode=True)  # part of every checkpoint, and wrapped by nothing
            trained += mixture.parameters()
        self.trained = trained
        optimizer = torch.optim.AdamW(_parameter_groups(trained, recipe.weight_decay), lr=recipe.learning_rate)
        # A prepared scheduler moves once per process unless it was told otherwise: its length counts those moves.
        alone = accelerator.split_batches or not accelerator.step_scheduler_with_optimizer
        moves = 1 if alone else accelerator.num_processes
        warmup = round(recipe.warmup_ratio * recipe.steps)
        scheduler = get_cosine_schedule_with_warmup(optimizer, warmup * moves, recipe.steps * moves)
        sharded = accelerator.distributed_type == DistributedType.FSDP
        with one_unit_for_shared(student, accelerator.state.fsdp_plugin if sharded else None):
            prepared = accelerator.prepare(student, optimizer, train_batches, scheduler)
        self.model, self.optimizer, self.loader, self.scheduler = prepared
        if teacher is not None:
            teacher.to(accelerator.device).eval()
        self.objective = Objective(recipe, student, teacher, matches)
        self.progress, self.checkpoints = Progress(), None

    def resume(self, folder: Path) -> None:
        """Keep checkpoints in a folder, and go on from what is there."""
        run = {f"heal.{name}": value for name, value in dataclasses.asdict(self.recipe).items()}
        run |= {f"config.{name}": value for name, value in self.student.config.to_dict().items()}
        run |= {"seed": self.seed, "number of processes": self.accelerator.num_processes}
        self.checkpoints = Checkpoints(folder, self.accelerator, run)
        self.progress = self.checkpoints.resume()

    def run(self) -> Progress:
        """Train to the end; returns how it went."""
        recipe, progress = self.recipe, self.progress
        start = time.perf_counter() - progress.seconds
        batches = self._batches()
        hidden = None if self.accelerator.is_main_process else True
        with tqdm(total=recipe.steps, initial=progress.step, desc="Healing", unit="step", disable=hidden) as bar:
            if progress.step == 0 and not progress.validation_loss:
                self._evaluate()
            while progress.step < recipe.steps and not self._stalled():
                loss = self._step(batches)
                progress.step += 1
                progress.train_loss.append((progress.step, loss))
                progress.seconds = time.perf_counter() - start
                self.accelerator.log({"train/loss": loss, "train/lr": self._rate()}, step=progress.step)
                bar.update()
                bar.set_postfix(loss=f"{loss:.4f}")
                if progress.step % recipe.eval_every == 0 or progress.step == recipe.steps:
                    self._evaluate()
        progress.seconds = time.perf_counter() - start
        if progress.best_step != progress.step:
            self.checkpoints.load(progress.best_step)
        return progress

    def _batches(self) -> Iterator[Batch]:
        """Training batches without end, from where the progress is."""
        progress = self.progress
        while True:
            for part in (self.loader, getattr(self.loader, "collate_fn", None)):
                if hasattr(part, "set_epoch"):
                    part.set_epoch(progress.epoch)
            left = self.loader
            if progress.batch:
                left = self.accelerator.skip_first_batches(self.loader, progress.batch)
            for batch in left:
                progress.batch += 1
                yield batch
            if not progress.batch:
                raise DataError("there are no training batches: use more rows or a smaller batch size.")
            progress.epoch, progress.batch = progress.epoch + 1, 0

    def _step(self, batches: Iterator[Batch]) -> float:
        """Take one optimiser step and return the loss before it, averaged over batches and processes."""
        accelerator, recipe = self.accelerator, self.recipe
        self.model.train()
        if self.mixture is not None:
            set_seed(self.seed + self.progress.step)  # the same weights in all processes
            self.mixture.draw()
        total = torch.zeros((), device=accelerator.device)
        for part in range(recipe.gradient_accumulation_steps):
            batch = next(batches)
            # after the loader has drawn what it wants: then it does not matter where a run was interrupted
            done = self.progress.step * recipe.gradient_accumulation_steps + part
            set_seed(self.seed + done * accelerator.num_processes + accelerator.process_index)
            with accelerator.accumulate(self.model):
                with accelerator.autocast():
                    loss = self.objective.train(self.model, batch)
                total += loss.detach() / recipe.gradient_accumulation_steps
                accelerator.backward(loss)
        mean = accelerator.reduce(total, "mean").item()  # all processes see the same value, so all stop together
        self._check_loss(mean)
        parameters = self.model.parameters()
        if self.mixture is not None:
            self.mixture.hand_on()
            parameters = self.trained
        accelerator.clip_grad_norm_(parameters, recipe.max_grad_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return mean

    def _check_loss(self, loss: float) -> None:
        recipe, progress = self.recipe, self.progress
        first = progress.train_loss[0][1] if progress.train_loss else loss
        if math.isfinite(loss) and loss <= EXPLOSION * max(first, 1.0):
            return
        kept = ""
        if self.checkpoints is not None and progress.validation_loss:
            kept = f" The checkpoint of step {progress.best_step} in {self.checkpoints.directory} is whole."
        raise LayerFuseError(
            f"the loss is {loss} at step {progress.step + 1} of {recipe.steps}, after {first} at the first: lower "
            f"heal.learning_rate={recipe.learning_rate}, raise heal.warmup_ratio={recipe.warmup_ratio}, or set "
            f"heal.mixed_precision to 'no'.{kept}"
        )

    def _rate(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def _evaluate(self) -> None:
        """Take the validation loss, and write a checkpoint."""
        progress = self.progress
        if self.mixture is not None:
            self.mixture.settle()
        if self.validation_batches is not None:
            loss = _validate(self.student, self.validation_batches, self.objective, self.accelerator)
            progress.validation_loss.append((progress.step, loss))
            self.accelerator.log({"validation/loss": loss}, step=progress.step)
        if self.checkpoints is not None:
            self.checkpoints.save(progress)

    def _stalled(self) -> bool:
        """Whether so many validations as `patience` found nothing better than the best one."""
        patience, best = self.recipe.patience, self.progress.best_step
        return patience is not None and sum(step > best for step, _ in self.progress.validation_loss) >= patience


@contextlib.contextmanager
def _training(
    student: PreTrainedModel, recipe: HealRecipe, teacher: PreTrainedModel | None, frozen: Collection[str]
) -> Iterator[None]:
    """What training changes in the models, and is put back at its end."""
    fixed = [student.get_parameter(name) for name in frozen]
    trained = [parameter for parameter in fixed if parameter.requires_grad]
    forward, caches = vars(student).get("forward"), getattr(student.config, "use_cache", None)
    recomputes = any(getattr(module, "gradient_checkpointing", False) for module in student.modules())
    teacher_modes = [] if teacher is None else [(module, module.training) for module in teacher.modules()]
    try:
        for parameter in fixed:
            parameter.requires_grad_(False)
        if caches:
            student.config.use_cache = False  # nothing is generated here
        if recipe.gradient_checkpointing:
            _recompute(student, True)
        yield
    finally:
        if recipe.gradient_checkpointing and not recomputes:
            _recompute(student, False)
        if caches:
            student.config.use_cache = caches
        # Accelerate wraps `forward` for mixed precision; its `unwrap_model` would strip the decorators of transformers
        # as well, so the class's own `forward` is brought back here.
        for name in ("forward", "_original_forward"):
            vars(student).pop(name, None)
        if forward is not None:
            student.forward = forward
        student.eval()
        for parameter in trained:
            parameter.requires_grad_(True)
        for module, training in teacher_modes:
            module.training = training


def _recompute(model: PreTrainedModel, on: bool) -> None:
    """Gradient checkpointing, which transformers 5.2x renames."""
    word = "enable" if on else "disable"
    method = getattr(model, f"activation_checkpointing_{word}", None) or getattr(
        model, f"gradient_checkpointing_{word}"
    )
    method(*([{"use_reentrant": False}] if on else []))


@contextlib.contextmanager
def _temporary_folder(accelerator: Accelerator) -> Iterator[str]:
    """One empty folder for all processes, on the disk of the main one."""
    with tempfile.TemporaryDirectory(prefix="layerfuse-") as own:
        yield broadcast_object_list([own])[0]
        accelerator.wait_for_everyone()


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


def _parameter_groups(trained: Sequence[nn.Parameter], weight_decay: float) -> list[dict]:
    """Norms and biases do not decay."""
    return [
        {"params": [parameter for parameter in trained if parameter.dim() >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trained if parameter.dim() < 2], "weight_decay": 0.0},
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
    if recipe.gradient_checkpointing and not student.supports_gradient_checkpointing:
        raise RecipeError(f"{type(student).__name__} has no gradient checkpointing: set it to false.")
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
    # DeepSpeed has to be told at once, and is where its configuration says "auto"
    options: dict[str, Any] = {"gradient_accumulation_steps": recipe.gradient_accumulation_steps}
    if recipe.log_with:
        known = sorted(str(tracker) for tracker in get_available_trackers())
        if recipe.log_with not in known:
            raise RecipeError(
                f"heal.log_with={recipe.log_with!r} is not installed, or no tracker that Accelerate knows; at hand "
                f"are: {', '.join(known) or 'none'}. Install it, or leave heal.log_with out."
            )
        options |= {"log_with": recipe.log_with, "project_dir": recipe.log_dir}
    if recipe.compile:
        options["dynamo_backend"] = "inductor"
    try:
        return Accelerator(mixed_precision=_mixed_precision(recipe), kwargs_handlers=handlers, **options)
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
