"""The architecture table of a model, as source to review and commit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.lib.npyio import NpzFile
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..discovery import Discovery, discover_architecture
from ..errors import CheckpointError, DataError, UnsupportedModelError
from .inspect import Rows, load_model
from .progress import say, steps
from .report.tables import text_table


@steps()
def adapt(name: str, batch: Path | None = None, stack: str | None = None, trust_remote_code: bool = False) -> str:
    """Discover the architecture of a checkpoint, and print its table.

    Args:
        name: Checkpoint or Hub name.
        batch: File with a tensor for each input of the model, `.safetensors` or `.npz`; by default, random inputs.
        stack: Name of the stack of layers, needed only if the model has several.
        trust_remote_code: Whether the model may run its own code.

    Returns:
        Python source of the table, with the checks as comments at its end.

    Raises:
        CheckpointError: The model cannot be loaded, or there is only a config.
        DataError: The file of the batch is missing or cannot be read, or it has one token per row.
        UnsupportedModelError: The architecture cannot be found or described.
    """
    inputs = None if batch is None else read_batch(batch)
    say(f"loading {name}")
    model = load_model(name, trust_remote_code)
    if model.device.type == "meta":
        raise CheckpointError(
            f"{name!r} is a config, and an architecture is found by running a model: name a checkpoint with weights."
        )
    say("running the model, and each layer alone")
    try:
        found = discover_architecture(model, inputs, stack=stack)
        source = found.source()
    except UnsupportedModelError as error:
        message = str(error).replace(
            "Pass a representative batch of its inputs", "Give a representative batch of its inputs with --batch FILE"
        )
        raise UnsupportedModelError(message) from error
    table = "\n".join(f"# {line}".rstrip() for line in text_table(checks_table(found)).splitlines())
    return f"{source}\n\n{table}"


def read_batch(path: Path) -> Mapping[str, Tensor]:
    """Tensors of a `.safetensors` or `.npz` file by name. Nothing in it is unpickled.

    Raises:
        DataError: The file is missing or empty, has another ending, or cannot be read.
    """
    found = _arrays(path)
    if not found:
        raise DataError(f"--batch {path} is empty: give a file with a tensor for each input of the model.")
    return found


def _arrays(path: Path) -> dict[str, Tensor]:
    if path.suffix not in (".safetensors", ".npz"):
        raise DataError(
            f"--batch {path} is not a .safetensors or .npz file: give one with a tensor for each input of the model, "
            "such as input_ids. Pickled files (.pt) can run code, so they are not read."
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with path.open("rb") as file:
            arrays = np.load(file, allow_pickle=False)
            if not isinstance(arrays, NpzFile):
                raise DataError(
                    f"--batch {path} holds one array without a name: write np.savez(path, input_ids=array)."
                )
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except DataError:
        raise
    except (EOFError, OSError, ValueError, TypeError, BadZipFile, SafetensorError) as error:
        raise DataError(
            f"--batch {path} cannot be read: {str(error).rstrip('.')}. Give a .safetensors or .npz file with a tensor "
            "for each input of the model."
        ) from error


def checks_table(found: Discovery) -> Rows:
    """Table of the checks of a discovered architecture."""
    rows = [["check", "result"]]
    rows += [[claim, "holds"] for claim in found.verified]
    rows += [[claim, "does not hold"] for claim in found.unverified]
    return rows + [[note, "note"] for note in found.notes]
