"""A directory that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import CheckpointError


def check_output(path: str | Path, overwrite: bool) -> None:
    """Raise `CheckpointError` where writing to `path` would destroy something that the user did not give up."""
    path = Path(path)
    if path.is_file():
        raise CheckpointError(f"output_dir={str(path)!r} is a file: choose a directory.")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise CheckpointError(
            f"output_dir={str(path)!r} is not empty: choose another directory, or pass --overwrite to replace it."
        )


@contextmanager
def new_directory(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A fresh directory to write to, which takes the name `path` when the block ends without an exception.

    On an error, or Ctrl-C, what was written is removed and what was at `path` before is still there.

    Raises:
        CheckpointError: `path` is a file, or a directory that is not empty and `overwrite` is false.
    """
    path = Path(path)
    check_output(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    # beside the target, so that renaming stays within one file system
    fresh = Path(tempfile.mkdtemp(prefix=f".{path.name}-", suffix=".partial", dir=path.parent))
    try:
        yield fresh
        fresh.chmod(0o777 & ~_umask())  # mkdtemp lets only the owner in
        check_output(path, overwrite)
        if path.exists():
            retired = Path(tempfile.mkdtemp(prefix=f".{path.name}-", suffix=".old", dir=path.parent))
            path.rename(retired / "old")
            fresh.rename(path)
            shutil.rmtree(retired)
        else:
            fresh.rename(path)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
