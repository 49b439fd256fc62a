"""Progress on the terminal: the steps of a command with their time, without the bars of other libraries."""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import datasets
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers.utils import logging as transformers_logging

from ..errors import LayerFuseWarning
from ..training.distributed import process_state

_starts: list[float] = []
"""Start of the command that runs, for the elapsed time of `say`."""

_PACKAGE = __name__.partition(".")[0]


class _Said(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(f"{record.levelname.lower()}: {record.getMessage()}")


@contextmanager
def steps() -> Iterator[None]:
    """Count the time of `say` from here on, say warnings, and hide the progress bars of transformers and datasets.

    A run loads and writes weights many times, and each time transformers shows a bar. Downloads keep their bars.
    """
    bars, downloads, rows = (
        transformers_logging.is_progress_bar_enabled(),
        not are_progress_bars_disabled(),
        datasets.are_progress_bars_disabled(),
    )
    said = _Said()
    logging.getLogger(_PACKAGE).addHandler(said)
    _starts.append(time.monotonic())
    try:
        if bars:
            transformers_logging.disable_progress_bar()  # those of huggingface_hub too
        if downloads:
            enable_progress_bars()
        datasets.disable_progress_bars()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LayerFuseWarning)  # each is logged too
            yield
    finally:
        logging.getLogger(_PACKAGE).removeHandler(said)
        _starts.pop()
        if bars:
            transformers_logging.enable_progress_bar()
        if not downloads:
            disable_progress_bars()
        if not rows:
            datasets.enable_progress_bars()


def say(message: str) -> None:
    """Print a step and the seconds since the command began to standard error, from the main process."""
    if process_state().is_main_process:
        seconds = time.monotonic() - _starts[-1] if _starts else 0.0
        print(f"[{seconds:4.0f} s] {message}", file=sys.stderr, flush=True)
