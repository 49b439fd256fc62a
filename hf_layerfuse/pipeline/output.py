"""A directory that appears whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import CheckpointError
from ..methods.report import REPORT_FILE

MARK = "results.json"
"""File of the results of a run. It identifies an earlier result, as a report beside the weights does."""


def check_output(path: str | Path, overwrite: bool, keep: Iterable[str | None] = ()) -> None:
    """Refuse an output directory that cannot be written, or whose replacement would destroy something.

    Args:
        path: Output directory, see `new_directory`.
        overwrite: Permission to replace an earlier result there. A directory without one is never replaced.
        keep: Paths that must not lie inside `path`, such as the model and the data of a run. Names that do not exist
            as paths are ignored.

    Raises:
        CheckpointError: The directory cannot be written or must not be replaced.
    """
    target = Path(path).absolute()
    for source in keep:
        if source and Path(source).exists() and Path(source).resolve().is_relative_to(target.resolve()):
            raise CheckpointError(f"output_dir={str(path)!r} holds the input {source!r}: choose another directory.")
    if Path.cwd().is_relative_to(target.resolve()):
        raise CheckpointError(f"output_dir={str(path)!r} is the working directory: choose one inside it.")
    if target.is_dir() and any(target.iterdir()):
        if not overwrite:
            raise CheckpointError(
                f"output_dir={str(path)!r} is not empty: choose another directory, or replace it with --overwrite, in "
                "Python overwrite=True."
            )
        if not any((target / mark).is_file() for mark in (MARK, REPORT_FILE)):
            raise CheckpointError(
                f"output_dir={str(path)!r} holds no {MARK}, so it is not an earlier result and is not replaced: choose "
                "another directory, or empty this one yourself."
            )
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"output_dir={str(path)!r} is a file: choose a directory.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryDirectory(prefix=".layerfuse-", dir=target.parent).cleanup()
    except OSError as error:
        raise CheckpointError(
            f"output_dir={str(path)!r} cannot be written: {error}. Choose another directory."
        ) from error


def unfinished(path: str | Path, run: object) -> Path:
    """The directory where a run keeps its unfinished work, so that the same run can resume.

    Args:
        path: Output directory of the run.
        run: JSON types that identify the run; another run has another directory.
    """
    path = Path(path).absolute()
    digest = hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()[:10]
    return path.with_name(f".{path.name}-{digest}.unfinished")


def stamp(path: str | None) -> list[int] | None:
    """Number, total size and latest date of the files under a path, to detect changes; None without such a path."""
    if path is None or not Path(path).exists():
        return None
    stats = [file.stat() for file in (Path(path), *Path(path).rglob("*")) if file.is_file()]
    return [len(stats), sum(stat.st_size for stat in stats), max((stat.st_mtime_ns for stat in stats), default=0)]


@contextmanager
def new_directory(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A fresh directory to write to, which takes the name `path` when the block ends without an exception.

    On an error, or Ctrl-C, the new files are removed and the earlier content of `path` stays. Leftovers of killed
    processes are removed when the block ends without an exception.

    Raises:
        CheckpointError: Any error of `check_output`.
    """
    path = Path(path).absolute()
    check_output(path, overwrite)
    # beside the target, so that renaming stays within one file system
    fresh = Path(tempfile.mkdtemp(prefix=f".{path.name}-", suffix=".partial", dir=path.parent))
    try:
        yield fresh
        fresh.chmod(0o777 & ~_umask())  # mkdtemp lets only the owner in
        check_output(path, overwrite)
        if path.exists():
            _swap(fresh, path)
        else:
            fresh.rename(path)
        left = re.compile(rf"\.{re.escape(path.name)}-\w{{8}}\.(partial|old)")  # as mkdtemp names them
        for stale in (other for other in path.parent.iterdir() if left.fullmatch(other.name)):
            shutil.rmtree(stale, ignore_errors=True)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def _swap(fresh: Path, path: Path) -> None:
    retired = Path(tempfile.mkdtemp(prefix=f".{path.name}-", suffix=".old", dir=path.parent))
    try:
        path.rename(retired / "old")
        fresh.rename(path)
    except BaseException:
        if (retired / "old").exists() and not path.exists():
            (retired / "old").rename(path)
        retired.rmdir()
        raise
    shutil.rmtree(retired)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
