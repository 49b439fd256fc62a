"""Models of an unknown architecture: their table is discovered, verified and registered."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from transformers import PreTrainedModel

from ..errors import LayerFuseWarning, UnsupportedModelError
from ..evaluation.precision import batch_for, in_float32
from ..models.architectures import (
    ARCHITECTURES,
    FUSED_PREFIX,
    Architecture,
    LayerArchitecture,
    TransformerArchitecture,
    architecture_for,
    known_architectures,
)
from ..models.modeling import register_architecture
from .discovery import check_discoverable, discover_architecture


def is_unknown(model: Any) -> bool:
    """Whether a value is a model whose `model_type` has no table."""
    return isinstance(model, PreTrainedModel) and (
        model.config.model_type.removeprefix(FUSED_PREFIX) not in ARCHITECTURES
    )


def ensure_architecture(
    model: Any,
    kind: type[Architecture],
    batches: Iterable[Mapping[str, Any]] | None = None,
    stack: str | None = None,
    stacklevel: int = 3,
) -> None:
    """Make sure that a model has a table. If its `model_type` is unknown, discover, verify and register one.

    Args:
        model: Model to fuse.
        kind: Kind of table, as in `architecture_for`. Only tables of layers are discovered.
        batches: Batches of model inputs, of which the first is used; by default, random inputs.
        stack: Name of the stack to fuse, in models that have several. The tables of the others are added, if verified.
        stacklevel: Level of the warning, as in `warnings.warn`.

    Raises:
        DataError: The batch is not a dict of tensors, or has one token per row.
        UnsupportedModelError: No table is registered, and none is found that holds on the batch.

    Warns:
        LayerFuseWarning: A discovered table is used.
    """
    if not is_unknown(model) or not issubclass(LayerArchitecture, kind):
        architecture_for(model, kind)
        return
    architecture = _discovered(model, kind, batches, stack)
    register_architecture(architecture)
    message = (
        f"unknown architecture {model.config.model_type!r}: {architecture.__name__} was discovered from one forward "
        f"pass, verified on it, and registered. `hf-layerfuse adapt {_name_of(model)}` prints this table, to review "
        "and commit."
    )
    logging.getLogger(__name__).warning(message)
    warnings.warn(message, LayerFuseWarning, stacklevel=stacklevel)


def _discovered(
    model: PreTrainedModel, kind: type[Architecture], batches: Iterable[Mapping[str, Any]] | None, stack: str | None
) -> type[TransformerArchitecture]:
    """The verified table of a model, with those of its other stacks."""
    model_type = model.config.model_type
    try:
        check_discoverable(model)
        wide = in_float32(model)
        first = next(iter(batches or ()), None)
        batch = None if first is None else batch_for(wide, first)
        found = discover_architecture(wide, batch, stack=stack)
        architecture = found.architecture()
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"unknown architecture {model_type!r}, and no table was found for it: {str(error).rstrip('.')}. To write "
            f"one, see 'Add an architecture' in CONTRIBUTING.md. {known_architectures(model_type, kind)}"
        ) from error
    if found.unverified:
        raise UnsupportedModelError(
            f"unknown architecture {model_type!r}, and the table that was found is not verified: "
            f"{found.unverified[0].rstrip('.')}. `hf-layerfuse adapt {_name_of(model)}` prints it: correct it, and "
            "register it with register_architecture."
        )
    architecture.other_stacks = tuple(_verified_tables(wide, batch, found.other_stacks))
    return architecture


def _name_of(model: PreTrainedModel) -> str:
    """Name of the checkpoint of a model, for a command."""
    return model.config.name_or_path or "MODEL"


def _verified_tables(
    model: PreTrainedModel, batch: Mapping[str, Any] | None, stacks: Iterable[str]
) -> Iterator[type[TransformerArchitecture]]:
    """Tables of those stacks of a model that can be described and verified."""
    for stack in stacks:
        with suppress(UnsupportedModelError):
            found = discover_architecture(model, batch, stack=stack)
            if not found.unverified:
                yield found.architecture()
