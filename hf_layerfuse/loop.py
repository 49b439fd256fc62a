"""One training, prepared by Accelerate: steps, validations, checkpoints."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from .checkpoint import Checkpoints, Progress
from .errors import DataError, TrainingError
from .mixture import Mixture
from .objective import Batch, Match, Objective
from .recipe import HealRecipe
from .sharding import one_unit_for_shared

EXPLOSION = 10
"""A training loss so many times that of the first step, or 1 where that was less, has exploded."""


class Loop:
    """What `heal` does in steps; `progress` says where it stands. Its arguments are those of `heal`."""

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
        groups = _parameter_groups(trained, recipe.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, fused=True)
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
        raise TrainingError(
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
