"""Module paths of the blocks of an architecture: one table per `model_type`."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, NamedTuple

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ...errors import UnsupportedModelError
from ...plan import DECODER, TRANSFORMER, Edit, Plan, PlanNotes
from .layouts import Heads, JointLayout, Pairing, heads_in
from .placeholders import IdentityWithUnitGate, UnitGate

ATTENDING = ("attention", "cross")
"""Kinds of blocks with heads."""


@dataclass(frozen=True)
class Block:
    """One attention, cross-attention, MLP or convolutional block at one depth.

    `modules` maps a role to a live module path. `norm` is the norm that the block owns, `out` is the map back to the
    residual stream. The architecture chooses the roles of the other maps and small norms. `joint` maps the role of a
    joint map to the layout of its rows. `heads` are the heads of a block with attention, if the config states them.
    """

    layer: int
    kind: Literal["attention", "cross", "mlp", "conv"]
    modules: Mapping[str, str]
    joint: Mapping[str, JointLayout] = field(default_factory=dict)
    heads: Heads | None = None


class Place(NamedTuple):
    """A hook point: the input of a module, its output, or its output `added` to the input of the layer.

    `module` is a path relative to a layer; the empty path is the layer itself. In a conv graph, the path is
    relative to the model.
    """

    when: Literal["before", "after", "added"]
    module: str


class Architecture:
    """The table of an architecture: everything the engine needs to know about it.

    Attributes:
        model_type: `model_type` of its configs.
        discovered: Whether `discover_architecture` made the table.
    """

    model_type: ClassVar[str]
    discovered: ClassVar[bool] = False

    def check(self, model: PreTrainedModel) -> None:
        """Raise `UnsupportedModelError` for a model of this architecture that cannot be made smaller."""

    def variant(self, config: PreTrainedConfig) -> Architecture:
        """The table for a config, where its fields decide on the structure of a layer."""
        return self


class LayerArchitecture(Architecture, ABC):
    """A stack of layers, each with one block of every kind. All paths except `layers` are relative to a layer.

    Attributes:
        layers: Path of the `nn.ModuleList` of layers inside the base model.
        skip: Modules to replace, if a layer has them, and their replacements, so that a layer runs without a block; one
            entry per kind. The first module of an MLP is the one that reads the state.
        post_norm: Whether the block's norm follows the residual sum (BERT) instead of preceding the block (GPT-2).
        per_layer_config: Config fields with one entry per layer, kept in step with the layers.
        other_lists: Config fields whose lists are as long as the stack by chance.
        stack: Name of the stack in models that have several, such as `encoder`; empty in others.
        other_stacks: Tables of the other stacks of the same models. The first table is the default.
        mask: Input of the model that masks the tokens of the stack; empty for tokens without padding.
        fixed: Kind -> layers whose block cannot be removed, because other layers use what it computes.
        essential_types: Entries of `layer_types` of which at least one layer must keep its attention, because the model
            reads the positions of the tokens from its cache.
        config: Name of the nested config that describes the stack (`text_config`); empty for the config itself.
        depth: Config field with the number of layers.
        resizes: Whether layers may change the shape of the stream. If so, only layers of one shape can be compared.
        kinds: Kinds of blocks in a layer, in execution order. The attribute with the name of a kind is its table:
            role -> path of its modules.
    """

    layers: ClassVar[str]
    skip: ClassVar[Mapping[str, Mapping[str, type[nn.Module]]]] = {}
    post_norm: ClassVar[bool] = False
    per_layer_config: ClassVar[tuple[str, ...]] = ("layer_types",)
    other_lists: ClassVar[tuple[str, ...]] = ()
    stack: ClassVar[str] = ""
    other_stacks: ClassVar[tuple[type[LayerArchitecture], ...]] = ()
    mask: ClassVar[str] = "attention_mask"
    fixed: ClassVar[Mapping[str, tuple[int, ...]]] = {}
    essential_types: ClassVar[tuple[str, ...]] = ()
    config: ClassVar[str] = ""
    depth: ClassVar[str] = "num_hidden_layers"
    resizes: ClassVar[bool] = False
    kinds: ClassVar[tuple[str, ...]]

    def table(self, kind: str) -> Mapping[str, str]:
        """Role -> path, for the modules of a kind of block."""
        return getattr(self, kind)

    @abstractmethod
    def place(self, kind: str, name: str) -> Place:
        """Place of a `HookPoint` in a kind of block."""

    def with_kinds(self, kinds: Sequence[str]) -> LayerArchitecture:
        """The table for a plan of these kinds. In plans of older releases, cross-attention belongs to no block."""
        if (tuple(kinds), self.kinds) != (TRANSFORMER, DECODER):
            return self
        older = copy.copy(self)
        older.kinds = TRANSFORMER
        return older

    def plan(self, depth: int, edits: Sequence[Edit] = (), notes: PlanNotes | None = None) -> Plan:
        """A plan for the stack, which has `depth` layers."""
        return Plan(self.model_type, depth, tuple(edits), notes or PlanNotes(), self.kinds, self.stack)

    def config_of(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """The config that describes the stack: a config of the architecture, or the one nested in it."""
        return getattr(config, self.config) if self.config else config

    def complete(self, config: PreTrainedConfig) -> None:
        """Bring fields that follow from `per_layer_config` or the depth up to date, in the config of the stack."""

    def silences(self, kind: str, parameter: str) -> bool:
        """Whether a block adds nothing to the stream once all such parameters are zero."""
        return parameter.startswith(f"{self.table(kind)['out']}.")

    def layers_path(self, model: PreTrainedModel) -> str:
        """Live path of the list of layers, relative to `model`, with any head."""
        return root_of(model) + self.layers

    def layer_list(self, model: PreTrainedModel) -> nn.ModuleList:
        """The list of layers of `model`, with any head.

        Raises:
            UnsupportedModelError: The model has no such list, like a decoder alone where the stack is the encoder.
        """
        try:
            return model.get_submodule(self.layers_path(model))
        except AttributeError as error:
            others = [table.stack for table in self.other_stacks]
            stack = f"pass stack= to choose another of its stacks ({', '.join(others)}), or " if others else ""
            raise UnsupportedModelError(
                f"{type(model).__name__} has no {self.layers!r}, the layers in the table of {self.model_type!r}: "
                f"{stack}fuse a model of {self.model_type!r} that has them."
            ) from error

    def blocks(self, model: PreTrainedModel) -> list[Block]:
        """Blocks of `model` that have not been removed, in execution order."""
        path = self.layers_path(model)
        found = []
        for index, layer in enumerate(self.layer_list(model)):
            for kind in self.kinds:
                gone = [
                    type(part) is to
                    for at, to in self.skip.get(kind, {}).items()
                    if (part := part_at(layer, at)) is not None
                ]
                # a part of a stock layer may be an Identity too, such as the first norm of ModernBERT
                if not gone or not all(gone):
                    modules = {
                        role: f"{path}.{index}.{at}"
                        for role, at in self.table(kind).items()
                        if (part := part_at(layer, at)) is not None
                        and (role == "norm" or type(part) not in (nn.Identity, UnitGate, IdentityWithUnitGate))
                    }
                    found.append(self.block(self.config_of(model.config), index, kind, modules))
        return found

    def block(self, config: PreTrainedConfig, layer: int, kind: str, modules: Mapping[str, str]) -> Block:
        """Block of a layer, with the layouts of its maps. `config` is the config of the stack."""
        return Block(layer, kind, modules)

    def stays(self, parameter: str) -> bool:
        """Whether a parameter of a block stays when its block is removed; its name is relative to its layer.

        Those stay that no placeholder replaces, such as norms behind a residual sum: the next block was trained on
        normalised states.
        """
        gone = self.skip.get(self.owner(parameter), {})
        return bool(gone) and not any(parameter.startswith(f"{path}.") for path in gone)

    def owner(self, parameter: str) -> str | None:
        """Kind of the block that owns a parameter, or None. The name of the parameter is relative to its layer."""
        owners = [
            kind
            for kind in self.kinds
            if any(parameter == path or parameter.startswith(f"{path}.") for path in self.parts(kind))
        ]
        return owners[0] if len(owners) == 1 else None  # parallel blocks may share their norm

    def parts(self, kind: str) -> tuple[str, ...]:
        """Paths of the modules and parameters of a kind of block."""
        return tuple(self.table(kind).values())


class TransformerArchitecture(LayerArchitecture):
    """Layers of one attention and one MLP block each, in decoders also one cross-attention block between them.

    Roles with a meaning are `norm`, `q`, `k`, `v`, `q_norm`, `k_norm`, `in`, `gate` and `out`; the joint maps `qkv`,
    `gate_in` and, in cross-attention, `kv`; and the maps `q_position` and `k_position` from position embeddings to
    vectors that keys and queries are multiplied with (DeBERTa). Parts with another role belong to the block, but
    nothing fits them. A block without the role `out` is opaque: it can be dropped, kept or shared, but not aligned or
    refitted. `norm` is the norm in front of the block, or the one behind the residual sum with `post_norm`.

    Attributes:
        attention: Role -> path, for the parts of the attention block.
        cross: Role -> path, for the parts of the cross-attention block, if `kinds` has it. Its `q` reads the stream,
            its `k` and `v` the states of the encoder, so that the refit folds nothing into these.
        mlp: Role -> path, for the parts of the MLP block.
        activation: Path of the module between the maps of the MLP. Without it, MLPs cannot become linear.
        adds: Path of a module that contains only `out` and `norm` and returns norm(out(a) + b), where a is the input
            of `out` and b the input of the MLP. Without it, the residual sum cannot be folded.
        parallel: Whether both blocks read the input of the layer, which adds their outputs in one sum (GPT-NeoX).
        between: Kind -> path of what lies between the output of `out` and the residual sum: a norm (Gemma 2), a
            parameter (BEiT) or a number (Granite) that multiplies.
        joint: Role of a joint map -> layout of its rows. A `qkv` holds all queries, all keys and all values ("parts",
            GPT-2), or for each key-value head its queries, its key and its value ("groups", GPT-NeoX). A `kv` holds all
            keys and all values. A `gate_in` holds the units that pass the activation, then those that do not
            ("gate_first"), or the reverse ("gate_last").
        pairing: Coordinates of a head that rotate together with the position, if the config states rotary positions:
            "halves" (Llama) or "neighbours" (GLM-4), see `Heads`.
        bound_heads: Whether each head has its own position bias (T5, ALiBi). Such heads can be rotated, but they
            cannot change places.
        also_positions: Roles of maps that read position embeddings besides the stream (DeBERTa). The refit folds
            nothing into them.
        silent: Kind -> paths of the parameters that are zero in an opaque block that adds nothing.
    """

    attention: ClassVar[Mapping[str, str]]
    cross: ClassVar[Mapping[str, str]]
    mlp: ClassVar[Mapping[str, str]]
    activation: ClassVar[str | None] = None
    adds: ClassVar[str | None] = None
    parallel: ClassVar[bool] = False
    between: ClassVar[Mapping[str, str]] = {}
    joint: ClassVar[Mapping[str, JointLayout]] = {"qkv": "parts", "gate_in": "gate_first"}
    pairing: ClassVar[Pairing] = "halves"
    bound_heads: ClassVar[bool] = False
    also_positions: ClassVar[tuple[str, ...]] = ()
    silent: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    kinds = TRANSFORMER

    def heads(self, config: PreTrainedConfig, layer: int) -> Heads | None:
        """Heads of an attention block; None if the config of the stack states no number of heads."""
        return heads_in(config, layer, self.pairing, self.bound_heads)

    def block(self, config: PreTrainedConfig, layer: int, kind: str, modules: Mapping[str, str]) -> Block:
        heads = self.heads(config, layer) if kind in ATTENDING else None
        if heads is not None and kind == "cross":  # the states of an encoder have no positions in the stream
            heads = replace(heads, rotary=0, bound=False)
        return Block(layer, kind, modules, self.joint, heads)

    def place(self, kind: str, name: str) -> Place:
        table = self.table(kind)
        if name in ("features", "output"):
            return Place("before" if name == "features" else "after", table["out"])
        if name == "read" and not self.post_norm and "norm" in table:
            return Place("after", table["norm"])
        if name == "sum" and self.post_norm:
            return Place("before", table["norm"])
        if name == "sum" and kind == self.kinds[-1]:
            return Place("after", "")
        if kind == self.kinds[0] and name in ("read", "residual"):
            return Place("before", "")
        if self.parallel:
            return Place("added", self.between.get("attention", self.attention["out"]))
        order = type(self).kinds  # all kinds, also for the plans of older releases
        return Place("before", self.entry(order[order.index(kind) + 1] if name == "sum" else kind))

    def parts(self, kind: str) -> tuple[str, ...]:
        between = self.between.get(kind)
        return super().parts(kind) if between is None else (*super().parts(kind), between)

    def silences(self, kind: str, parameter: str) -> bool:
        module, _, name = parameter.rpartition(".")
        paths = self.silent.get(kind) or (self.table(kind)["out"],)
        return any(parameter == path or parameter.startswith(f"{path}.") for path in paths) or (
            name == "bias" and module == self.between.get(kind)
        )

    def own_norm(self, kind: str) -> str | None:
        """Path of the norm in front of a kind of block; None if there is none, or if both blocks read it."""
        norms = [self.table(each).get("norm") for each in self.kinds]
        norm = self.table(kind).get("norm")
        return None if self.post_norm or norms.count(norm) > 1 else norm

    def entry(self, kind: str) -> str:
        """Path of the first module of a block that reads the stream."""
        norm = self.table(kind).get("norm")
        return next(iter(self.skip[kind])) if self.post_norm or norm is None else norm


class ConvArchitecture(LayerArchitecture):
    """Residual layers of two convolutions, act(x + norm(out(f(in_norm(in(x)))))). Each is one block (He et al. 2016).

    Layers may differ in shape; only layers of one shape can be fused. A removed layer leaves no placeholder.

    Attributes:
        conv: Role -> path. `in` and `out` are the convolutions, `in_norm` and `norm` the batch norms that follow them,
            and `act` is the activation after the residual sum. A projection in the shortcut has its own role.
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
                    f"layer {block.layer} has {', '.join(type(part).__name__ for part in (*convs, *norms))}: a "
                    "layer can be fused if it has two Conv2d of one group, each followed by a BatchNorm2d with a gain."
                )


def part_at(layer: nn.Module, path: str) -> nn.Module | None:
    """Module of a layer at a path, or None: in hybrid models, layers have parts that others lack."""
    try:
        return layer.get_submodule(path)
    except AttributeError:
        return None


def root_of(model: PreTrainedModel) -> str:
    """Prefix of the live paths of the base model, with any head: `resnet.`, or an empty string."""
    base = model.base_model
    prefix = next(name for name, module in model.named_modules() if module is base)
    return f"{prefix}." if prefix else ""
