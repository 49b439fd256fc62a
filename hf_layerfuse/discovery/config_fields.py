"""The config fields that follow a stack: its depth, and the lists with one entry per layer."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from transformers import PreTrainedConfig, PreTrainedModel

_USUAL = "num_hidden_layers"


def depth_field(model: PreTrainedModel, path: str) -> str | None:
    """Config field that sets the number of layers of a stack.

    A candidate is changed in a copy of the config, and the class is built from it without weights.

    Args:
        model: Model of the stack.
        path: Path of the stack.

    Returns:
        Path of the field in the config, such as `num_hidden_layers` or `text_config.num_hidden_layers`; None if no
        field sets it alone.
    """
    length = len(model.get_submodule(path))
    return next((name for name in _candidates(model.config, length) if _follows(model, path, name)), None)


def per_layer_fields(config: PreTrainedConfig, field: str) -> tuple[str, ...]:
    """Fields beside the depth field that hold a list with one entry per layer, `layer_types` first."""
    owner = _owner(config, field)
    length = getattr(owner, field.rpartition(".")[2])
    names = [
        name
        for name, value in owner.to_dict().items()
        if isinstance(value, list) and len(value) == length and isinstance(getattr(owner, name, None), list)
    ]
    return tuple(sorted(names, key=lambda name: (name != "layer_types", name)))


def _candidates(config: PreTrainedConfig, length: int) -> list[str]:
    """Fields with the value `length`, the usual names first."""
    found = []
    for prefix, part in _parts(config):
        names = [_USUAL, *part.to_dict()] if isinstance(getattr(part, _USUAL, None), int) else [*part.to_dict()]
        equal = [name for name in dict.fromkeys(names) if getattr(part, name, None) == length]
        found += [prefix + name for name in equal if not isinstance(getattr(part, name), bool)]
    return sorted(found, key=lambda name: (not name.endswith(_USUAL), "layer" not in name, name.count(".")))


def _parts(config: PreTrainedConfig, prefix: str = "") -> Iterator[tuple[str, PreTrainedConfig]]:
    """A config and its sub-configs, each with the prefix of its fields."""
    yield prefix, config
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from _parts(value, f"{prefix}{name}.")


def _owner(config: PreTrainedConfig, field: str) -> PreTrainedConfig:
    for name in field.split(".")[:-1]:
        config = getattr(config, name)
    return config


def _follows(model: PreTrainedModel, path: str, field: str) -> bool:
    """Whether a stack has one layer less if a field is less by one."""
    config, name = copy.deepcopy(model.config), field.rpartition(".")[2]
    owner, length = _owner(config, field), len(model.get_submodule(path))
    lists = per_layer_fields(model.config, field)
    try:
        setattr(owner, name, length - 1)
        for each in lists:
            setattr(owner, each, getattr(owner, each)[:-1])
        with torch.device("meta"):
            other = type(model)(config)
        return len(other.get_submodule(path)) == length - 1
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return False  # the class cannot be built with this value, so the field is not a depth of its own
