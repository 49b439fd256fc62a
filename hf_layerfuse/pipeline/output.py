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

MARK = "results.json"  # the file by which an earlier result is known


def check_output(path: str | Path, overwrite: bool, keep: Iterable[str | None] = ()) -> None:
    """Refuse an output directory that cannot be written, or whose replacement would destroy something.

    Args:
        path: directory to be, see `new_directory`.
        overwrite: the user allows to replace an earlier result there. Only that: a directory with anything else in it
            is never replaced.
        keep: paths that must not lie inside `path`, such as the model and the data of a run. What is not a path is
            passed over.

    Raises:
        CheckpointError: for each of these.
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
                f"output_dir={str(path)!r} is not empty: choose another directory, or pass --overwrite to replace it."
            )
        if not (target / MARK).is_file():
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
        raise CheckpointError(f"output_dir={str(path)!r} cannot be written: {error}. Choose another.") from error


def unfinished(path: str | Path, run: object) -> Path:
    """Where a run that will write to `path` keeps what it has done so far, so that the same one can go on from there.

    Args:
        path: directory to be.
        run: JSON types that make a run what it is: another one has another place.
    """
    path = Path(path).absolute()
    digest = hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()[:10]
    return path.with_name(f".{path.name}-{digest}.unfinished")


def write_whole(path: Path, text: str) -> None:
    """Write a file that appears whole, or stays as it was before."""
    fresh = path.with_name(f".{path.name}-{os.getpid()}.partial")
    try:
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


@contextmanager
def new_directory(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A fresh directory to write to, which takes the name `path` when the block ends without an exception.

    On an error, or Ctrl-C, what was written is removed and what was at `path` before is still there. What killed
    processes have left of it is removed when the block has ended well.

    Raises:
        CheckpointError: as `check_output` does.
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
