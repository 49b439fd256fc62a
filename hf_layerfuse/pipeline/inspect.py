"""What a model is made of, and what can be done with it, before anything is done."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor
from transformers import PreTrainedModel

from ..errors import LayerFuseError, UnsupportedModelError
from ..evaluation.batches import Batches
from ..evaluation.metrics import parameter_counts
from ..methods.fusion.distances import block_distances
from ..models.architectures import ChainAdapter, LayerAdapter, TransformerAdapter, adapter_for
from ..models.surgery.checks import check_model, check_plan
from ..models.surgery.conv_graph import check_merges
from ..plan import CHAIN, Kind, Linearize, Plan

Rows = list[list[str]]
"""Rows of text, a header first, as `report.text_table` takes them."""


def overview(model: PreTrainedModel, similarity: str | None = None, batches: Batches | None = None) -> list[Rows]:
    """Tables of a model: how large it is, and if it has weights what can be done with it; its layers; its convolutions.

    Args:
        model: a stock one, whose weights may be on the meta device.
        similarity: one of `FusionRecipe.similarity`, by which layers are compared with the next; None compares none.
        batches: calibration batches, for a similarity of activations.

    Raises:
        UnsupportedModelError: no adapter for the architecture.
        RecipeError: the similarity compares activations and there are no batches.
    """
    layers, chain = _adapter(model, LayerAdapter), _adapter(model, ChainAdapter)
    if layers is None and chain is None:
        adapter_for(model)  # which says why
    found = [_summary(model, layers, chain)]
    if layers is not None:
        distances = {} if similarity is None else block_distances(model, layers.kinds, similarity, batches)
        found.append(_layers(model, layers, distances))
    if chain is not None:
        found.append(_chain(model, chain))
    return found


def _adapter(model: PreTrainedModel, kind: type) -> LayerAdapter | ChainAdapter | None:
    try:
        return adapter_for(model, kind)
    except UnsupportedModelError:
        return None


def _summary(model: PreTrainedModel, layers: LayerAdapter | None, chain: ChainAdapter | None) -> Rows:
    sizes = parameter_counts(model)
    megabytes = sum(parameter.nbytes for parameter in model.parameters()) / 1e6  # shared ones are there once
    rows = [
        [type(model).__name__, model.config.model_type],
        ["parameters", f"{sizes['parameters']:,}"],
        ["  outside embeddings", f"{sizes['non_embedding_parameters']:,}"],
        [f"  megabytes in {str(model.dtype).removeprefix('torch.')}", f"{megabytes:,.1f}"],
    ]
    if model.device.type == "meta":  # what can be done depends on the weights too
        return rows

    def collapses() -> None:
        check_model(model, layers)
        check_plan(model, layers, Plan(layers.model_type, depth, (Linearize(0),), kinds=layers.kinds))

    def merges() -> None:
        check_model(model, chain)
        check_merges(model, chain, Plan(chain.model_type, units, kinds=CHAIN))

    checks: dict[str, Callable[[], None]] = {}
    if layers is not None:
        depth = len(layers.layer_list(model))
        checks["fuse"] = lambda: check_model(model, layers)
    if isinstance(layers, TransformerAdapter):
        checks["collapse"] = collapses
    if chain is not None:
        units = len(chain.convolutions(model).units)
        checks["merge"] = merges
    return rows + [[f"{name}()", _can(check)] for name, check in checks.items()]


def _can(check: Callable[[], None]) -> str:
    try:
        check()
    except LayerFuseError as error:
        return f"no: {error}"
    return "yes"


def _layers(model: PreTrainedModel, adapter: LayerAdapter, distances: Mapping[Kind, Tensor]) -> Rows:
    """Parameters of each layer and its blocks, and how far each block is from that of the next layer."""
    sizes: dict[tuple[int, str], int] = {}
    for block in adapter.blocks(model):
        modules = {id(module): module for module in map(model.get_submodule, block.modules.values())}
        sizes[block.layer, block.kind] = sum(p.numel() for module in modules.values() for p in module.parameters())
    rows = [["layer", "parameters", *adapter.kinds, *(f"{kind} to the next" for kind in distances)]]
    for place, layer in enumerate(adapter.layer_list(model)):
        own = [f"{sizes.get((place, kind), 0):,}" for kind in adapter.kinds]
        far = [f"{apart[place, place + 1]:.3f}" if place + 1 < len(apart) else "" for apart in distances.values()]
        rows.append([str(place), f"{sum(p.numel() for p in layer.parameters()):,}", *own, *far])
    return rows


def _chain(model: PreTrainedModel, adapter: ChainAdapter) -> Rows:
    """What of a chain of convolutions can be merged."""
    chain = adapter.convolutions(model).chain(model)
    entries = [(end - start, merged.kernel) for start, end, merged, _ in chain.table()]
    return [
        ["convolutions", str(len(chain.links))],
        ["  that have to stay", str(sum(link.fixed for link in chain.links))],
        ["segments of two or more that can be one", str(sum(end - start > 1 for start, end in chain.segments()))],
        ["  with all their kernels", str(sum(length > 1 for length, _ in entries))],
        ["  up to 7 x 7", str(sum(length > 1 and kernel <= 7 for length, kernel in entries))],
    ]
