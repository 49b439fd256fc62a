"""Results of a run: every figure of it, in memory and as `results.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..training.heal import HealReport
from .output import MARK
from .samples import Samples

FORMAT_VERSION = 1
"""Format of the results that this release writes. Release 0.1.0 wrote the same keys without a `format_version`."""

SAMPLES = "samples.json"
"""File of the sample outputs. It holds rows of the user's data, and so is never published."""

DAMAGED = (LookupError, TypeError, AttributeError, ValueError)
"""Errors of reading a tree that is not the results of a run."""


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Times of the forward passes of one model at one batch size.

    Attributes:
        median_ms: Median of the times.
        spread_ms: Distance between the quartiles.
        repeats: Number of timed passes.
        warmup: Number of untimed passes before those.
        threads: Number of CPU threads.
        device: Device of the model.
        dtype: Data type of the weights.
        input_shape: Shape of the input.
        speedup: Median time of the original divided by `median_ms`; both were measured side by side.
    """

    median_ms: float
    spread_ms: float
    repeats: int
    warmup: int
    threads: int
    device: str
    dtype: str
    input_shape: list[int]
    speedup: float

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Latency:
        return cls(**{name: tree[name] for name in cls.__dataclass_fields__})


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Size, speed and quality of one model.

    Attributes:
        parameters: Number of unique parameters.
        non_embedding_parameters: Number of unique parameters outside embeddings.
        bytes: Size of the saved weights.
        latency_ms: Median time of a forward pass by batch size; None where latency was not measured.
        latency: Details of these times by batch size.
        metrics: Quality by the name of the metric, and the amount of data it was measured on.
    """

    parameters: int
    non_embedding_parameters: int
    bytes: int
    latency_ms: Mapping[int, float] | None = None
    latency: Mapping[int, Latency] | None = None
    metrics: Mapping[str, Any]

    def with_latency(self, latency: Mapping[int, Latency]) -> Measurement:
        """The measurement with latencies by batch size."""
        times = {batch: row.median_ms for batch, row in latency.items()}
        return replace(self, latency_ms=times, latency=latency)

    def to_dict(self) -> dict[str, Any]:
        """The measurement as JSON types."""
        times = None if self.latency_ms is None else {str(batch): ms for batch, ms in self.latency_ms.items()}
        details = {} if self.latency is None else {str(batch): asdict(row) for batch, row in self.latency.items()}
        return {
            "parameters": self.parameters,
            "non_embedding_parameters": self.non_embedding_parameters,
            "bytes": self.bytes,
            "latency_ms": times,
            **({"latency": details} if details else {}),
            "metrics": dict(self.metrics),
        }

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Measurement:
        """Read a measurement from JSON types."""
        times, details = tree["latency_ms"], tree.get("latency")
        return cls(
            parameters=tree["parameters"],
            non_embedding_parameters=tree["non_embedding_parameters"],
            bytes=tree["bytes"],
            latency_ms=times and {int(batch): ms for batch, ms in times.items()},
            latency=details and {int(batch): Latency.from_dict(row) for batch, row in details.items()},
            metrics=dict(tree["metrics"]),
        )


@dataclass(frozen=True, kw_only=True)
class Goal:
    """Goal of one round of fusing and healing; neither is set where the recipe's own target is the goal.

    Attributes:
        keep_layers: Number of blocks that stay distinct.
        ratio: Share of the original's block parameters to remove.
    """

    keep_layers: int | None = None
    ratio: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields that are set."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class HealRound:
    """One round of fusing and healing.

    Attributes:
        goal: Goal of the round.
        report: Report of the healing.
    """

    goal: Goal
    report: HealReport

    def to_dict(self) -> dict[str, Any]:
        """Goal and report side by side, as JSON types."""
        return {**self.goal.to_dict(), **asdict(self.report)}

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> HealRound:
        """Read a round from JSON types."""
        fields = {name: tree[name] for name in HealReport.__dataclass_fields__}
        for pairs in ("train_loss", "validation_loss", "homotopy"):
            fields[pairs] = [(step, value) for step, value in fields[pairs]]
        return cls(Goal(keep_layers=tree.get("keep_layers"), ratio=tree.get("ratio")), HealReport(**fields))


@dataclass(frozen=True)
class RetrainedOriginal:
    """The original after the same training as the fused model.

    Attributes:
        measurement: Size, speed and quality; it has the shape of the original, and so its latency.
        report: Report of the training.
    """

    measurement: Measurement
    report: HealReport

    def to_dict(self) -> dict[str, Any]:
        """The measurement, with the report under `heal`, as JSON types."""
        return {**self.measurement.to_dict(), "heal": asdict(self.report)}

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> RetrainedOriginal:
        """Read a retrained original from JSON types."""
        return cls(Measurement.from_dict(tree), HealRound.from_dict(tree["heal"]).report)


@dataclass(frozen=True, kw_only=True)
class RunResults:
    """Results of a run.

    Attributes:
        before: Measurement of the original.
        fused: Measurement of the model after the last fusing, before it was healed.
        rounds: Rounds of healing, in order; empty without healing.
        healed: Measurement of the healed model; None without healing.
        retrained: The original after the same training; None where the recipe does not ask for it.
        metrics_on: Split that the metrics were measured on.
        recipe: Recipe as JSON types, with the names that the release that wrote it had.
        command: Command line of the run.
        environment: Versions of the libraries, the device, and the numbers of threads and processes.
        samples: Outputs of the original and of the result on a few rows of the data, which are kept in `samples.json`.
    """

    before: Measurement
    fused: Measurement
    rounds: tuple[HealRound, ...] = ()
    healed: Measurement | None = None
    retrained: RetrainedOriginal | None = None
    metrics_on: str
    recipe: Mapping[str, Any]
    command: str
    environment: Mapping[str, str]
    samples: Samples | None = None

    @property
    def heal(self) -> HealReport | None:
        """Report of the last healing; None without healing."""
        return self.rounds[-1].report if self.rounds else None

    @property
    def stages(self) -> dict[str, Measurement]:
        """Measurements by the name of their stage, in order."""
        stages = {"before": self.before, "fused": self.fused, "healed": self.healed}
        stages["original, retrained"] = self.retrained and self.retrained.measurement
        return {name: figures for name, figures in stages.items() if figures is not None}

    @property
    def last(self) -> Measurement:
        """Measurement of the model that the run wrote."""
        return self.fused if self.healed is None else self.healed

    def to_dict(self) -> dict[str, Any]:
        """The results as JSON types: the content of `results.json`."""
        rounds = [each.to_dict() for each in self.rounds]
        return {
            "format_version": FORMAT_VERSION,
            "before": self.before.to_dict(),
            "fused": self.fused.to_dict(),
            **({"heal": rounds[-1]} if rounds else {}),
            **({"rounds": rounds} if len(rounds) > 1 else {}),
            **({} if self.healed is None else {"healed": self.healed.to_dict()}),
            **({} if self.retrained is None else {"original_retrained": self.retrained.to_dict()}),
            "metrics_on": self.metrics_on,
            "recipe": dict(self.recipe),
            "command": self.command,
            "environment": dict(self.environment),
        }

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any], source: str | Path = MARK) -> RunResults:
        """Read results from JSON types. Unknown keys are ignored, so that other tools may add their own.

        Args:
            tree: JSON types, as `to_dict` or release 0.1.0 wrote them.
            source: Name of the folder or file, for error messages.

        Raises:
            CheckpointError: The format is newer than this release, or the tree is not the results of a run.
        """
        try:
            version = tree.get("format_version", FORMAT_VERSION)
            if isinstance(version, int) and version > FORMAT_VERSION:
                raise CheckpointError(
                    f"the results in {str(source)!r} have format version {version}; this release of hf_layerfuse reads "
                    f"versions up to {FORMAT_VERSION}: upgrade with `pip install -U hf-layerfuse`."
                )
            if version != FORMAT_VERSION:
                raise ValueError(f"format_version={version!r} is not a known version")
            retrained = tree.get("original_retrained")
            rounds = tree.get("rounds") or [tree[name] for name in ("heal",) if tree.get(name)]
            return cls(
                before=Measurement.from_dict(tree["before"]),
                fused=Measurement.from_dict(tree["fused"]),
                rounds=tuple(map(HealRound.from_dict, rounds)),
                healed=Measurement.from_dict(tree["healed"]) if tree.get("healed") else None,
                retrained=RetrainedOriginal.from_dict(retrained) if retrained else None,
                metrics_on=tree["metrics_on"],
                recipe=dict(tree["recipe"]),
                command=tree["command"],
                environment=dict(tree["environment"]),
            )
        except CheckpointError:
            raise
        except DAMAGED as error:
            raise invalid_result(source, error) from error

    @classmethod
    def load(cls, folder: str | Path) -> RunResults:
        """Read the `results.json` of a folder, and its samples if there are any.

        Raises:
            CheckpointError: A file is missing, damaged, or of a newer format.
        """
        try:
            tree = json.loads((Path(folder) / MARK).read_text(encoding="utf-8"))
            path, samples = Path(folder) / SAMPLES, None
            if path.is_file():
                samples = Samples.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, *DAMAGED) as error:
            raise invalid_result(folder, error) from error
        return replace(cls.from_dict(tree, folder), samples=samples)

    def save(self, folder: Path) -> None:
        """Write `results.json`, and `samples.json` if there are samples."""
        (folder / MARK).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        if self.samples is not None:
            tree = json.dumps(self.samples.to_dict(), indent=1, ensure_ascii=False)
            (folder / SAMPLES).write_text(f"{tree}\n", encoding="utf-8")


def invalid_result(source: str | Path, error: Exception) -> CheckpointError:
    """The error to raise where a folder or file is not the result of a run.

    Args:
        source: Name of the folder or file.
        error: Error that reading it raised.
    """
    what = f"{error!s} is missing" if isinstance(error, KeyError) else str(error)
    return CheckpointError(
        f"{str(source)!r} is not the result of a run: {what}. Name a folder that fuse.py has written, with its "
        f"plan.json and {MARK}."
    )
