"""One training, prepared by Accelerate: steps, validations, checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from ..errors import DataError, TrainingError
from ..plan.heal_scope import HealScope
from ..recipe import HealRecipe
from .checkpoint import Checkpoints, Progress
from .homotopy import HomotopyPenalty
from .mixture import Mixture
from .objective import Batch, Objective
from .sharding import full_tensor, one_unit_for_shared

EXPLOSION = 10
"""Factor by which a training loss exceeds that of the first step (at least 1) when it has exploded."""


class Loop:
    """Training loop of `heal`, with its arguments; `progress` holds the current state."""

    def __init__(
        self,
        student: PreTrainedModel,
        train_batches: DataLoader,
        recipe: HealRecipe,
        teacher: PreTrainedModel | None,
        scope: HealScope,
        accelerator: Accelerator,
    ) -> None:
        self.student, self.recipe, self.scope, self.accelerator = student, recipe, scope, accelerator
        self.penalty = homotopy_penalty(student, recipe)
        self.mixture = mixture = Mixture(student, scope.mixed) if scope.mixed else None
        mixed = set(map(id, mixture.targets if mixture else ()))
        trained = [p for p in student.parameters() if p.requires_grad and id(p) not in mixed]
        if mixture is not None:
            mixture.to(accelerator.device)
            accelerator.prepare_model(mixture, evaluation_mode=True)  # part of every checkpoint, never wrapped
            trained += mixture.parameters()
        self.trained = trained
        groups = _parameter_groups(trained, recipe.weight_decay, self.penalty.parameters)
        optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, fused=True)
        # A prepared scheduler moves once per process by default, and its length counts those moves.
        alone = accelerator.split_batches or not accelerator.step_scheduler_with_optimizer
        moves = 1 if alone else accelerator.num_processes
        warmup = round(recipe.warmup_ratio * recipe.steps)
        scheduler = get_cosine_schedule_with_warmup(optimizer, warmup * moves, recipe.steps * moves)
        rates = torch.tensor([scheduler.lr_lambdas[0](step * moves) for step in range(recipe.steps)])
        self.shares = (rates.cumsum(0) / rates.sum()).tolist()  # share of the total learning rate after each step
        sharded = accelerator.distributed_type == DistributedType.FSDP
        with one_unit_for_shared(student, accelerator.state.fsdp_plugin if sharded else None):
            prepared = accelerator.prepare(student, optimizer, train_batches, scheduler)
        self.model, self.optimizer, self.loader, self.scheduler = prepared
        if teacher is not None:
            teacher.to(accelerator.device).eval()
        self.objective = Objective(recipe, student, teacher, scope.matches)
        self.progress, self.checkpoints = Progress(), None

    def resume(self, folder: Path, run: Mapping[str, Any]) -> None:
        """Keep checkpoints of a run in a folder, and resume from the latest one; see `Checkpoints`."""
        self.checkpoints = Checkpoints(folder, self.accelerator, run)
        self.progress = self.checkpoints.resume()

    def run(self, validation_batches: Iterable[Batch] | None, seed: int) -> Progress:
        """Train to the end and return the progress."""
        recipe, progress = self.recipe, self.progress
        start = time.perf_counter() - progress.seconds
        batches = self._batches()
        self.optimizer.zero_grad()  # an earlier training that was interrupted may have left gradients
        hidden = None if self.accelerator.is_main_process else True
        with tqdm(
            total=recipe.steps, initial=progress.step, desc="Healing", unit="step", disable=hidden, leave=False
        ) as bar:
            if progress.step == 0 and not progress.validation_loss:
                self._evaluate(validation_batches)
            while progress.step < recipe.steps and not self._stalled():
                rate = self.optimizer.param_groups[0]["lr"]
                loss = self._step(batches, seed)
                progress.step += 1
                progress.train_loss.append((progress.step, loss))
                progress.seconds = time.perf_counter() - start
                homotopy = {f"homotopy/{name}": a for name, a in self.penalty.values.items()}
                self.accelerator.log({"train/loss": loss, "train/lr": rate, **homotopy}, step=progress.step)
                bar.update()
                bar.set_postfix(loss=f"{loss:.4f}")
                if progress.step % recipe.eval_every == 0 or progress.step == recipe.steps:
                    self._evaluate(validation_batches)
        progress.seconds = time.perf_counter() - start
        if progress.best_step != progress.step:
            self.checkpoints.load(progress.best_step)
        return progress

    def _batches(self) -> Iterator[Batch]:
        """Endless training batches, from the current position."""
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

    def _step(self, batches: Iterator[Batch], seed: int) -> float:
        """Take one optimiser step and return the loss before it, averaged over the targets of all processes."""
        accelerator, recipe = self.accelerator, self.recipe
        parts = [next(batches) for _ in range(recipe.gradient_accumulation_steps)]
        shares = self._shares(parts)
        self.model.train()
        if self.mixture is not None:
            set_seed(seed + self.progress.step)  # the same weights in all processes
            self.mixture.draw()
        total = torch.zeros((), device=accelerator.device)
        for place, (batch, share) in enumerate(zip(parts, shares, strict=True)):
            # after the random draws of the loader, so that the place of an interruption does not matter
            done = self.progress.step * recipe.gradient_accumulation_steps + place
            set_seed(seed + done * accelerator.num_processes + accelerator.process_index)
            with accelerator.accumulate(self.model):
                with accelerator.autocast():
                    loss = self.objective.train(self.model, batch) * share
                total += loss.detach() / recipe.gradient_accumulation_steps
                accelerator.backward(loss)
        mean = accelerator.reduce(total, "mean").item()  # all processes see the same value, so all stop together
        first = self.progress.train_loss[0][1] if self.progress.train_loss else mean
        self._check(mean, "the loss", EXPLOSION * max(first, 1.0))
        parameters = self.model.parameters()
        if self.mixture is not None:
            self.mixture.scatter_gradients()
            parameters = self.trained
        norm = accelerator.clip_grad_norm_(parameters, recipe.max_grad_norm)
        if norm is not None and accelerator.scaler is None:  # a scaler skips such steps itself
            self._check(float(full_tensor(norm)), "the norm of the gradients")
        if not self.objective.reads_outputs:
            for parameter in self.model.parameters():  # an unused head would only decay
                if parameter.grad is not None and not full_tensor(parameter.grad).any():
                    parameter.grad = None
        rate = self.optimizer.param_groups[0]["lr"]
        self.optimizer.step()
        self.penalty.step(rate, self.shares[self.progress.step])
        self.scheduler.step()
        self.optimizer.zero_grad()
        return mean

    def _shares(self, parts: Sequence[Batch]) -> list[float]:
        """Weight of each batch in a step that gives all targets equal weight; the mean over all processes is 1."""
        accelerator = self.accelerator
        if len(parts) * accelerator.num_processes == 1:
            return [1.0]
        counts = torch.tensor([float(self.objective.count(batch)) for batch in parts], device=accelerator.device)
        mean = accelerator.reduce(counts, "mean").mean()
        return (counts / mean.clamp_min(1e-9)).tolist()

    def _check(self, value: float, what: str, most: float = math.inf) -> None:
        """Raise if `value` is not finite or exceeds `most`."""
        if math.isfinite(value) and value <= most:
            return
        recipe, progress = self.recipe, self.progress
        first = f", after a loss of {progress.train_loss[0][1]} at the first" if progress.train_loss else ""
        kept = ""
        if self.checkpoints is not None and progress.validation_loss:
            kept = f" The checkpoint of step {progress.best_step} in {self.checkpoints.directory} is whole."
        raise TrainingError(
            f"{what} is {value} at step {progress.step + 1} of {recipe.steps}{first}: lower "
            f"heal.learning_rate={recipe.learning_rate}, raise heal.warmup_ratio={recipe.warmup_ratio}, or set "
            f"heal.mixed_precision to 'no'.{kept}"
        )

    def _evaluate(self, batches: Iterable[Batch] | None) -> None:
        """Measure the validation loss and write a checkpoint."""
        progress, threshold = self.progress, self.scope.threshold
        if self.mixture is not None:
            self.mixture.average()
        if batches is not None:
            loss = _validate(self.student, batches, self.objective, self.accelerator)
            self._check(loss, "the validation loss")  # before a checkpoint of such weights is written
            progress.validation_loss.append((progress.step, loss))
            values = self.penalty.values
            if values:
                progress.homotopy.append((progress.step, values))
            if threshold is not None and any(a < 1 - threshold for a in values.values()):
                progress.counts_from = progress.step + 1
            self.accelerator.log({"validation/loss": loss}, step=progress.step)
        if self.checkpoints is not None:
            self.checkpoints.save(progress)

    def _stalled(self) -> bool:
        """Whether the last `patience` validations found no better weights."""
        patience, best = self.recipe.patience, self.progress.best_step
        return patience is not None and sum(step > best for step, _ in self.progress.validation_loss) >= patience


def homotopy_penalty(student: nn.Module, recipe: HealRecipe) -> HomotopyPenalty:
    """Homotopy penalty of a student's `Blend` activations.

    The mean rate of a cosine schedule is half of the peak. Strength `auto` therefore reduces each 1 - a to e^-5 of
    its value in its part of the training; no step goes further than nine tenths of the way.
    """
    strength = recipe.homotopy_strength
    if strength == "auto":
        parts = len(HomotopyPenalty(student, 0.0).activations) if recipe.progressive else 1
        strength = max(10.0, 5 * parts / (recipe.learning_rate * max(recipe.steps, 1)))
        strength = min(strength, 0.45 / recipe.learning_rate)
    return HomotopyPenalty(student, strength, progressive=recipe.progressive)


def _validate(
    student: PreTrainedModel, batches: Iterable[Batch], objective: Objective, accelerator: Accelerator
) -> float:
    """Mean loss over all targets; each process takes its share of the batches.

    All processes run equally many batches, because sharded models run together. A process without batches left repeats
    the last one, which counts only in another process.
    """
    total = targets = 0.0
    student.eval()
    turns = iter(batches)
    with torch.no_grad(), accelerator.autocast():
        while turn := list(islice(turns, accelerator.num_processes)):
            place = accelerator.process_index
            batch = {name: value.to(accelerator.device) for name, value in turn[min(place, len(turn) - 1)].items()}
            loss, count = objective.validate(student, batch).item(), objective.count(batch)
            if count and place < len(turn):
                total += loss * count
                targets += count
    total, targets = accelerator.reduce(torch.tensor([total, targets], device=accelerator.device), "sum").tolist()
    if not targets:
        raise DataError(
            "there are no validation batches: pass a DataLoader or a list, which can be read again and again."
        )
    return total / targets


def _parameter_groups(
    trained: Sequence[nn.Parameter], weight_decay: float, homotopy: Sequence[nn.Parameter]
) -> list[dict]:
    """Parameter groups: norms, biases and homotopy parameters have no weight decay; the latter form their own group."""
    apart = set(map(id, homotopy))
    rest = [parameter for parameter in trained if id(parameter) not in apart]
    groups = [
        {"params": [parameter for parameter in rest if parameter.dim() >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in rest if parameter.dim() < 2], "weight_decay": 0.0},
    ]
    own = [parameter for parameter in trained if id(parameter) in apart]
    return [*groups, {"params": own, "weight_decay": 0.0}] if own else groups
