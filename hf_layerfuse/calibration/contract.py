"""The contract of an architecture: numerical checks of its table on one batch, before a search relies on it.

A wrong table seldom fails. It makes refits aim at the wrong place, or averages blocks that it has changed, and the
result is only worse than it could be.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError
from ..evaluation.batches import Batches, first_rows, model_inputs
from ..evaluation.divergence import near, prediction
from ..evaluation.hooks import watch
from ..evaluation.modes import eval_mode, outside_inference_mode
from ..models.architectures import (
    Block,
    LayerArchitecture,
    TransformerArchitecture,
    architecture_for,
    part_at,
    reads_stream,
)
from ..models.paging import in_memory
from ..models.removal import replaced, silenced
from ..models.surgery.checks import shapes_of
from ..models.symmetries import disguise
from .layer_hooks import HookPoint
from .layerwise import LayerwiseForward
from .refit.between import through
from .samples import Sample

_ROWS = 2


@outside_inference_mode
def check_contract(
    model: PreTrainedModel, batches: Batches | None, architecture: LayerArchitecture | None = None
) -> None:
    """Check the table of an architecture on a model: a few forward passes of two rows, without a copy of the model.

    - The layers, run one by one, compute the same as the whole model.
    - The maps that read the input of a block receive the tensor that the table names.
    - The residual stream plus the output of a block, after the parts in `between`, is the stream after the block.
    - Another order of units and heads, and rotations of heads, as alignment makes them, do not change the output of a
      layer.
    - A layer whose block is replaced by its placeholders computes the same as if the block added zero.
    - The table names each config field that has one entry per layer.

    Layers of each shape and each type of the config are checked.

    Args:
        model: Stock model.
        batches: Calibration batches, of which the first two rows are used. Without any, nothing is checked.
        architecture: Table to check; by default, the one that is registered for the model.

    Raises:
        DataError: The first batch holds no tensors.
        UnsupportedModelError: A check failed. The message names the table, the layer and the role.
    """
    architecture = architecture or architecture_for(model)
    batch = next(iter(batches or ()), None)
    if batch is None or not isinstance(architecture, TransformerArchitecture):
        return
    inputs = model_inputs(Sample.of([batch]).batches[0], model)  # refuses a batch without tensors
    with eval_mode(model), torch.no_grad():
        _Contract(model, first_rows(inputs, _ROWS), architecture).check()


class _Contract:
    """The checks of one table on one batch, on the device of the model."""

    def __init__(self, model: PreTrainedModel, batch: Mapping[str, Tensor], architecture: TransformerArchitecture):
        self.model, self.batch, self.architecture = model, batch, architecture
        self.tolerance = 2e-3 if model.dtype in (torch.float32, torch.float64) else 5e-2

    def check(self) -> None:
        """Run all checks; the first one that fails raises `UnsupportedModelError`."""
        self._check_lists()
        layerwise = LayerwiseForward(self.model, Sample.of([self.batch]), self.architecture)
        chosen = self._representatives(layerwise.layers)
        for index in range(len(layerwise.layers)):
            if index in chosen:
                with in_memory([layerwise.layers[index]]):
                    self._check_layer(layerwise, index)
            layerwise.advance()
        for (output, _), evaluated in zip(layerwise.outputs(), layerwise.sample.held_out_batches, strict=True):
            with torch.inference_mode():
                whole = prediction(self.model(**model_inputs(evaluated, self.model)))
            self._require(
                self._near(prediction(output), whole),
                f"the layers at {self.architecture.layers!r}, run one by one, differ from the whole model: something "
                "outside of them changes the stream between layers, or a layer or the head reads the states of others",
            )

    def _check_lists(self) -> None:
        """Require that the table names every config list with one entry per layer."""
        architecture, config = self.architecture, self.architecture.config_of(self.model.config)
        depth = len(architecture.layer_list(self.model))
        known = {*architecture.per_layer_config, *architecture.other_lists}
        for name, value in vars(config).items():
            lists = isinstance(value, list | tuple) and len(value) == depth and any(each != value[0] for each in value)
            self._require(
                not lists or name in known or name.startswith("_"),
                f"config.{name} has {depth} entries, one per layer, and per_layer_config does not name it; add it "
                "there, or to other_lists if its length is a coincidence",
            )

    def _representatives(self, layers: nn.ModuleList) -> set[int]:
        """Indices of one layer of each shape and type: the last one, because first layers are often special."""
        types = getattr(self.architecture.config_of(self.model.config), "layer_types", None) or [None] * len(layers)
        found = {(shapes_of(layer), kind): i for i, (layer, kind) in enumerate(zip(layers, types, strict=True))}
        return set(found.values())

    def _check_layer(self, layerwise: LayerwiseForward, index: int) -> None:
        layer, architecture, where = layerwise.layers[index], self.architecture, f"in layer {index}, "
        blocks = [block for block in architecture.blocks(self.model) if block.layer == index]
        seen = self._check_inputs(layerwise, blocks, where)
        for block in blocks:
            if "out" in block.modules:
                self._check_sum(layer, block.kind, seen, where)
                self._check_layout(layerwise, block, seen[None], where)
            if index not in architecture.fixed.get(block.kind, ()):
                self._check_placeholders(layerwise, layer, block.kind, "out" in block.modules, where)
        if architecture.post_norm:
            end = layer.get_submodule(architecture.mlp["norm"])(seen[HookPoint("mlp", "sum")].to(self.model.dtype))
            self._require(
                self._near(end, seen[None]), f"{where}`norm` of mlp does not give the output of the layer: `post_norm`"
            )

    def _check_inputs(
        self, layerwise: LayerwiseForward, blocks: list[Block], where: str
    ) -> dict[HookPoint | None, Tensor]:
        """Require that maps receive what the table names, and return the tensors at all places of a layer."""
        places = {kind: ["read", "residual", "sum"] for kind in self.architecture.kinds}
        for block in blocks:
            if "out" in block.modules:
                places[block.kind].append("output")
        points = [HookPoint(kind, place) for kind, names in places.items() for place in names]
        readers = {
            (block.kind, role): (self.model.get_submodule(path), "before")
            for block in blocks
            for role, path in block.modules.items()
            if reads_stream(block.kind, role)
        }
        inputs: dict[tuple[str, str], list[Tensor]] = {}
        with watch(readers, lambda key, tensor: inputs.setdefault(key, []).append(tensor)):
            seen = _first(layerwise.look(*points, None))
        if any(point not in seen for point in points) and "cross" in places:
            raise UnsupportedModelError(
                f"{where}the cross-attention does not run on the calibration batches: add the states of the encoder to "
                "each batch, as encoder_hidden_states (encoder_outputs for Whisper) of shape (batch, tokens, width)."
            )
        for (kind, role), tensors in inputs.items():
            read = seen[HookPoint(kind, "read")]
            self._require(
                any(self._near(tensor, read) for tensor in tensors),  # DeBERTa also maps positions with them
                f"{where}{role!r} of {kind} does not read what the table says: check `norm` of {kind}, `post_norm` and "
                "the order of `skip`",
            )
        return seen

    def _check_sum(self, layer: nn.Module, kind: str, seen: Mapping[HookPoint | None, Tensor], where: str) -> None:
        """Require that the stream plus the output of a block is the stream after the block."""
        added = through(layer, self.architecture, kind, seen[HookPoint(kind, "output")])
        stream = seen[HookPoint(kind, "residual")]
        self._require(
            self._near(stream + added.view(stream.shape), seen[HookPoint(kind, "sum")]),
            f"{where}the stream plus 'out' of {kind} is not the stream after {kind}: check `out`, `between`, "
            "`parallel` and `post_norm`",
        )

    def _check_layout(self, layerwise: LayerwiseForward, block: Block, output: Tensor, where: str) -> None:
        """Require that changes that leave the function of a block, by its table, leave the output of its layer."""
        layer = copy.deepcopy(layerwise.layers[block.layer])
        prefix = f"{self.architecture.layers_path(self.model)}.{block.layer}."
        inside = {role: path.removeprefix(prefix) for role, path in block.modules.items()}
        with suppress(UnsupportedModelError):  # of a block that alignment refuses
            disguise(layer, dataclasses.replace(block, modules=inside), torch.Generator().manual_seed(0))
        self._require(
            self._near(_first(layerwise.look(None, layer=layer))[None], output),
            f"{where}another order of the units or heads of {block.kind}, or a rotation of its heads, changes the "
            "output: check the roles of the maps, `joint`, `pairing`, `bound_heads` and `heads(config, layer)`",
        )

    def _check_placeholders(
        self, layerwise: LayerwiseForward, layer: nn.Module, kind: str, has_out: bool, where: str
    ) -> None:
        """Require that the placeholders of a kind of block equal a block that adds zero."""
        residual = HookPoint(kind, "residual")
        with replaced(layer, self.architecture.skip[kind]):
            try:
                without = _first(layerwise.look(residual, HookPoint(kind, "sum"), None))
            except (RuntimeError, TypeError, ValueError) as error:
                words = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                self._require(False, f"{where}the placeholders in `skip` of {kind} cannot run: {words}")
        self._require(
            self._near(without[residual], without[HookPoint(kind, "sum")]),
            f"{where}the placeholders in `skip` of {kind} still add to the stream",
        )
        if has_out:
            between = self.architecture.between.get(kind)
            last = (between and part_at(layer, between)) or layer.get_submodule(self.architecture.table(kind)["out"])
            with silenced(last):
                silent = _first(layerwise.look(None))
            self._require(
                self._near(without[None], silent[None]),
                f"{where}the placeholders in `skip` of {kind} differ from a block that adds zero",
            )

    def _near(self, ours: Tensor, theirs: Tensor) -> bool:
        """Whether two tensors hold the same values, also if one of them has its axes of rows and tokens in one."""
        return near(ours.flatten(), theirs.flatten(), self.tolerance)

    def _require(self, met: bool, what: str) -> None:
        if not met:
            raise UnsupportedModelError(
                f"{type(self.architecture).__name__}, the table of {self.architecture.model_type!r}, does not describe "
                f"this {type(self.model).__name__}: {what}. {self._next_step()}"
            )

    def _next_step(self) -> str:
        """Sentence for messages, by the origin of the table."""
        if self.architecture.discovered:
            return (
                "The table was discovered on another batch: pass batches that are representative of the inputs, or "
                "print the table with `hf-layerfuse adapt MODEL`, correct it, and register it with "
                "register_architecture."
            )
        if type(self.architecture).__module__.startswith(f"{__name__.partition('.')[0]}."):
            return "The table is part of hf_layerfuse: please report this with the config of the model."
        return "Correct the table, and register it again with register_architecture."


def _first(found: Iterator[tuple[int, dict[Any, Tensor]]]) -> dict[Any, Tensor]:
    return next(iter(found))[1]
