"""Which model class a checkpoint has."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import CheckpointError
from .architectures import FUSED_PREFIX
from .modeling import fused_class, model_classes


def head_class(config: PreTrainedConfig, stored: Collection[str] = ()) -> type[PreTrainedModel]:
    """Model class of a checkpoint, from `architectures` in its config, or else from the names of its weights.

    Args:
        config: Config of the checkpoint.
        stored: Names of the weights in its files. Without any, a config that names no class gets the body.

    Raises:
        CheckpointError: Neither Transformers nor the user has registered the class for this config; or the config names
            no class, and none takes all weights, or several do.
    """
    names = config.architectures or []
    heads = model_classes(type(config))
    for name in names:
        plain = name.removeprefix("Fused") if config.model_type.startswith(FUSED_PREFIX) else name
        for head in heads:
            if head.__name__ == name:
                return head
        # heads of Transformers without an Auto class, such as DeiTForImageClassificationWithTeacher
        head = getattr(transformers, plain, None)
        if isinstance(head, type) and issubclass(head, PreTrainedModel):
            return fused_class(head) if plain != name else head
    if not names and heads:
        # a model with a head has its body under a prefix, as in `transformer.wte.weight`
        prefixes = tuple({f"{head.base_model_prefix}." for head in heads})
        headed = any(name.startswith(prefixes) for name in stored)
        return _head_of(config, heads[1:], stored) if headed else heads[0]
    raise CheckpointError(
        f"config.json names the class {names}, which is not known for {config.model_type!r}: register it with an Auto "
        "class, or import the package that defines it, before loading."
    )


def own_auto_class(config: PreTrainedConfig) -> type | None:
    """Auto class that loads a model with code of its own, from `auto_map` in its config; None for other models.

    Fused checkpoints with code are loaded by this library.
    """
    if config.model_type.startswith(FUSED_PREFIX):
        return None
    auto_map = getattr(config, "auto_map", None) or {}
    named = {
        str(target).rpartition(".")[2]: getattr(transformers, auto_class, None)
        for auto_class, target in auto_map.items()
        if auto_class.startswith("AutoModel")
    }
    return next((named[name] for name in config.architectures or () if name in named), None)


def _head_of(
    config: PreTrainedConfig, heads: Sequence[type[PreTrainedModel]], stored: Collection[str]
) -> type[PreTrainedModel]:
    """The only class whose head has exactly the stored weights, apart from tied copies."""
    stored, fitting = set(stored), {}
    for head in heads:
        prefix = f"{head.base_model_prefix}."
        own = {name for name in stored if not name.startswith(prefix)}
        with torch.device("meta"):
            model = head(copy.deepcopy(config))
        weights = model.state_dict(keep_vars=True)
        known = {id(weight) for name, weight in weights.items() if name.startswith(prefix) or name in own}
        # a file holds tied weights once
        if own <= weights.keys() and known == set(map(id, weights.values())):
            fitting[head] = len(weights.keys() ^ stored)
    # heads that differ in their use of the body: some have no pooler
    closest = [head for head, apart in fitting.items() if apart == min(fitting.values())]
    if len(closest) == 1:
        return closest[0]
    found = f"the weights fit each of {', '.join(head.__name__ for head in closest)}" if closest else "no class fits"
    raise CheckpointError(
        f"config.json has no `architectures`, and {found} of {config.model_type!r}: add the class of the model to "
        f'config.json, as in "architectures": ["{(closest or heads)[0].__name__}"].'
    )
