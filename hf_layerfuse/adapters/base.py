"""Where the blocks of an architecture live: one table per `model_type`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError

FUSED_PREFIX = "fused_"


@dataclass(frozen=True)
class Block:
    """One attention or MLP block at one depth.

    `modules` maps a role to a live module path: `norm` (the norm that the block owns), `out` (the linear map back to
    the residual stream), and the other linear maps and small norms under names of the architecture's choice.
    """

    layer: int
    kind: Literal["attention", "mlp"]
    modules: Mapping[str, str]


class ModelAdapter(ABC):
    """What the engine needs to know of an architecture."""

    model_type: ClassVar[str]

    @abstractmethod
    def blocks(self, model: PreTrainedModel) -> list[Block]:
        """The blocks of `model` that are still there, in the order in which they run."""


class TransformerAdapter(ModelAdapter):
    """A stack of layers with one attention and one MLP block each. All paths but `layers` start at a layer.

    Attributes:
        layers: path of the `nn.ModuleList` of layers inside the base model.
        attention: role -> path of the modules of the attention block.
        mlp: role -> path of the modules of the MLP block.
        skip: for each kind, the modules to replace, and by what, so that a layer runs without that block.
        post_norm: the block's norm comes after the residual sum (BERT) instead of before the block (GPT-2). Such a
            norm stays when its block is removed: the next block was trained to read normalised states.
        per_layer_config: config fields with one entry per layer, kept in step with the layers.
    """

    layers: ClassVar[str]
    attention: ClassVar[Mapping[str, str]]
    mlp: ClassVar[Mapping[str, str]]
    skip: ClassVar[Mapping[str, Mapping[str, type[nn.Module]]]]
    post_norm: ClassVar[bool] = False
    per_layer_config: ClassVar[tuple[str, ...]] = ("layer_types",)

    def check(self, model: PreTrainedModel) -> None:
        """Raise `UnsupportedModelError` for a model that shares the architecture but cannot be fused."""

    def layers_path(self, model: PreTrainedModel) -> str:
        """Live path of the list of layers, seen from `model`, whatever its head."""
        base = model.base_model
        prefix = next(name for name, module in model.named_modules() if module is base)
        return f"{prefix}.{self.layers}" if prefix else self.layers

    def layer_list(self, model: PreTrainedModel) -> nn.ModuleList:
        return model.get_submodule(self.layers_path(model))

    def blocks(self, model: PreTrainedModel) -> list[Block]:
        path = self.layers_path(model)
        found = []
        for index, layer in enumerate(self.layer_list(model)):
            for kind, table in (("attention", self.attention), ("mlp", self.mlp)):
                if not any(type(layer.get_submodule(at)) is to for at, to in self.skip[kind].items()):
                    modules = {role: f"{path}.{index}.{at}" for role, at in table.items()}
                    found.append(Block(index, kind, modules))
        return found

    def stays(self, parameter: str) -> bool:
        """Whether a parameter, named from its layer on, outlives the removal of the block that owns it."""
        module = parameter.rpartition(".")[0]
        return self.post_norm and module in (self.attention["norm"], self.mlp["norm"])

    def owner(self, parameter: str) -> str | None:
        """The kind of block that a parameter, named from its layer on, belongs to; None is neither."""
        module = parameter.rpartition(".")[0]
        for kind, table in (("attention", self.attention), ("mlp", self.mlp)):
            if module in table.values():
                return kind
        return None


class ZeroAttention(nn.Module):
    """Stands where an attention module was: contributes nothing, attends to nothing, caches nothing."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        return torch.zeros_like(hidden_states), None


class ZeroBlock(nn.Module):
    """Stands where an MLP was: contributes nothing."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(hidden_states)


ADAPTERS: dict[str, TransformerAdapter] = {}


def adapter_for(model: Any) -> TransformerAdapter:
    """The adapter of a model, or of its config.

    Raises:
        UnsupportedModelError: no adapter is registered for its `model_type`.
    """
    config = getattr(model, "config", model)
    model_type = getattr(config, "model_type", type(model).__name__)
    adapter = ADAPTERS.get(str(model_type).removeprefix(FUSED_PREFIX))
    if adapter is None:
        raise UnsupportedModelError(
            f"no adapter for the architecture {model_type!r}. Known: {', '.join(sorted(ADAPTERS))}. To teach "
            "hf_layerfuse a new one, see 'Add an architecture' in CONTRIBUTING.md."
        )
    return adapter
