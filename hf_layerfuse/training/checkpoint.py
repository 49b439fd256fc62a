"""Training state on disk: each checkpoint is complete or absent, and names its run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import Tensor

from ..errors import CheckpointError, LayerFuseError
from ..evaluation.whole_file import write_whole


@dataclass
class Progress:
    """Progress of a training.

    Attributes:
        step: Optimiser steps taken.
        epoch: Epoch of the training batches.
        batch: Number of batches used in that epoch.
        train_loss: Pairs (step, loss) of every step.
        validation_loss: Pairs (step, loss) of every validation.
        seconds: Wall-clock time of all sessions.
        homotopy: Pairs (step, a of each `Blend` activation by its path) of every validation.
        counts_from: First step whose weights are eligible as the result.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    train_loss: list[tuple[int, float]] = field(default_factory=list)
    validation_loss: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
    homotopy: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    counts_from: int = 0

    @property
    def best_step(self) -> int:
        """First step with the lowest eligible validation loss, else the last step."""
        rows = [row for row in self.validation_loss if row[0] >= self.counts_from]
        return min(rows, key=lambda row: row[1])[0] if rows else self.step


class Checkpoints:
    """Checkpoints of one run in a folder: the latest one, and the one with the lowest validation loss.

    Accelerate writes weights, optimiser, scheduler and random states (sharded if the run is); a `Progress` is beside
    them as JSON. A checkpoint is written under another name and then renamed, so that a process that dies meanwhile
    leaves the previous one.

    Args:
        directory: Folder of this run, created if it is missing.
        accelerator: Accelerator that prepared the model, the optimiser and the scheduler.
        run: Identity of the run by dotted name, as JSON types. Checkpoints of another run are an error.

    Raises:
        CheckpointError: The folder has checkpoints of another run, or other files.
    """

    def __init__(self, directory: Path, accelerator: Accelerator, run: Mapping[str, Any]) -> None:
        self.directory, self.accelerator = Path(directory), accelerator
        run = json.loads(json.dumps(run))
        if accelerator.is_main_process:
            try:
                self._claim(run)
            except OSError as error:
                raise CheckpointError(
                    f"{self.directory} cannot hold checkpoints: {error}. Make room, or give another folder."
                ) from error
        accelerator.wait_for_everyone()
        self._hook = accelerator.register_save_state_pre_hook(_without_copies)

    def close(self) -> None:
        """Restore the accelerator."""
        self._hook.remove()

    def _claim(self, run: dict[str, Any]) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / "run.json"
        if path.is_file():
            known = _read(path)
            changed = [name for name in {**known, **run} if known.get(name) != run.get(name)]
            if changed:
                what = ", ".join(f"{name} was {known.get(name)!r} and is {run.get(name)!r}" for name in sorted(changed))
                raise CheckpointError(
                    f"{self.directory} has checkpoints of another run: {what[:600]}. To resume, use the same "
                    "settings. To start afresh, give another folder, or delete this one."
                )
        elif any(file.suffix != ".tmp" for file in self.directory.iterdir()):  # left by an interrupted write
            raise CheckpointError(f"{self.directory} is not empty and holds no checkpoints: give another folder.")
        else:
            write_whole(path, json.dumps(run) + "\n")
        for stale in self.directory.glob("*.partial"):
            shutil.rmtree(stale)

    def _steps(self) -> list[int]:
        return sorted(int(path.name.removeprefix("step-")) for path in self.directory.glob("step-*[0-9]"))

    def _path(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}"

    def resume(self) -> Progress:
        """Load the latest checkpoint, if there is one."""
        steps = self._steps()
        return self.load(steps[-1]) if steps else Progress()

    def load(self, step: int) -> Progress:
        """Load the checkpoint of a step.

        Raises:
            CheckpointError: The checkpoint is damaged.
        """
        path = self._path(step)
        try:
            tree = _read(path / "progress.json")
            self.accelerator.load_state(str(path))
            progress = Progress(**tree)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # damaged files raise a dozen kinds of errors
            others = [self._path(other).name for other in self._steps() if other != step]
            instead = f"it to resume from {others[-1]}, or " if others else ""
            what = f"{type(error).__name__}: {str(error)[:300]}"
            raise CheckpointError(
                f"the checkpoint {path} cannot be read: {what}. Delete {instead}the whole folder to start afresh."
            ) from error
        for name in ("train_loss", "validation_loss", "homotopy"):
            setattr(progress, name, [tuple(row) for row in getattr(progress, name)])
        return progress

    def save(self, progress: Progress) -> None:
        """Write a checkpoint, then remove all others but the best.

        Raises:
            LayerFuseError: The checkpoint cannot be written; the previous one is kept.
        """
        path = self._path(progress.step)
        partial = path.with_suffix(".partial")
        accelerator = self.accelerator
        try:
            accelerator.save_state(str(partial))
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                write_whole(partial / "progress.json", json.dumps(asdict(progress)) + "\n")
                if path.is_dir():  # of a run that resumed from an earlier checkpoint
                    shutil.rmtree(path)
                partial.rename(path)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch's file errors are RuntimeErrors
            shutil.rmtree(partial, ignore_errors=True)
            raise LayerFuseError(
                f"cannot write a checkpoint to {path}: {str(error)[:300]}. Make room, or give another folder; the "
                "previous checkpoint is complete, and the same command resumes from it."
            ) from error
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            for step in self._steps():
                if step not in (progress.step, progress.best_step):
                    shutil.rmtree(self._path(step))


def _without_copies(models: list[Any], weights: list[dict[str, Tensor]], folder: str) -> None:
    """Write a shared tensor once. Accelerate does so too, but with a warning every time."""
    for state in weights:
        seen: set[tuple[Any, ...]] = set()
        for name, tensor in list(state.items()):
            place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            if tensor.numel() and place in seen:
                del state[name]
            seen.add(place)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
