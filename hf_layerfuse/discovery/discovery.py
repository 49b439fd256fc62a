"""The architecture of a model, found from one forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import UnsupportedModelError
from ..evaluation.batches import model_inputs
from ..evaluation.dummy_inputs import dummy_inputs
from ..evaluation.modes import eval_mode
from ..models.architectures import FUSED_PREFIX, TransformerArchitecture, architecture_for
from ..models.architectures.base import root_of
from .blocks import DiscoveredBlock, LayerTable
from .checks import check_table
from .config_fields import depth_field, per_layer_fields
from .layouts import gate_layout, qkv_layout
from .source import source_of
from .stacks import Stack, find_stacks
from .tables import stack_table

_DEPTH = "num_hidden_layers"
"""Config field of the depth that the engine changes."""


@dataclass(frozen=True)
class Discovery:
    """The architecture of a model, as `discover_architecture` found it.

    Attributes:
        model_type: `model_type` of its config.
        stack: Path of the stack of layers in the model.
        layers: The same path, relative to the base model.
        blocks: Blocks of a layer, in execution order.
        parallel: Whether all blocks read the input of the layer.
        depth_field: Config field that sets the number of layers.
        per_layer_config: Config fields with one entry per layer.
        verified: Claims that hold on the batch.
        unverified: Claims that do not hold, or could not be tested, each with the reason.
        notes: Differences between the layers, and parts that the table leaves out.
    """

    model_type: str
    stack: str
    layers: str
    blocks: tuple[DiscoveredBlock, ...]
    parallel: bool
    depth_field: str
    per_layer_config: tuple[str, ...]
    verified: tuple[str, ...]
    unverified: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def post_norm(self) -> bool:
        """Whether the norm of every block follows its residual sum."""
        return all(block.norm_after for block in self.blocks)

    @property
    def between(self) -> Mapping[str, tuple[str, ...]]:
        """Kind -> paths of what lies between `out` and the residual sum."""
        return {block.kind: block.between for block in self.blocks if block.between}

    @property
    def skip(self) -> Mapping[str, Mapping[str, type[nn.Module]]]:
        """Kind -> path -> placeholder."""
        return {block.kind: block.skip for block in self.blocks}

    @property
    def activation(self) -> str | None:
        """Path of the activation of the MLP, or None."""
        return next((block.activation for block in self.blocks if block.kind == "mlp"), None)

    @property
    def layouts(self) -> Mapping[str, str]:
        """Path of a joint map -> its layout."""
        return {block.roles[role]: block.layout for block in self.blocks for role in _JOINT if role in block.roles}

    def architecture(self) -> type[TransformerArchitecture]:
        """The table as a class, to pass to `register_architecture`.

        Raises:
            UnsupportedModelError: `TransformerArchitecture` cannot describe this architecture.
        """
        return type(class_name(self.model_type), (TransformerArchitecture,), {"__module__": __name__, **self.fields()})

    def source(self) -> str:
        """The table as Python source, which registers the architecture when it is executed.

        Raises:
            UnsupportedModelError: `TransformerArchitecture` cannot describe this architecture.
        """
        return source_of(class_name(self.model_type), self.fields())

    def fields(self) -> dict[str, Any]:
        """Attributes of the class, without those that equal their default.

        Raises:
            UnsupportedModelError: `TransformerArchitecture` cannot describe this architecture.
        """
        self._check_representable()
        attention, mlp = self.blocks
        between = {kind: paths[0] for kind, paths in zip(("attention", "mlp"), map(_between, self.blocks)) if paths}
        found: dict[str, Any] = {
            "model_type": self.model_type,
            "layers": self.layers,
            "attention": dict(attention.roles),
            "mlp": dict(mlp.roles),
            "activation": mlp.activation,
            "adds": mlp.adds,
            "parallel": self.parallel,
            "between": between,
            "post_norm": self.post_norm,
            "per_layer_config": tuple(dict.fromkeys(["layer_types", *self.per_layer_config])),
            "skip": {"attention": dict(attention.skip), "mlp": dict(mlp.skip)},
        }
        return {
            name: value
            for name, value in found.items()
            if not hasattr(TransformerArchitecture, name) or value != getattr(TransformerArchitecture, name)
        }

    def _check_representable(self) -> None:
        kinds = [block.kind for block in self.blocks]
        where = f"the layers of {self.stack} ({self.model_type!r}) were found, but cannot be fused"
        if kinds not in (["attention", "mlp"], ["mixer", "mlp"]):
            raise UnsupportedModelError(
                f"{where}: each has the blocks {', '.join(kinds)}; supported are one attention block and one MLP."
            )
        if self.depth_field != _DEPTH:
            raise UnsupportedModelError(
                f"{where}: their number is config.{self.depth_field}; supported is config.{_DEPTH}."
            )
        if len({block.norm_after for block in self.blocks}) > 1:
            raise UnsupportedModelError(
                f"{where}: the norm follows the residual sum of one block and precedes the other; supported is one "
                "position for both."
            )
        for block in self.blocks:
            if len(block.between) > 1:
                raise UnsupportedModelError(
                    f"{where}: {' and '.join(block.between)} lie between {block.roles.get('out')} and the residual sum; "
                    "supported is one norm, parameter or number."
                )


_JOINT = ("qkv", "gate_in")


def _between(block: DiscoveredBlock) -> tuple[str, ...]:
    return block.between


def class_name(model_type: str) -> str:
    """Name of the class of a table: `Gemma2Architecture` for `gemma2`."""
    return "".join(part.capitalize() for part in model_type.replace("-", "_").split("_")) + "Architecture"


@torch.no_grad()
def discover_architecture(
    model: PreTrainedModel, batch: Mapping[str, Any] | None = None, *, stack: str | None = None
) -> Discovery:
    """Find the architecture of a model, and verify it numerically.

    One forward pass finds the stack of layers. Each layer then runs once more, alone, to record its operations. The
    model is not copied and not changed: the checks use hooks, and replace single modules for one forward pass.

    Args:
        model: Model with its weights, with any head.
        batch: Representative batch of model inputs with at least two tokens per row; by default, random tokens or
            pixels.
        stack: Path of the stack of layers, needed only if the model has several.

    Returns:
        The architecture that was found, with the parts that could not be verified. `source()` prints it as a class.

    Raises:
        UnsupportedModelError: The model does not run a stack of layers once, in order; layers attend inside windows,
            share weights or have different blocks; no config field sets their number; there are several stacks and
            `stack` names none of them; or the model does not accept the batch.

    Examples:
        >>> print(discover_architecture(model).source())  # doctest: +SKIP
    """
    _check(model)
    with eval_mode(model):
        inputs = _inputs(model, batch)
        stacks, refused = _stacks(model, inputs, given=batch is not None)
        chosen, field = _chosen(model, stacks, refused, stack)
        table, notes = stack_table(chosen)
        table = replace(table, blocks=tuple(_with_layout(model, chosen, block, field) for block in table.blocks))
        claims = check_table(model, inputs, chosen, table)
    claims |= {
        f"the layout of {block.roles[role]}": None if block.layout else "no known layout leaves the output as it is"
        for block in table.blocks
        for role in _JOINT
        if role in block.roles
    }
    root = root_of(model)
    return Discovery(
        model_type=model.config.model_type,
        stack=chosen.path,
        layers=chosen.path.removeprefix(root),
        blocks=table.blocks,
        parallel=table.parallel,
        depth_field=field,
        per_layer_config=per_layer_fields(model.config, field),
        verified=tuple(claim for claim, why in claims.items() if why is None),
        unverified=tuple(f"{claim}: {why}" for claim, why in claims.items() if why is not None),
        notes=notes,
    )


def _check(model: PreTrainedModel) -> None:
    if not isinstance(model, PreTrainedModel):
        architecture_for(model)  # which says what to pass instead
    if model.config.model_type.startswith(FUSED_PREFIX):
        raise UnsupportedModelError(f"{type(model).__name__} is already fused: discover the original instead.")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no weights, and an architecture is found by running the model: load it with "
            "from_pretrained, without offloading."
        )


def _inputs(model: PreTrainedModel, batch: Mapping[str, Any] | None) -> dict[str, Tensor]:
    if batch is not None:
        return model_inputs(batch, model)
    try:
        return dummy_inputs(model)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise UnsupportedModelError(_ask_for_batch(model, error)) from error


def _stacks(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], given: bool
) -> tuple[dict[str, Stack], dict[str, str]]:
    try:
        return find_stacks(model, inputs)
    except (AttributeError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if given:
            raise UnsupportedModelError(
                f"{type(model).__name__} does not accept the batch of {', '.join(inputs)}: {_one_line(error)}"
            ) from error
        raise UnsupportedModelError(_ask_for_batch(model, error)) from error


def _ask_for_batch(model: PreTrainedModel, error: Exception) -> str:
    return (
        f"{type(model).__name__} does not accept random inputs: {_one_line(error)} Pass a representative batch of its "
        "inputs."
    )


def _one_line(error: Exception) -> str:
    text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return text if text.endswith(".") else f"{text}."


def _chosen(
    model: PreTrainedModel, stacks: Mapping[str, Stack], refused: Mapping[str, str], wanted: str | None
) -> tuple[Stack, str]:
    """The stack to describe, and its depth field."""
    name = type(model).__name__
    if wanted is not None:
        path = next((path for path in (wanted, root_of(model) + wanted) if path in stacks), None)
        if path is None:
            why = f" {wanted!r} is not one: {refused[wanted]}." if wanted in refused else ""
            known = ", ".join(map(repr, stacks)) or "none"
            raise UnsupportedModelError(f"{name} has no stack {wanted!r}.{why} Its stacks: {known}.")
        stacks = {path: stacks[path]}
    if not stacks:
        each = "; ".join(f"{path}: {why}" for path, why in refused.items()) or "it has no nn.ModuleList"
        raise UnsupportedModelError(
            f"{name} does not run a stack of layers once, in order. What was found: {each}."
        )
    fields = {path: depth_field(model, path) for path in stacks}
    followed = [path for path, field in fields.items() if field is not None]
    if not followed:
        each = ", ".join(f"{path} ({len(stacks[path].layers)} layers)" for path in stacks)
        raise UnsupportedModelError(
            f"no field of {type(model.config).__name__} sets the number of layers of {each}, so a model with fewer "
            "layers cannot be built."
        )
    if len(followed) > 1:
        each = ", ".join(f"{path!r} ({len(stacks[path].layers)} layers, config.{fields[path]})" for path in followed)
        raise UnsupportedModelError(f"{name} has several stacks of layers: pass stack= with one of {each}.")
    return stacks[followed[0]], fields[followed[0]]


def _with_layout(model: PreTrainedModel, stack: Stack, block: DiscoveredBlock, field: str) -> DiscoveredBlock:
    """A block with the layout of its joint map, tested on the middle layer."""
    middle = len(stack.layers) // 2
    layer, call = stack.layers[middle], stack.calls[middle]
    if "qkv" in block.roles and "out" in block.roles:
        config: PreTrainedConfig = model.config
        for name in field.split(".")[:-1]:
            config = getattr(config, name)
        found = qkv_layout(layer, call, block.roles["qkv"], block.roles["out"], config)
        return replace(block, layout=found and found[0])
    if "gate_in" in block.roles:
        return replace(block, layout=gate_layout(layer, call, block.roles["gate_in"], block.activation))
    return block
