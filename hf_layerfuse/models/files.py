"""The files of a checkpoint: what they hold, and why they cannot be loaded."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from ..errors import CheckpointError
from ..recipe.pointer import is_pointer

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_ADAPTERS = "adapter_config.json"
_OTHER_WEIGHTS = ("pytorch_model*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.ckpt")


def stored_names(path: str, **hub: Any) -> list[str]:
    """Names of the weights in a checkpoint.

    Args:
        path: Directory or Hub name.
        hub: Options of the Hub, such as `revision` and `token`.
    """
    return [weight.name for weight in _stored(path, hub)]


def stored_files(path: str, **hub: Any) -> dict[str, Path]:
    """The file that holds each weight of a checkpoint, by the name of the weight.

    Args:
        path: Directory or Hub name.
        hub: Options of the Hub, such as `revision` and `token`.

    Raises:
        CheckpointError: The index names a file that is missing.
    """
    return {weight.name: weight.file for weight in _stored(path, hub, whole=True)}


def stored_dtype(path: str, **hub: Any) -> torch.dtype | None:
    """Data type of most floating-point numbers in a checkpoint; None if it has none in safetensors.

    The `dtype` in a config may be missing or differ from the file.

    Args:
        path: Directory or Hub name.
        hub: Options of the Hub, such as `revision` and `token`.
    """
    sizes: Counter[torch.dtype] = Counter()
    for weight in _stored(path, hub):
        if weight.dtype in _DTYPES:
            sizes[_DTYPES[weight.dtype]] += weight.size
    return sizes.most_common(1)[0][0] if sizes else None


class _Stored(NamedTuple):
    name: str
    file: Path
    dtype: str
    size: int


def _stored(path: str, hub: Mapping[str, Any], whole: bool = False) -> Iterator[_Stored]:
    """Each weight with its number of elements, from the headers of the files. With `whole`, no file may be missing."""
    names = [SAFE_WEIGHTS_NAME]
    index = local_file(path, SAFE_WEIGHTS_INDEX_NAME, hub)
    if index is not None and local_file(path, SAFE_WEIGHTS_NAME, hub) is None:
        names = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    for name in names:
        file = local_file(path, name, hub)
        if file is None:
            if whole and index is not None:
                raise CheckpointError(
                    f"the checkpoint at {path!r} lacks {name}, a file that its index names: download it again."
                )
            continue
        with safe_open(file, "pt") as weights:
            for key in weights.keys():  # noqa: SIM118  # not a dict
                part = weights.get_slice(key)
                yield _Stored(key, Path(file), part.get_dtype(), torch.Size(part.get_shape()).numel())


def local_file(path: str, name: str, hub: Mapping[str, Any]) -> str | None:
    """Local path of a file of a checkpoint, downloaded if need be; None if there is no such file."""
    try:
        return cached_file(path, name, **hub)
    except OSError:
        return None


def why_unreadable(path: str) -> str | None:
    """Reason why a directory or file is not a checkpoint that can be loaded, with the next step; None if unknown.

    Args:
        path: Directory or file.
    """
    folder = Path(path)
    if folder.is_file():
        return f"{path!r} is a file: give its directory, which also holds config.json."
    if not folder.is_dir():
        return None
    pointers = [file.name for file in sorted(folder.iterdir()) if is_pointer(file)]
    if pointers:
        return (
            f"{', '.join(pointers[:3])} in {path!r} {'is a pointer' if len(pointers) == 1 else 'are pointers'} of "
            f"git-lfs, not the content: run `git lfs pull` in {path!r}, or download the model with `hf download`."
        )
    if (folder / _ADAPTERS).is_file() and not (folder / "config.json").is_file():
        return (
            f"{path!r} holds PEFT adapters, not a model: load them with AutoPeftModel...from_pretrained({path!r}), "
            "call merge_and_unload() on the result, save that, and give its directory."
        )
    weights = sorted({file.name for pattern in _OTHER_WEIGHTS for file in folder.glob(pattern)})
    if weights and not any(folder.glob("*.safetensors")):
        return (
            f"{path!r} holds its weights in {', '.join(weights[:3])}, and only safetensors are read, because other "
            "files can run code when they are loaded. If you trust this one, load it with use_safetensors=False, save "
            "it with save_pretrained, and give the new directory."
        )
    return None
