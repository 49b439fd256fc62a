"""Which of several processes this one is."""

from __future__ import annotations

from datetime import timedelta

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

PATIENCE = timedelta(hours=12)
"""How long processes wait for one that measures or asks a teacher; NCCL would give up after ten minutes."""


def process_state() -> PartialState:
    """The process state that `Accelerator()` would set up.

    `PartialState()` alone does not read ACCELERATE_USE_CPU, and then takes each of several CPU processes for the only
    one. The first call in a process decides for all that follow.
    """
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=PATIENCE)
