"""Distances between the blocks of a model, by their activations or by their weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...calibration.recorder import observe
from ...errors import RecipeError
from ...evaluation.batches import Batches
from ...math.similarity import ON_ACTIVATIONS, ON_WEIGHTS
from ...models.architectures import Block, LayerArchitecture, architecture_for, linear_maps, reads_stream
from ...models.architectures.block_weights import batch_norm_gain
from ...models.surgery.checks import shapes_of
from ...models.surgery.layers import is_shared
from ...plan import Kind


def block_distances(
    model: PreTrainedModel,
    kinds: Sequence[Kind],
    similarity: str,
    batches: Batches | None,
    stack: str | None = None,
) -> dict[Kind, Tensor]:
    """Return the distances between all blocks of each kind, by a similarity: (depth, depth) float64.

    Raises:
        RecipeError: Similarity of activations without batches, or for layers of different shapes.
        DataError: Batches without tokens, or with too few for the similarity.
    """
    architecture = architecture_for(model, stack=stack)
    if similarity in ON_WEIGHTS:
        measure = ON_WEIGHTS[similarity]
        if architecture.resizes:
            return {kind: _between_shapes(model, architecture, measure) for kind in kinds}
        return {kind: _between_alike(model, architecture, kind, measure) for kind in kinds}
    if architecture.resizes:
        raise RecipeError(
            f"similarity={similarity!r} compares states after different layers, but their shapes differ in "
            f"{model.config.model_type!r}: use a similarity of weights: {', '.join(ON_WEIGHTS)}."
        )
    if batches is None:
        raise RecipeError(
            f"similarity={similarity!r} compares activations: pass batches=, an iterable of model inputs, "
            f"or use a similarity of weights: {', '.join(ON_WEIGHTS)}."
        )
    measures = {kind: ON_ACTIVATIONS[similarity]() for kind in kinds}
    observe(model, architecture, batches, {kind: measure.update for kind, measure in measures.items()})
    shapes = [shapes_of(layer) for layer in architecture.layer_list(model)]
    apart = torch.tensor([[shape != other for other in shapes] for shape in shapes])
    return {kind: measure.distance().cpu().masked_fill(apart, math.inf) for kind, measure in measures.items()}


def _between_alike(model: PreTrainedModel, architecture: LayerArchitecture, kind: Kind, measure: Callable) -> Tensor:
    """Return the distances between the blocks of a kind; infinite between layers of different shapes."""
    shapes = [shapes_of(layer) for layer in architecture.layer_list(model)]
    found = torch.full((len(shapes), len(shapes)), math.inf, dtype=torch.float64).fill_diagonal_(0)
    for shape in dict.fromkeys(shapes):
        alike = [index for index, other in enumerate(shapes) if other == shape]
        if len(alike) > 1:
            own = measure(_aligned_maps(model, architecture, kind, alike)).cpu()
            found[torch.tensor(alike).unsqueeze(1), torch.tensor(alike)] = own
    return found


def _aligned_maps(
    model: PreTrainedModel, architecture: LayerArchitecture, kind: Kind, layers: Sequence[int]
) -> Iterator[Tensor]:
    """Yield the matrices in some layers of each linear map of a kind of block: (layers, units, stream) float64.

    The columns are coordinates of the residual stream, also for maps that write to it. The gain of a norm before
    the block is multiplied into the maps that read its output. The matrices of an opaque block are yielded as they are.
    """
    for part in architecture.kinds if kind == "layer" else (kind,):
        blocks = [block for block in architecture.blocks(model) if block.kind == part and block.layer in layers]
        if "out" not in blocks[0].modules:
            owned = [
                [p for path in block.modules.values() for p in model.get_submodule(path).parameters() if is_shared(p)]
                for block in blocks
            ]
            yield from (
                torch.stack([p.detach().double().flatten(1) for p in same]) for same in zip(*owned, strict=True)
            )
            continue
        maps = [linear_maps(model, block) for block in blocks]
        plain = architecture.post_norm or "norm" not in blocks[0].modules
        gains = [None if plain else _gain(model, block) for block in blocks]
        for role, first in maps[0].items():
            if not is_shared(first.weight):
                continue
            weights = torch.stack([found[role].weight.double() for found in maps])
            if role == "out":
                weights = weights.transpose(1, 2)
            elif reads_stream(part, role) and gains[0] is not None:
                weights = weights * torch.stack(gains).unsqueeze(1)
            yield weights.contiguous()


def _between_shapes(model: PreTrainedModel, architecture: LayerArchitecture, measure: Callable) -> Tensor:
    """Return the distances between convolutional layers; infinite between layers of different shapes.

    A map is a convolution into which the following batch norm is folded. Rows are output channels, for the second
    convolution input channels, so that columns belong to the stream.
    """
    layers = architecture.layer_list(model)
    shapes = [shapes_of(layer) for layer in layers]
    found = torch.full((len(layers), len(layers)), math.inf, dtype=torch.float64)
    for shape in dict.fromkeys(shapes):
        alike = [index for index, other in enumerate(shapes) if other == shape]
        kernels = [[_folded(layers[index], architecture, *names) for index in alike] for names in _CONVS]
        first, second = map(torch.stack, kernels)
        own = measure([first.flatten(2), second.transpose(1, 2).flatten(2)]).cpu()
        found[torch.tensor(alike).unsqueeze(1), torch.tensor(alike)] = own
    return found


_CONVS = (("in", "in_norm"), ("out", "norm"))
"""Roles of the convolutions of a layer and of their batch norms."""


def _folded(layer: torch.nn.Module, architecture: LayerArchitecture, conv: str, norm: str) -> Tensor:
    """Return the kernel of a convolution, (out, in, pixels) float64, times the gain of the following batch norm."""
    conv, norm = (layer.get_submodule(architecture.table("conv")[role]) for role in (conv, norm))
    gain = batch_norm_gain(norm.weight.detach().double(), norm.running_var.double())
    return conv.weight.detach().double().flatten(2) * gain[:, None, None]


def _gain(model: PreTrainedModel, block: Block) -> Tensor | None:
    weight = getattr(model.get_submodule(block.modules["norm"]), "weight", None)
    return None if weight is None else weight.detach().double()
