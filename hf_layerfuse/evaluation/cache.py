"""Measurement cache: numbers in a file that names the measured model and device."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import LayerFuseError
from .whole_file import write_whole

FORMAT = 1


class MeasurementCache:
    """Cache of numbers by key, in a JSON file that records their conditions; each number is saved once it is known.

    Args:
        path: Path of the file; None keeps the cache in memory.
        about: Conditions of the measurement, as JSON types.

    Raises:
        LayerFuseError: The file has other conditions, or is not a valid measurement cache.
    """

    def __init__(self, path: Path | None, about: Mapping[str, Any]) -> None:
        self.path, self.about = path, {"format": FORMAT, **json.loads(json.dumps(about))}
        self.values: dict[str, Any] = {}
        if path is not None and path.is_file():
            try:
                tree = json.loads(path.read_text(encoding="utf-8"))
                known, self.values = dict(tree["about"]), dict(tree["values"])
            except (ValueError, KeyError, TypeError) as error:
                raise LayerFuseError(
                    f"{path} is not a valid measurement cache: {error!r}. Delete it, or give another folder."
                ) from error
            changed = [name for name in {**known, **self.about} if known.get(name) != self.about.get(name)]
            if changed:
                what = ", ".join(
                    f"{name} was {known.get(name)!r} and is {self.about.get(name)!r}" for name in sorted(changed)
                )
                raise LayerFuseError(
                    f"{path} was measured under other conditions: {what[:600]}. Delete it to measure anew, or give "
                    "another folder."
                )

    def put(self, values: Mapping[str, Any]) -> None:
        """Add numbers to the cache, also on disk."""
        self.values |= values
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, json.dumps({"about": self.about, "values": self.values}, indent=1) + "\n")
