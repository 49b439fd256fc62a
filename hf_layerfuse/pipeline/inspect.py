"""Tables that describe a model, before anything is changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from ..discovery import ensure_architecture, is_unknown
from ..errors import CheckpointError, DataError, LayerFuseError, UnsupportedModelError
from ..evaluation.batches import Batches
from ..evaluation.metrics import bytes_in_memory, parameter_counts
from ..evaluation.precision import dtype_in_file, store_as
from ..math.similarity import ON_ACTIVATIONS
from ..methods.fusion.distances import block_distances
from ..models.architectures import ConvGraphArchitecture, LayerArchitecture, TransformerArchitecture, architecture_for
from ..models.files import stored_dtype
from ..models.heads import head_class, own_auto_class
from ..models.loading import load_checkpoint
from ..models.surgery.checks import check_model, check_plan
from ..models.surgery.conv_graph import check_merges
from ..plan import CONV_GRAPH_KINDS, Kind, Linearize, Plan
from .progress import steps

Rows = list[list[str]]
"""Rows of text, a header first, as `report.text_table` takes them."""


@steps()
def inspect_tables(
    name: str,
    similarity: str | None = None,
    text: Path | None = None,
    stack: str | None = None,
    trust_remote_code: bool = False,
) -> list[Rows]:
    """Tables that describe a model, see `overview`.

    Args:
        name: Checkpoint or Hub name; or a config, or the directory of one.
        similarity: Distance between neighbouring layers. The default is `cosine`, or none for a config.
        text: File with lines of text, for a similarity of activations.
        stack: Stack of layers to show, in models that have several.
        trust_remote_code: Whether the model may run its own code.

    Raises:
        CheckpointError: The model cannot be loaded, or a config has no weights to compare.
        DataError: The text is missing or cannot be read.
        UnsupportedModelError: The architecture is unknown, or has no such stack.
    """
    model = load_model(name, trust_remote_code)
    if model.device.type != "meta":
        similarity = similarity or "cosine"
    elif similarity is not None:
        raise CheckpointError(
            f"{name!r} is a config, and a config has no weights to compare: leave --similarity out, or name a "
            "checkpoint."
        )
    batches = text_batches(name, text, similarity, trust_remote_code)
    if is_unknown(model) and model.device.type != "meta":
        ensure_architecture(model, LayerArchitecture, batches, stack)
    return overview(model, similarity, batches, stack)


def overview(
    model: PreTrainedModel, similarity: str | None = None, batches: Batches | None = None, stack: str | None = None
) -> list[Rows]:
    """Tables of a model: its size and, if it has weights, the methods that support it; its layers; its convolutions.

    Args:
        model: Stock model, whose weights may be on the meta device.
        similarity: Similarity of `FusionRecipe` that compares each layer with the next one; None compares none.
        batches: Calibration batches, for a similarity of activations.
        stack: Stack of layers, in models that have several.

    Raises:
        UnsupportedModelError: The architecture is unknown, or has no such stack.
        RecipeError: The similarity compares activations and there are no batches.
    """
    conv_graph = _architecture(model, ConvGraphArchitecture)
    if conv_graph is None or stack is not None:
        layers = architecture_for(model, stack=stack)
    else:
        layers = _architecture(model, LayerArchitecture)
    found = [_summary(model, layers, conv_graph)]
    if layers is not None:
        distances = {} if similarity is None else block_distances(model, layers.kinds, similarity, batches, stack)
        found.append(_layers(model, layers, distances))
    if conv_graph is not None:
        found.append(_convolutions(model, conv_graph))
    return found


def _architecture(model: PreTrainedModel, kind: type) -> LayerArchitecture | ConvGraphArchitecture | None:
    try:
        return architecture_for(model, kind)
    except UnsupportedModelError:
        return None


def _summary(
    model: PreTrainedModel, layers: LayerArchitecture | None, conv_graph: ConvGraphArchitecture | None
) -> Rows:
    sizes = parameter_counts(model)
    dtype = dtype_in_file(model)
    megabytes = bytes_in_memory(model) / model.dtype.itemsize * dtype.itemsize / 1e6
    rows = [
        [type(model).__name__, model.config.model_type],
        ["parameters", f"{sizes['parameters']:,}"],
        ["  outside embeddings", f"{sizes['non_embedding_parameters']:,}"],
        [f"  megabytes in {str(dtype).removeprefix('torch.')}", f"{megabytes:,.1f}"],
    ]
    if model.device.type == "meta":  # the checks need the weights
        return rows

    def collapses() -> None:
        check_model(model, layers)
        check_plan(model, layers, layers.plan(depth, (Linearize(0),)))

    def merges() -> None:
        check_model(model, conv_graph)
        check_merges(model, conv_graph, Plan(conv_graph.model_type, units, kinds=CONV_GRAPH_KINDS))

    checks: dict[str, Callable[[], None]] = {}
    if layers is not None:
        depth = len(layers.layer_list(model))
        checks["fuse"] = lambda: check_model(model, layers)
    if isinstance(layers, TransformerArchitecture):
        checks["collapse"] = collapses
    if conv_graph is not None:
        units = len(conv_graph.convolutions(model).units)
        checks["merge"] = merges
    return rows + [[f"{name}()", _can(check)] for name, check in checks.items()]


def _can(check: Callable[[], None]) -> str:
    try:
        check()
    except LayerFuseError as error:
        return f"no: {error}"
    return "yes"


def _layers(model: PreTrainedModel, architecture: LayerArchitecture, distances: Mapping[Kind, Tensor]) -> Rows:
    """Parameters of each layer and its blocks, and the distance of each block to that of the next layer.

    A norm that both blocks read counts for the layer alone.
    """
    layers, sizes = architecture.layer_list(model), {}
    for block in architecture.blocks(model):
        own = {id(p): p for name, p in layers[block.layer].named_parameters() if architecture.owner(name) == block.kind}
        sizes[block.layer, block.kind] = sum(p.numel() for p in own.values())
    rows = [["layer", "parameters", *architecture.kinds, *(f"{kind} to the next" for kind in distances)]]
    for place, layer in enumerate(architecture.layer_list(model)):
        own = [f"{sizes.get((place, kind), 0):,}" for kind in architecture.kinds]
        far = [f"{apart[place, place + 1]:.3f}" if place + 1 < len(apart) else "" for apart in distances.values()]
        rows.append([str(place), f"{sum(p.numel() for p in layer.parameters()):,}", *own, *far])
    return rows


def _convolutions(model: PreTrainedModel, architecture: ConvGraphArchitecture) -> Rows:
    """Number of convolutions that can be merged."""
    graph = architecture.convolutions(model).graph(model)
    entries = [(end - start, merged.kernel) for start, end, merged, _ in graph.table()]
    return [
        ["convolutions", str(len(graph.nodes))],
        ["  that have to stay", str(sum(node.fixed for node in graph.nodes))],
        ["segments of two or more that can be one", str(sum(end - start > 1 for start, end in graph.segments()))],
        ["  with all their kernels", str(sum(length > 1 for length, _ in entries))],
        ["  up to 7 x 7", str(sum(length > 1 and kernel <= 7 for length, kernel in entries))],
    ]


def load_model(name: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """Load a checkpoint in float32, or make a model without weights where there is only a config.

    The model records the data type of the file.

    Args:
        name: Checkpoint or Hub name; or a config, or the directory of one.
        trust_remote_code: Whether the model may run its own code.

    Raises:
        CheckpointError: There is neither a checkpoint nor a valid config.
    """
    path = Path(name).expanduser()
    name = str(path) if path.exists() else name
    folder = path if path.is_dir() else path.parent
    trust = {"trust_remote_code": True} if trust_remote_code else {}
    weights = any(any(folder.glob(f"*.{ending}")) for ending in ("safetensors", "bin", "h5", "msgpack"))
    if path.exists() and (path.is_file() or not weights):
        try:
            config = AutoConfig.from_pretrained(name, **trust)
            with torch.device("meta"):
                own = own_auto_class(config) if trust else None
                model = own.from_config(config, **trust) if own else head_class(config)(config)
            return store_as(model, config.dtype or model.dtype)
        except LayerFuseError:
            raise
        except Exception as error:  # a config of a user leads to anything
            raise CheckpointError(
                f"{name!r} holds neither a checkpoint nor a valid config: {type(error).__name__}: {error}"
            ) from error
    model = load_checkpoint(name, dtype=torch.float32, **trust)
    return store_as(model, stored_dtype(name) or model.dtype)


def text_batches(
    name: str, text: Path | None, similarity: str | None = None, trust_remote_code: bool = False
) -> Batches | None:
    """Lines of a file as batches of 16, cut after 128 tokens; 256 lines at most. None without a file.

    Args:
        name: Checkpoint or Hub name of the tokenizer.
        text: File with lines of text.
        similarity: Similarity that the batches are for; some need them.
        trust_remote_code: Whether the tokenizer may run its own code.

    Raises:
        DataError: The file is missing, empty or needed, or there is no tokenizer.
    """
    if text is None:
        if similarity in ON_ACTIVATIONS:
            raise DataError(f"--similarity {similarity} compares activations, which need a text: give --text FILE.")
        return None
    try:
        lines = [line for line in text.read_text(encoding="utf-8").splitlines() if line.strip()][:256]
        tokenizer = AutoTokenizer.from_pretrained(name, **({"trust_remote_code": True} if trust_remote_code else {}))
    except (OSError, ValueError) as error:
        raise DataError(f"--text {text}: {error}") from error
    if not lines:
        raise DataError(f"--text {text} has no lines of text: name a file with some.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # the attention mask hides it
    parts = [lines[start : start + 16] for start in range(0, len(lines), 16)]
    return [dict(tokenizer(p, truncation=True, max_length=128, padding=True, return_tensors="pt")) for p in parts]
