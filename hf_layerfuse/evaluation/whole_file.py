"""Files that appear whole, or stay as they were."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write a file under a temporary name beside it, then rename it.

    Args:
        path: Path of the file, in an existing directory.
        text: Content, which is encoded in UTF-8.

    Raises:
        OSError: The file cannot be written; its earlier content stays.
    """
    fresh = path.with_name(f".{path.name}-{os.getpid()}.partial")
    try:
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
