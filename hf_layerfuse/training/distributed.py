"""State of this process among several."""

from __future__ import annotations

from datetime import timedelta

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

PATIENCE = timedelta(hours=12)
"""Time that processes wait for one that measures or runs a teacher; the default of NCCL is ten minutes."""


def process_state() -> PartialState:
    """The process state that `Accelerator()` would set up.

    `PartialState()` alone ignores ACCELERATE_USE_CPU, and then each of several CPU processes runs alone. The first call
    in a process decides for all later ones.
    """
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=PATIENCE)
