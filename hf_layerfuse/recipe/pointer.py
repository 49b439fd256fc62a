"""Pointers of git-lfs: small text files that a clone without git-lfs has in place of large ones."""

import os
from pathlib import Path

_START = b"version https://git-lfs.github.com/spec/"
_MOST_BYTES = 1024


def is_pointer(file: str | os.PathLike) -> bool:
    """Whether a file is a pointer of git-lfs."""
    file = Path(file)
    if not file.is_file() or file.stat().st_size > _MOST_BYTES:
        return False
    with file.open("rb") as content:
        return content.read(len(_START)) == _START
