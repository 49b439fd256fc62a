"""Where the blocks of an architecture live: one table per `model_type`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from ...errors import UnsupportedModelError
from ...plan import TRANSFORMER

FUSED_PREFIX = "fused_"


@dataclass(frozen=True)
class Block:
    """One attention, MLP or convolutional block at one depth.

    `modules` maps a role to a live module path: `norm` (the norm that the block owns), `out` (the map back to the
    residual stream), and the other maps and small norms under names of the architecture's choice.
    """

    layer: int
    kind: Literal["attention", "mlp", "conv"]
    modules: Mapping[str, str]


class Place(NamedTuple):
    """Where something is seen: what enters a module or leaves it, or its output `added` to the residual.

    `module` is a path from a layer on, of which the empty one is the layer itself; in a chain, one from the model on.
    """

    when: Literal["before", "after", "added"]
    module: str


class Architecture:
    """What the engine needs to know of an architecture.

    Attributes:
        model_type: that of its configs.
    """

    model_type: ClassVar[str]

    def check(self, model: PreTrainedModel) -> None:
        """Raise `UnsupportedModelError` for a model that shares the architecture but cannot be made smaller."""


class LayerArchitecture(Architecture, ABC):
    """A stack of layers, each of which has one block of every kind. All paths but `layers` start at a layer.

    Attributes:
        layers: path of the `nn.ModuleList` of layers inside the base model.
        skip: for each kind, the modules to replace, and by what, so that a layer runs without that block.
        post_norm: the block's norm comes after the residual sum (BERT) instead of before the block (GPT-2). Such a
            norm stays when its block is removed: the next block was trained to read normalised states.
        per_layer_config: config fields with one entry per layer, kept in step with the layers.
        resizes: layers may change the shape of the stream, and then only those of one shape can be compared.
        kinds: of the blocks of a layer, in the order in which they run. The attribute of that name is the table of
            that kind: role -> path of its modules.
    """

    layers: ClassVar[str]
    skip: ClassVar[Mapping[str, Mapping[str, type[nn.Module]]]] = {}
    post_norm: ClassVar[bool] = False
    per_layer_config: ClassVar[tuple[str, ...]] = ("layer_types",)
    resizes: ClassVar[bool] = False
    kinds: ClassVar[tuple[str, ...]]

    def table(self, kind: str) -> Mapping[str, str]:
        """Role -> path of the modules of a kind of block."""
        return getattr(self, kind)

    @abstractmethod
    def place(self, kind: str, name: str) -> Place:
        """Where a `HookPoint` of a kind of block is seen."""

    def layers_path(self, model: PreTrainedModel) -> str:
        """Live path of the list of layers, seen from `model`, whatever its head."""
        return root_of(model) + self.layers

    def layer_list(self, model: PreTrainedModel) -> nn.ModuleList:
        return model.get_submodule(self.layers_path(model))

    def blocks(self, model: PreTrainedModel) -> list[Block]:
        """The blocks of `model` that are still there, in the order in which they run."""
        path = self.layers_path(model)
        found = []
        for index, layer in enumerate(self.layer_list(model)):
            for kind in self.kinds:
                if not any(type(layer.get_submodule(at)) is to for at, to in self.skip.get(kind, {}).items()):
                    modules = {
                        role: f"{path}.{index}.{at}"
                        for role, at in self.table(kind).items()
                        if role == "norm" or type(layer.get_submodule(at)) not in (nn.Identity, One)
                    }
                    found.append(Block(index, kind, modules))
        return found

    def stays(self, parameter: str) -> bool:
        """Whether a parameter, named from its layer on, outlives the removal of the block that owns it."""
        module = parameter.rpartition(".")[0]
        return self.post_norm and module in [self.table(kind)["norm"] for kind in self.kinds]

    def owner(self, parameter: str) -> str | None:
        """The kind of block that a parameter, named from its layer on, belongs to; None is none of them."""
        module = parameter.rpartition(".")[0]
        return next((kind for kind in self.kinds if module in self.table(kind).values()), None)


class TransformerArchitecture(LayerArchitecture):
    """Layers of one attention and one MLP block each.

    Attributes:
        attention: role -> path of the modules of the attention block.
        mlp: role -> path of the modules of the MLP block.
        activation: path of the module between the maps of the MLP; without it, no MLP becomes linear.
        adds: path of a module of `out` and `norm` alone, called with what `out` reads and with what the MLP read, that
            gives norm(out(...) + ...); without it, no residual sum is folded.
    """

    attention: ClassVar[Mapping[str, str]]
    mlp: ClassVar[Mapping[str, str]]
    activation: ClassVar[str | None] = None
    adds: ClassVar[str | None] = None
    kinds = TRANSFORMER

    def place(self, kind: str, name: str) -> Place:
        table = self.table(kind)
        if name == "features":
            return Place("before", table["out"])
        if name == "sum":  # where no norm follows, nothing but the addition itself sees it
            return Place("before", table["norm"]) if self.post_norm else Place("added", table["out"])
        if name == "read" and not self.post_norm:
            return Place("after", table["norm"])
        if kind == "attention":
            return Place("before", "")
        return Place("after", self.attention["norm"]) if self.post_norm else Place("before", table["norm"])


class ConvArchitecture(LayerArchitecture):
    """Residual layers of two convolutions, act(x + norm(out(f(in_norm(in(x)))))), each one block (He et al. 2016).

    Layers may differ in shape; only those of one shape become one. Where a layer is gone, nothing stands in its place.

    Attributes:
        conv: role -> path: `in` and `out`, the convolutions, `in_norm` and `norm`, the batch norms that follow them,
            and `act`, the activation after the residual sum. A projection in the shortcut has a role of its own.
    """

    conv: ClassVar[Mapping[str, str]]
    kinds = ("conv",)
    resizes = True

    def place(self, kind: str, name: str) -> Place:
        return Place("before", self.table(kind)[{"sum": "act", "features": "out"}.get(name, name)])

    def check(self, model: PreTrainedModel) -> None:
        for block in self.blocks(model):
            parts = {role: model.get_submodule(path) for role, path in block.modules.items()}
            convs, norms = (parts["in"], parts["out"]), (parts["in_norm"], parts["norm"])
            plain = all(isinstance(conv, nn.Conv2d) and conv.groups == 1 for conv in convs)
            if not plain or not all(isinstance(norm, nn.BatchNorm2d) and norm.affine for norm in norms):
                raise UnsupportedModelError(
                    f"layer {block.layer} has {', '.join(type(part).__name__ for part in (*convs, *norms))}: what can "
                    "be fused are two Conv2d of one group, each followed by a BatchNorm2d with a gain."
                )


class ZeroAttention(nn.Module):
    """Stands where an attention module was: contributes nothing, attends to nothing, caches nothing."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        return torch.zeros_like(hidden_states), None


class ZeroBlock(nn.Module):
    """Stands where an MLP was: contributes nothing."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(hidden_states)


class One(nn.Module):
    """Stands where the gate of an MLP was: what is multiplied by it stays as it is."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states.new_ones(())


def root_of(model: PreTrainedModel) -> str:
    """What the live paths of the base model begin with, whatever the head: `resnet.`, or nothing."""
    base = model.base_model
    prefix = next(name for name, module in model.named_modules() if module is base)
    return f"{prefix}." if prefix else ""


ARCHITECTURES: dict[str, Architecture] = {}

_Kind = TypeVar("_Kind", bound=Architecture)


def architecture_for(model: Any, kind: type[_Kind] = LayerArchitecture) -> _Kind:
    """The architecture of a model, or of its config.

    Args:
        model: or its config.
        kind: what is needed: layers to fuse, or a chain of convolutions to merge.

    Returns:
        The architecture that was registered for its `model_type`.

    Raises:
        UnsupportedModelError: no architecture of that kind is registered for its `model_type`.
    """
    config = getattr(model, "config", model)
    model_type = str(getattr(config, "model_type", type(model).__name__)).removeprefix(FUSED_PREFIX)
    architecture = ARCHITECTURES.get(model_type)
    if isinstance(architecture, kind):
        return architecture
    known = ", ".join(sorted(name for name, architecture in ARCHITECTURES.items() if isinstance(architecture, kind)))
    if architecture is not None:
        what = "layers to fuse, drop or make linear" if kind is LayerArchitecture else "convolutions to merge"
        raise UnsupportedModelError(f"the architecture of {model_type!r} has no {what}; known ones: {known}.")
    raise UnsupportedModelError(
        f"unknown architecture {model_type!r}. Known: {known}. To add one, see 'Add an "
        "architecture' in CONTRIBUTING.md."
    )
