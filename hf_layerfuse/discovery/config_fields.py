"""The config fields that follow a stack: its depth, and the lists with one entry per layer."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .stacks import RAISED

_USUAL, _TYPES = "num_hidden_layers", "layer_types"


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


def lists_of_depth(config: PreTrainedConfig, field: str) -> tuple[str, ...]:
    """Config fields whose lists have as many entries as there are layers.

    Args:
        config: Config of the model.
        field: Path of its depth field.
    """
    owner = owner_of(config, field)
    length = getattr(owner, field.rpartition(".")[2])
    return tuple(
        name
        for name, value in _fields(owner).items()
        if isinstance(value, list) and len(value) == length and isinstance(getattr(owner, name, None), list)
    )


def per_layer_fields(model: PreTrainedModel, path: str, field: str) -> tuple[str, ...]:
    """Fields of `lists_of_depth` that describe one layer with each entry, and `layer_types` if the config has none yet.

    A list describes layers if its name contains "layer" and its entries are not indices of layers, or if exchanging two
    entries exchanges the attributes of two layers.

    Args:
        model: Model of the stack.
        path: Path of the stack.
        field: Path of its depth field in the config.
    """
    owner = owner_of(model.config, field)
    found = [
        name
        for name in lists_of_depth(model.config, field)
        if ("layer" in name and not _are_indices(getattr(owner, name))) or _exchanges(model, path, field, name)
    ]
    if getattr(owner, _TYPES, None) is None:
        found.append(_TYPES)
    return tuple(sorted(found, key=lambda name: (name != _TYPES, name)))


def _are_indices(values: list) -> bool:
    """Whether a list holds increasing numbers, such as the layers that have no experts."""
    return all(type(value) is int for value in values) and all(a < b for a, b in itertools.pairwise(values))


def _exchanges(model: PreTrainedModel, path: str, field: str, name: str) -> bool:
    """Whether exchanging two unequal entries of a list exchanges the attributes of two layers."""
    values = getattr(owner_of(model.config, field), name)
    other = next((at for at, value in enumerate(values) if value != values[0]), None)
    if other is None:
        return False
    config = copy.deepcopy(model.config)
    changed = getattr(owner_of(config, field), name)
    changed[0], changed[other] = changed[other], changed[0]
    try:
        before, after = (
            _attributes(_layers(type(model), each, path)) for each in (copy.deepcopy(model.config), config)
        )
    except RAISED:
        return False
    return before != after and (before[0], before[other]) == (after[other], after[0])


def _attributes(layers: nn.ModuleList) -> list[dict[str, object]]:
    """Numbers, words and shapes of each layer, by path, except for its own index."""
    plain = (bool, int, float, str, type(None))
    found = []
    for layer in layers:
        values = {f"{path}.{k}": v for path, m in layer.named_modules() for k, v in vars(m).items()}
        each: dict[str, object] = {k: v for k, v in values.items() if isinstance(v, plain) and not k.endswith("_idx")}
        found.append(each | {name: tensor.shape for name, tensor in layer.named_parameters()})
    return found


def _candidates(config: PreTrainedConfig, length: int) -> list[str]:
    """Fields with the value `length`, the usual names first."""
    found = []
    for prefix, part in _parts(config):
        names = [_USUAL, *_fields(part)] if isinstance(getattr(part, _USUAL, None), int) else [*_fields(part)]
        equal = [name for name in dict.fromkeys(names) if getattr(part, name, None) == length]
        found += [prefix + name for name in equal if not isinstance(getattr(part, name), bool)]
    return sorted(found, key=lambda name: (not name.endswith(_USUAL), "layer" not in name, name.count(".")))


def _fields(config: PreTrainedConfig) -> dict[str, object]:
    """Fields of a config with one value for all layers: those in its `per_layer_config` cannot be read from it."""
    unlike = {*(getattr(config, "per_layer_attributes", None) or ()), "per_layer_config"}
    return {name: value for name, value in config.to_dict().items() if name not in unlike}


def _parts(config: PreTrainedConfig, prefix: str = "") -> Iterator[tuple[str, PreTrainedConfig]]:
    """A config and its sub-configs, each with the prefix of its fields."""
    yield prefix, config
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from _parts(value, f"{prefix}{name}.")


def owner_of(config: PreTrainedConfig, field: str) -> PreTrainedConfig:
    """The config that has a field: the config itself, or one that is nested in it.

    Args:
        config: Config of a model.
        field: Path of the field, such as `text_config.num_hidden_layers`.
    """
    for name in field.split(".")[:-1]:
        config = getattr(config, name)
    return config


def _follows(model: PreTrainedModel, path: str, field: str) -> bool:
    """Whether a stack has one layer less if a field is less by one."""
    config, name = copy.deepcopy(model.config), field.rpartition(".")[2]
    owner, length = owner_of(config, field), len(model.get_submodule(path))
    lists = lists_of_depth(model.config, field)
    try:
        setattr(owner, name, length - 1)
        for each in lists:
            setattr(owner, each, getattr(owner, each)[:-1])
        return len(_layers(type(model), config, path)) == length - 1
    except RAISED:
        return False  # the class cannot be built with this value, so the field is not a depth of its own


def _layers(cls: type[PreTrainedModel], config: PreTrainedConfig, path: str) -> nn.ModuleList:
    """Layers of a model without weights."""
    with torch.device("meta"):
        return cls(config).get_submodule(path)
