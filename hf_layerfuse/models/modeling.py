"""Fused model classes. This file contains every use of a semi-private hook of Transformers.

A fused model is its stock class, reshaped by the plan in its config. `FusedGPT2LMHeadModel` builds `GPT2LMHeadModel`,
takes out the removed blocks, and declares the shared weights. Therefore, saving, loading, moving and casting use the
ordinary code of Transformers.
"""

from __future__ import annotations

import copy
import functools
import os
import sys
from collections.abc import Iterable
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    get_model_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.models.auto import auto_factory, configuration_auto, modeling_auto
from transformers.pytorch_utils import Conv1D

from ..errors import PlanError, UnsupportedModelError
from ..evaluation.modes import checkpoint_activations, outside_inference_mode
from ..plan import Plan
from .architectures import ARCHITECTURES, BUILTIN, FUSED_PREFIX, Architecture
from .families import family_of
from .modules.shared_linear import Relaxed
from .remote_code import save_code

_AUTO_CLASSES = [
    value
    for value in vars(modeling_auto).values()
    if isinstance(value, type)
    and issubclass(value, auto_factory._BaseAutoModelClass)
    and value._model_mapping is not None
]


class FusedMixin:
    """Mixin that makes a stock class a fused class; `fused_class` puts it before the stock class."""

    _fused_ties: dict[str, str] = {}  # replaced per instance, but read before __init__ has run

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        plan = plan_of(config)
        self._fused_ties = family_of(plan).reshape(self, plan)
        # Saving reads the patterns in `_tied_weights_keys`, loading reads `all_tied_weights_keys`.
        self._tied_weights_keys = {**(self._tied_weights_keys or {}), **self._fused_ties}
        self.all_tied_weights_keys.update(self._fused_ties)
        self.tie_weights()

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        # The stock method returns no ties if the config does not tie word embeddings.
        return {**super().get_expanded_tied_weights_keys(all_submodels=all_submodels), **self._fused_ties}

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        super().tie_weights(*args, **kwargs)
        stock = next(base for base in type(self).__mro__ if base is not FusedMixin and "tie_weights" in vars(base))
        if stock is not PreTrainedModel:  # such as CTC heads, which override it for their adapters and tie nothing
            PreTrainedModel.tie_weights(self, *args, **kwargs)

    def _adjust_bias(self, output_embeddings: Any, input_embeddings: Any) -> None:
        # The stock method uses weight.shape[0] as the size of the bias, which truncates the bias of a Conv1D.
        if not isinstance(output_embeddings, Conv1D | Relaxed):
            super()._adjust_bias(output_embeddings, input_embeddings)

    def initialize_weights(self) -> None:
        # Not in `_init_weights`: a head leaves that to its body, and the body has the stock class.
        super().initialize_weights()
        for module in self.modules():
            if isinstance(module, Relaxed):
                module.reset()

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        *args: Any,
        expanded: bool = False,
        with_code: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Save the model, optionally so that the checkpoint loads without this library.

        Args:
            save_directory: Directory of the checkpoint.
            args: Positional arguments of the Transformers method.
            expanded: Whether to save a stock checkpoint. It is larger, computes the same outputs, and loads everywhere.
            with_code: Whether to save the code of the class with the weights, and `auto_map` in the config. The Auto
                classes then load the checkpoint with `trust_remote_code=True`. A model that was loaded this way is
                always saved with its code.
            kwargs: Keyword arguments of the Transformers method.

        Raises:
            UnsupportedModelError: A stock checkpoint cannot represent the model, or `with_code` is set for an
                architecture from outside this package.
        """
        if expanded:
            return expand(self).save_pretrained(save_directory, *args, **kwargs)
        vars(self.config).pop("auto_map", None)  # left over from a checkpoint with code
        if with_code or self._ships_code:
            self.config.auto_map = _save_code(self, save_directory)
        return super().save_pretrained(save_directory, *args, **kwargs)

    _ships_code = not __name__.startswith("hf_layerfuse.")  # code that came with a checkpoint is saved with it again

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Save the code of this class with every checkpoint, as `save_pretrained(..., with_code=True)` does."""
        # Transformers would copy only one file and the files in its folder
        cls._ships_code = True


def register_architecture(architecture: type[Architecture]) -> type[Architecture]:
    """Register an architecture, so that its models can be fused, saved, and loaded by the Auto classes.

    Unless Transformers ships its config and model classes, register them with `AutoConfig` and `AutoModel...` first.
    The function also works as a class decorator.

    Args:
        architecture: Class with the table of the architecture.

    Returns:
        The same class.

    Raises:
        UnsupportedModelError: No config class is registered for `architecture.model_type`.
    """
    model_type = architecture.model_type
    if model_type not in configuration_auto.CONFIG_MAPPING:
        raise UnsupportedModelError(
            f"no config class for {model_type!r}: call AutoConfig.register({model_type!r}, YourConfig) and "
            "AutoModel.register(YourConfig, YourModel) before register_architecture."
        )
    ARCHITECTURES[model_type] = architecture()
    base = configuration_auto.CONFIG_MAPPING[model_type]
    config_class = _fused_config(base)
    configuration_auto.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    for auto_class in _AUTO_CLASSES:
        heads = tuple(fused_class(head) for head in _heads(auto_class, base))
        if heads:
            auto_class._model_mapping.register(config_class, heads if len(heads) > 1 else heads[0], exist_ok=True)
    return architecture


def check_with_code(config: PreTrainedConfig) -> None:
    """Raise `UnsupportedModelError` unless the code of the fused class of a config belongs to this package."""
    model_type = config.model_type.removeprefix(FUSED_PREFIX)
    if type(ARCHITECTURES.get(model_type)) not in BUILTIN:
        known = ", ".join(architecture.model_type for architecture in BUILTIN)
        raise UnsupportedModelError(
            f"the code of {model_type!r} is not in this package, so it cannot be saved with a checkpoint; supported "
            f"are {known}. Save without with_code, and publish your code as a package."
        )


def _save_code(model: FusedMixin, directory: str | os.PathLike) -> dict[str, str]:
    """Save the code of a model with its weights. Returns `auto_map`: Auto class -> module and class."""
    check_with_code(model.config)
    module, config_class = save_code(__name__, directory), type(model.config)
    classes = {"AutoConfig": config_class}
    for auto_class in _AUTO_CLASSES:
        heads = _heads(auto_class, config_class)
        if heads:
            classes[auto_class.__name__] = type(model) if type(model) in heads else heads[0]
    return {name: f"{module}.{cls.__name__}" for name, cls in classes.items()}


@functools.cache
def _fused_config(base: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    fields = {
        "__module__": __name__,
        "__doc__": f"{base.__name__} with the plan that shapes the model.",
        "__annotations__": {"layerfuse_plan": dict[str, Any] | None},
        "model_type": FUSED_PREFIX + base.model_type,
        "layerfuse_plan": None,
        # the model saves the code, see FusedMixin
        "register_for_auto_class": classmethod(lambda cls, auto_class="AutoConfig": None),
    }
    return _publish(type(f"Fused{base.__name__}", (base,), fields))


@functools.cache
def fused_class(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Fused counterpart of a stock model class, such as `FusedGPT2LMHeadModel` for `GPT2LMHeadModel`."""
    fields = {
        "__module__": __name__,
        "__doc__": f"{base.__name__}, reshaped by the plan in its config.",
        "config_class": _fused_config(base.config_class),
    }
    fused = _publish(type(f"Fused{base.__name__}", (FusedMixin, base), fields))
    renamings = get_checkpoint_conversion_mapping(base.__name__)
    if renamings is not None:  # ViT has other names on disk than in memory; a fused ViT uses the same renaming
        register_checkpoint_conversion_mapping(fused.__name__, renamings, overwrite=True)
    return fused


def _publish(cls: type) -> type:
    """Make a generated class available by name in this module, so that other processes find it."""
    setattr(sys.modules[__name__], cls.__name__, cls)
    return cls


def plan_of(config: PreTrainedConfig) -> Plan:
    """Plan in a fused config.

    Raises:
        PlanError: The plan is missing, is for another architecture, or has a newer format.
    """
    plan = Plan.from_dict(config.layerfuse_plan)
    if FUSED_PREFIX + plan.model_type != config.model_type:
        raise PlanError(
            f"config.json is {config.model_type!r}, but its plan is for {plan.model_type!r}: restore the original."
        )
    return plan


def skeleton(model: PreTrainedModel) -> PreTrainedModel:
    """Stock model without weights, in the class and shape that a model had before merging."""
    stock = next(cls for cls in type(model).__mro__ if not issubclass(cls, FusedMixin))
    with torch.device("meta"):
        return stock(stock.config_class(**_fields(model.config)))


def with_plan(cls: type, config: PreTrainedConfig, plan: Plan) -> PreTrainedConfig:
    """Config of a fused class: a copy of another config with a plan."""
    return cls.config_class(**_fields(config), layerfuse_plan=plan.to_dict(notes=False))


def _fields(config: PreTrainedConfig) -> dict[str, Any]:
    """Fields of a config that do not depend on the plan."""
    return {k: v for k, v in config.to_dict().items() if k not in ("model_type", "layerfuse_plan", "auto_map")}


@outside_inference_mode
def expand(model: PreTrainedModel) -> PreTrainedModel:
    """Turn a fused model into a stock model that computes the same.

    Shared weights are copied, and removed blocks contribute zero. A stock model is returned as a copy.

    Args:
        model: Fused model; it is not changed.

    Returns:
        A model of the stock class, on the same device and of the same dtype, with as many layers as the fused model.

    Raises:
        UnsupportedModelError: MLPs are linearised or convolutions merged, which a stock model cannot represent.
    """
    if not isinstance(model, FusedMixin):
        return copy.deepcopy(model)
    plan = plan_of(model.config)
    names = skeleton(model).state_dict()
    # in hybrid models, a removed block gets the weights of its own kind of mixer alone
    weights = {name: tensor for name, tensor in family_of(plan).expanded(model, plan).items() if name in names}
    stock = next(cls for cls in type(model).__mro__ if not issubclass(cls, FusedMixin))
    return build(stock, stock.config_class(**_fields(model.config)), weights, model)


def build(cls: type, config: PreTrainedConfig, weights: dict[str, Any], like: PreTrainedModel) -> PreTrainedModel:
    """Build a `cls` with these weights, using the same loading code as for a checkpoint."""
    config._attn_implementation = like.config._attn_implementation
    model, report = cls.from_pretrained(
        None, config=config, state_dict=weights, dtype=like.dtype, output_loading_info=True
    )
    wrong = {key: sorted(report[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if report[key]}
    if wrong:
        raise UnsupportedModelError(
            f"the weights of {type(like).__name__} do not match its config: {wrong}. Load the model with "
            "from_pretrained, without arguments that add or remove modules."
        )
    # names on disk follow the file of the original, as when the original is saved again
    model._weight_conversions = getattr(like, "_weight_conversions", None)
    model.config.name_or_path = model.name_or_path = like.config.name_or_path
    if like.can_generate():
        # A copy also remembers that it is unchanged since it was loaded: Transformers saves such configs even if they
        # are invalid, as many on the Hub are.
        model.generation_config = copy.deepcopy(like.generation_config)
    if any(getattr(module, "gradient_checkpointing", False) for module in like.modules()):
        checkpoint_activations(model, True)
    return model.to(like.device).train(like.training)


def names_in_files(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, str]:
    """Name in the files of a checkpoint of each weight of a model, as far as it is stored as it is.

    Transformers renames some weights while it loads them, and computes others, such as those of experts.

    Args:
        model: Model without fused parts; its weights are not read.
        stored: Names in the files.
    """
    weights, transforms = model.state_dict(), get_model_conversion_mapping(model)
    renamings, converters = (
        [each for each in transforms if isinstance(each, kind)] for kind in (WeightRenaming, WeightConverter)
    )
    found = {}
    for name in stored:
        live, converter = rename_source_key(name, renamings, converters, model.base_model_prefix, weights)
        if converter is None and live in weights:
            found[live] = name
    tied = {copy: found[name] for copy, name in model.all_tied_weights_keys.items() if name in found}
    return tied | found


def model_classes(config_class: type[PreTrainedConfig]) -> list[type[PreTrainedModel]]:
    """Model classes that the Auto classes know for a config class; the body comes first."""
    return list(dict.fromkeys(head for auto_class in _AUTO_CLASSES for head in _heads(auto_class, config_class)))


def auto_classes_of(model: PreTrainedModel) -> list[str]:
    """Names of the Auto classes that know the class of a model."""
    return [each.__name__ for each in _AUTO_CLASSES if type(model) in _heads(each, type(model.config))]


def _heads(auto_class: type, config_class: type[PreTrainedConfig]) -> tuple[type[PreTrainedModel], ...]:
    mapping = auto_class._model_mapping
    if config_class not in mapping:
        return ()
    heads = mapping[config_class]
    # a few Auto classes also list heads with another config class, which those heads create themselves
    return tuple(h for h in (heads if isinstance(heads, tuple) else (heads,)) if h.config_class is config_class)


for _architecture in BUILTIN:
    register_architecture(_architecture)
