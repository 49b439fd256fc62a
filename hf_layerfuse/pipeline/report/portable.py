"""Recipes and names as others can use them: without paths of one machine."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from ...recipe import HubRecipe, Recipe

PLACEHOLDER = "path/to/"
"""Stands for the folder of a local file or model."""


def is_local(name: str) -> bool:
    """Whether a name is that of a file or folder of this machine, and not of a repository on the Hub."""
    path = Path(name).expanduser()
    return path.exists() or path.is_absolute() or name.startswith((".", "~")) or ".." in path.parts


def base_name(name: str) -> str:
    """Hub name, or the last part of a local path."""
    return os.path.basename(_absolute(name)) if is_local(name) else name


def placeholder(name: str) -> str:
    """Hub name, or a local path whose folder is replaced."""
    return f"{PLACEHOLDER}{base_name(name)}" if is_local(name) else name


def portable(recipe: Recipe) -> Recipe:
    """The recipe that others need for the same result.

    Local models and data become placeholders, folders that a run writes become relative, and nothing is published or
    sent to a tracker.
    """
    data = recipe.data
    if data.name is None:
        files = {name: _absolute(path) for name in _SPLITS if (path := getattr(data, name)) is not None}
        # the part of the paths in which the splits differ, as in train/images and test/images
        folder = os.path.commonpath(list(map(os.path.dirname, files.values())))
        shown = {name: PLACEHOLDER + Path(os.path.relpath(path, folder)).as_posix() for name, path in files.items()}
        data = dataclasses.replace(data, **shown)
    else:
        data = dataclasses.replace(data, name=placeholder(data.name))
    sections = {
        section: dataclasses.replace(values, tables=_written(values.tables))
        for section in _TIMED
        if (values := getattr(recipe, section)) is not None and values.tables is not None
    }
    return dataclasses.replace(
        recipe,
        model=placeholder(recipe.model),
        output_dir=_written(recipe.output_dir),
        data=data,
        heal=dataclasses.replace(recipe.heal, log_with=None, log_dir=_written(recipe.heal.log_dir)),
        hub=HubRecipe(),
        **sections,
    )


_SPLITS = ("train", "validation", "test")

_TIMED = ("fusion", "merge")
"""Sections that may name a folder of measurements."""


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _written(path: str) -> str:
    """Folder that a run writes, in the current directory."""
    return os.path.basename(_absolute(path))
