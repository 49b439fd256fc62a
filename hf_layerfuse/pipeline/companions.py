"""Files beside the weights of an original that stay valid for a smaller model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import snapshot_download

from ..errors import CheckpointError

_TOKENISING = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*",
)
_PROCESSING = ("preprocessor_config.json", "processor_config.json")
_LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
_MODULES = "modules.json"
_SENTENCE_TRANSFORMERS = (_MODULES, "config_sentence_transformers.json", "sentence_*_config.json")


def companions_of(model: str) -> dict[str, Path]:
    """Find the files of an original that its smaller model still needs: tokenisers, processors, licences, poolings.

    A pipeline of sentence-transformers lists its modules in `modules.json`. The first one is the model itself; the
    others, such as pooling and dense layers, depend only on the width of its states, which stays.

    Args:
        model: Hub name or directory of the original.

    Returns:
        Local paths by name in the directory of the model; none for a model on the Hub that cannot be reached.

    Raises:
        CheckpointError: `modules.json` is damaged.
    """
    patterns = [*_TOKENISING, *_PROCESSING, *_LICENCES, *_SENTENCE_TRANSFORMERS]
    source = _folder(model, patterns)
    if source is not None and (source / _MODULES).is_file():
        patterns += [f"{folder}/**/*" for folder in _module_folders(source / _MODULES)]
        source = _folder(model, patterns)
    if source is None:
        return {}
    files = {file for pattern in patterns for file in source.glob(pattern) if file.is_file()}
    return {file.relative_to(source).as_posix(): file for file in sorted(files)}


def copy_companions(files: Mapping[str, Path], path: Path) -> None:
    """Copy files from `companions_of` into the directory of the smaller model. Files that it has already are kept."""
    for name, file in files.items():
        target = path / name
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)


def _folder(model: str, patterns: list[str]) -> Path | None:
    """Directory with the files of a model; those on the Hub are downloaded. None if the Hub has no such model."""
    if Path(model).is_dir():
        return Path(model)
    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except (OSError, ValueError):  # offline, and not in the cache
        return None


def _module_folders(file: Path) -> list[str]:
    """Folders of the modules after the first."""
    try:
        folders = [str(module["path"]) for module in json.loads(file.read_text(encoding="utf-8"))[1:]]
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{file} is not a list of modules with a path each: restore the original file."
        ) from error
    # a path that leads out of the folder is not copied
    return [
        folder for folder in folders if folder and ".." not in Path(folder).parts and not Path(folder).is_absolute()
    ]
