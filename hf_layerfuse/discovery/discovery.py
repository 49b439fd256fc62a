"""The architecture of a model, found from one forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..calibration.contract import check_contract
from ..errors import UnsupportedModelError
from ..evaluation.divergence import prediction
from ..evaluation.modes import eval_mode, outside_inference_mode
from ..models.architectures import FUSED_PREFIX, TransformerArchitecture, architecture_for
from ..models.architectures.base import root_of
from ..models.surgery.checks import shapes_of
from .blocks import DiscoveredBlock
from .checks import adds_nothing, check_removal, silent_parameters, with_needed_norm
from .config_fields import lists_of_depth, owner_of, per_layer_fields
from .layouts import BlockLayout, block_layout
from .source import class_name, fields_of, source_of
from .stack_choice import check_tokens, chosen_stack, inputs_for, stack_mask, stack_name, stacks_of
from .stacks import RAISED, Stack
from .tables import stack_table


@dataclass(frozen=True)
class Discovery:
    """The architecture of a model, as `discover_architecture` found it.

    Attributes:
        model_type: `model_type` of its config.
        stack: Path of the stack of layers in the model.
        layers: The same path, relative to the base model.
        name: Short name of the stack, if the model has several.
        mask: Input of the model that masks the tokens of the stack.
        other_stacks: Paths of its other stacks whose number of layers can be set.
        blocks: Blocks of a layer, in execution order.
        parallel: Whether all blocks read the input of the layer.
        joint: Role of a joint map -> layout of its rows, see `TransformerArchitecture`.
        pairing: Coordinates of a head that rotate together, if the config states rotary positions.
        bound_heads: Whether each head has its own position bias.
        fixed: Kind -> layers whose block cannot be removed, because other layers use its results.
        depth_field: Path of the config field that sets the number of layers.
        per_layer_config: Config fields with one entry per layer.
        other_lists: Config fields whose lists are as long as the stack by chance.
        verified: Claims that hold on the batch.
        unverified: Claims that do not hold, or could not be tested, each with the reason.
        notes: Differences between the layers, and parts that the table leaves out.
    """

    model_type: str
    stack: str
    layers: str
    blocks: tuple[DiscoveredBlock, ...]
    parallel: bool
    joint: Mapping[str, str]
    pairing: str
    bound_heads: bool
    depth_field: str
    per_layer_config: tuple[str, ...]
    other_lists: tuple[str, ...]
    fixed: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    verified: tuple[str, ...] = ()
    unverified: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    name: str = ""
    mask: str = "attention_mask"
    other_stacks: tuple[str, ...] = ()

    @property
    def post_norm(self) -> bool:
        """Whether the norm of every block follows its residual sum."""
        return all(block.norm_after for block in self.blocks)

    @property
    def between(self) -> Mapping[str, tuple[str, ...]]:
        """Kind -> paths of the parts between `out` and the residual sum."""
        return {block.kind: block.between for block in self.blocks if block.between}

    @property
    def skip(self) -> Mapping[str, Mapping[str, type[nn.Module]]]:
        """Kind -> path -> placeholder."""
        return {block.kind: block.skip for block in self.blocks}

    @property
    def activation(self) -> str | None:
        """Path of the activation of the MLP, or None."""
        return next((block.activation for block in self.blocks if block.kind == "mlp"), None)

    def architecture(self) -> type[TransformerArchitecture]:
        """The table as a class, to pass to `register_architecture`.

        Raises:
            UnsupportedModelError: `TransformerArchitecture` cannot describe this architecture.
        """
        entries = {"__module__": __name__, "discovered": True, **fields_of(self)}
        return type(class_name(self.model_type), (TransformerArchitecture,), entries)

    def source(self) -> str:
        """The table as Python source, which registers the architecture when it is executed.

        Raises:
            UnsupportedModelError: `TransformerArchitecture` cannot describe this architecture.
        """
        return source_of(class_name(self.model_type), fields_of(self))


@outside_inference_mode
@torch.no_grad()
def discover_architecture(
    model: PreTrainedModel, batch: Mapping[str, Any] | None = None, *, stack: str | None = None
) -> Discovery:
    """Find the architecture of a model, and verify it numerically.

    One forward pass finds the stack of layers. Each layer then runs once more, alone, to record its operations. The
    model is not copied and not changed: the checks use hooks, and replace single modules for one forward pass.

    Args:
        model: Model with its weights, with any head.
        batch: Representative batch of model inputs with at least two tokens per row, of which two rows are used; by
            default, random tokens, pixels or sound.
        stack: Path of the stack of layers, or its short name, such as `decoder`. It is needed only if the model has
            several.

    Returns:
        The architecture that was found, with the parts that could not be verified. `source()` prints it as a class.

    Raises:
        DataError: The batch is not a dict of tensors, or has one token per row.
        UnsupportedModelError: The value is not a model with weights; the model does not run a stack of layers once, in
            order; layers attend inside windows, share weights or have different blocks; no config field sets their
            number; there are several stacks and `stack` names none of them; or the model does not accept the batch.

    Examples:
        >>> print(discover_architecture(model).source())  # doctest: +SKIP
    """
    check_discoverable(model)
    with eval_mode(model):
        inputs = inputs_for(model, batch)
        stacks, refused = stacks_of(model, inputs, given=batch is not None)
        chosen, depths = chosen_stack(model, stacks, refused, stack)
        check_tokens(chosen)
        found = _described(model, chosen, depths[chosen.path])
        if len(depths) > 1:
            name, mask = stack_name(chosen.path, depths), stack_mask(model, inputs, chosen)
            others = tuple(path for path in depths if path != chosen.path)
            found = replace(found, name=name, mask=mask, other_stacks=others)
        return _verified(model, inputs, chosen, found)


def _described(model: PreTrainedModel, stack: Stack, depth: str) -> Discovery:
    """The architecture of a stack, before it is verified as a whole."""
    table, notes = stack_table(stack)
    middle = len(stack.layers) // 2
    layouts: dict[str, BlockLayout] = {}
    blocks, unknown = [], []
    if table.idle:
        unknown.append(f"the use of {', '.join(table.idle)}: these parameters are not used on this batch")
    for block in table.blocks:
        block = with_needed_norm(stack.layers[middle], stack.calls[middle], block)
        if block.opaque:
            block = replace(block, silent=_silent(stack, block))
        elif block.has_known_maps:
            config = owner_of(model.config, depth)
            layout = block_layout(stack.layers[middle], stack.calls[middle], block, config, middle)
            if isinstance(layout, str):
                unknown.append(f"the layout of the {block.kind} block: {layout}")
            else:
                layouts[block.kind] = layout
        blocks.append(block)
    lists = lists_of_depth(model.config, depth)
    per_layer = per_layer_fields(model, stack.path, depth)
    attention = layouts.get("attention", BlockLayout())
    return Discovery(
        model_type=model.config.model_type,
        stack=stack.path,
        layers=stack.path.removeprefix(root_of(model)),
        blocks=tuple(blocks),
        parallel=table.parallel,
        joint={role: each for layout in layouts.values() for role, each in layout.joint.items()},
        pairing=attention.pairing,
        bound_heads=attention.bound_heads,
        depth_field=depth,
        per_layer_config=per_layer,
        other_lists=tuple(name for name in lists if name not in per_layer),
        unverified=tuple(unknown),
        notes=notes,
    )


def _silent(stack: Stack, block: DiscoveredBlock) -> tuple[str, ...]:
    """Parameters that silence an opaque block, in one layer of each shape."""
    shapes = {shapes_of(layer): index for index, layer in enumerate(stack.layers)}
    found = [silent_parameters(stack.layers[index], stack.calls[index], block) for index in shapes.values()]
    return tuple(dict.fromkeys(name for names in found for name in names))


def _verified(model: PreTrainedModel, inputs: Mapping[str, Tensor], stack: Stack, found: Discovery) -> Discovery:
    """An architecture with the claims that hold and those that do not."""
    verified, unverified, fixed = [], list(found.unverified), {}
    whole = prediction(model(**inputs))
    for block in found.blocks:
        why, used = _check_removals(model, inputs, whole, stack, block)
        claim = f"without its {block.kind} block, a layer computes as if the block added zero"
        if why is not None:
            unverified.append(f"{claim}: {why}")
            continue
        if used:
            fixed[block.kind] = used
            claim += f", except layers {', '.join(map(str, used))}, whose block other layers use"
        verified.append(claim)
    found = replace(found, fixed=fixed)
    claim = "the layers, run one by one with their blocks as in the table, are the model"
    try:
        check_contract(model, [inputs], found.architecture()())
        verified.append(claim)
    except (UnsupportedModelError, *RAISED) as error:
        unverified.append(f"{claim}: {error}")
    return replace(found, verified=tuple(verified), unverified=tuple(unverified))


def _check_removals(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], whole: Tensor, stack: Stack, block: DiscoveredBlock
) -> tuple[str | None, tuple[int, ...]]:
    """Check the placeholders of a block in the first, the middle and the last layer, or in all if one of them fails.

    Args:
        model: Model in eval mode.
        inputs: Its inputs, on its device.
        whole: Its prediction, of any shape.
        stack: Stack of the block.
        block: Block to check.

    Returns:
        The reason why they fail in the middle layer, or None; and the layers in which they fail.
    """
    last, middle = len(stack.layers) - 1, len(stack.layers) // 2
    if adds_nothing(model, inputs, whole, stack.layers[middle], block):
        return f"the block of layer {middle} adds zero on this batch, so the comparison shows nothing", ()
    checked = {index: check_removal(model, inputs, stack, block, index) for index in (0, middle, last)}
    if checked[middle] is None and any(checked.values()):
        checked |= {
            index: check_removal(model, inputs, stack, block, index) for index in range(last) if index not in checked
        }
    return checked[middle], tuple(sorted(index for index, why in checked.items() if why is not None))


def check_discoverable(model: Any) -> None:
    """Raise `UnsupportedModelError` for a value that is not a stock model with weights."""
    if isinstance(model, PreTrainedConfig):
        raise UnsupportedModelError(
            f"{type(model).__name__} is a config, and an architecture is found by running a model: pass the model."
        )
    if not isinstance(model, PreTrainedModel):
        architecture_for(model)  # which says what to pass instead
    if not model.config.model_type:
        raise UnsupportedModelError(
            f"{type(model.config).__name__} has no model_type, by which tables are registered: set it on the class, "
            "and register the class with AutoConfig and the Auto class of the model."
        )
    if model.config.model_type.startswith(FUSED_PREFIX):
        raise UnsupportedModelError(f"{type(model).__name__} is already fused: discover the original instead.")
    if next(model.parameters(), None) is None or any(parameter.is_meta for parameter in model.parameters()):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no weights, and an architecture is found by running the model: load it with "
            "from_pretrained, without offloading."
        )
