"""The report of one compression: what was done, what it costs, and what was tried."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..evaluation.whole_file import write_whole
from ..plan import Plan
from ..plan.words import describe

REPORT_FILE = "fusion_report.json"
"""File of a report, beside the weights. Transformers ignores it."""

FORMAT_VERSION = 1

_LINES = 4
"""Edits that the printed table shows."""


@dataclass(frozen=True, kw_only=True)
class FusionReport:
    """Report of `fuse`, `collapse` or `merge`, as `model.fusion_report`.

    `print(report)` shows a table. The notes of the plan hold the candidates that were tried, their losses, and the
    calibration loss before and after the refit.

    Attributes:
        method: Name of the method: `fusion`, `collapse` or `merge`.
        plan: Plan that was applied, with its notes.
        parameters: Number of unique parameters before and after.
        bytes: Size of the weights in memory before and after.
        seconds: Wall-clock time of the search and the refit.
    """

    method: str
    plan: Plan
    parameters: tuple[int, int]
    bytes: tuple[int, int]
    seconds: float

    def __str__(self) -> str:
        notes, changes = self.plan.notes, describe(self.plan)
        more = len(changes) - _LINES
        rows = [("method", self.method)]
        rows += [("" if place else "changes", change) for place, change in enumerate(changes[:_LINES])]
        rows += [("", f"and {more} more")] if more > 0 else []
        rows += [
            (name, f"{before:,} -> {after:,} ({after / before:.0%})")
            for name, (before, after) in (("parameters", self.parameters), ("bytes", self.bytes))
        ]
        if notes.refit is not None:
            kept = "" if notes.refit.kept else ", not kept"
            rows.append(("calibration loss", f"{notes.refit.before:.4g} -> {notes.refit.after:.4g} by the refit{kept}"))
        if notes.competition:
            rows.append(("candidates tried", f"{len(notes.competition)}"))
        rows.append(("seconds", f"{self.seconds:.1f}"))
        return "\n".join(f"{name:<17} {value}" for name, value in rows)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types."""
        return {
            "format_version": FORMAT_VERSION,
            "method": self.method,
            "plan": self.plan.to_dict(),
            "parameters": list(self.parameters),
            "bytes": list(self.bytes),
            "seconds": self.seconds,
        }

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> FusionReport:
        """Read a report from JSON types.

        Raises:
            CheckpointError: The JSON is not a report, or its format is newer than this release.
            PlanError: The plan in the report is invalid.
        """
        try:
            if tree["format_version"] != FORMAT_VERSION:
                raise CheckpointError(
                    f"the report has format version {tree['format_version']!r}, and this release of hf_layerfuse reads "
                    f"version {FORMAT_VERSION}: for a newer one, upgrade with `pip install -U hf-layerfuse`."
                )
            return cls(
                method=str(tree["method"]),
                plan=Plan.from_dict(tree["plan"]),
                parameters=tuple(map(int, tree["parameters"])),
                bytes=tuple(map(int, tree["bytes"])),
                seconds=float(tree["seconds"]),
            )
        except (LookupError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"not a readable report: {type(error).__name__}: {error}. Delete the file, or restore it."
            ) from error

    def save(self, directory: str | Path) -> Path:
        """Write `fusion_report.json` into a directory, beside the weights.

        Returns:
            Path of the file.
        """
        path = Path(directory) / REPORT_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(self.to_dict(), indent=1) + "\n")
        return path

    @classmethod
    def load(cls, directory: str | Path) -> FusionReport | None:
        """Read the report in a directory; None where there is none.

        Raises:
            CheckpointError: The file is damaged, or of a newer format.
        """
        path = Path(directory) / REPORT_FILE
        if not path.is_file():
            return None
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path} is not JSON: {error}. Delete the file, or restore it.") from error
