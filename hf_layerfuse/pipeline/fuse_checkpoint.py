"""Fusing a checkpoint layer by layer, for models that are larger than memory."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME

from ..calibration.samples import read
from ..errors import CheckpointError, RecipeError, VerificationError
from ..evaluation.batches import Batches
from ..evaluation.modes import outside_inference_mode
from ..evaluation.whole_file import write_whole
from ..methods.fusion.layer_by_layer import Finished, Layer, LayerByLayer, plan_by_layers
from ..methods.report import FusionReport
from ..models.architectures import architecture_for
from ..models.files import local_file
from ..models.paging import MEMORY, PagedWeights, paged_model
from ..plan import Plan
from ..recipe import FusionRecipe
from .companions import companions_of, copy_companions
from .output import check_output, new_directory, stamp, unfinished

_PLAN = "plan.json"
_SHARD = 1 << 30
"""Largest number of bytes of a file with weights outside the stack of layers, unless one weight is larger."""

_TOLERANCE = 1e-3
"""Largest relative difference of the loss after reloading: products of another memory layout round otherwise."""


@outside_inference_mode
def fuse_checkpoint(
    path: str | os.PathLike,
    output_dir: str | os.PathLike,
    recipe: FusionRecipe | None = None,
    *,
    batches: Batches | Dataset,
    overwrite: bool = False,
    memory: int = MEMORY,
    **overrides: Any,
) -> FusionReport:
    """Fuse a checkpoint that is larger than memory into a smaller one: one layer of weights at a time.

    The result equals that of `fuse` with the same recipe, up to the rounding of weights to the data type of the file,
    which this function repairs too. It takes the memory of one group of layers in float32, of the moments of their
    fits, and of `memory`; the hidden states of the calibration data at a few depths are in temporary files. After an
    interruption, the same call goes on at the layer where it stopped.

    Args:
        path: Directory or Hub name of a stock checkpoint in safetensors.
        output_dir: New directory of the result, with the tokeniser and the other companions of the original.
        recipe: Settings of the fusion: whole layers in depth, with effort `low`.
        batches: Calibration data, as for `fuse`. Smaller batches take less memory.
        overwrite: Whether to replace an earlier result in `output_dir`.
        memory: Number of bytes of weights that stay in memory although they are not in use.
        overrides: Fields of `FusionRecipe` that replace those of `recipe`, or form the recipe if there is none.

    Returns:
        The report of the fusion, which the directory holds too.

    Raises:
        CheckpointError: Checkpoint that is missing, damaged, or renames its weights when it is loaded; or output
            directory that cannot be written.
        DataError: No calibration data, or data that the model does not accept.
        RecipeError: Impossible target, or setting that needs the whole model in memory.
        UnsupportedModelError: Unknown architecture, or a model that cannot be fused.
        VerificationError: Result whose outputs change after reloading.
        OSError: The disk is full. The finished layers stay for the next call.

    Examples:
        >>> report = fuse_checkpoint(
        ...     "meta-llama/Llama-3.1-8B", "small", keep_layers=26, effort="low", batches=batches
        ... )  # doctest: +SKIP
    """
    if isinstance(path, PreTrainedModel):
        raise CheckpointError("the model is in memory already: call fuse(model, recipe) to fuse it.")
    recipe = FusionRecipe(**overrides) if recipe is None else replace(recipe, **overrides)
    return fuse_layers(os.fspath(path), os.fspath(output_dir), recipe, batches, overwrite=overwrite, memory=memory)


def fuse_layers(
    path: str,
    output_dir: str,
    recipe: FusionRecipe,
    batches: Batches | Dataset,
    *,
    overwrite: bool,
    memory: int = MEMORY,
    finish: Callable[[Path, FusionReport, PreTrainedModel], None] = lambda *_: None,
) -> FusionReport:
    """Run `fuse_checkpoint`, and complete its directory before it appears.

    Args:
        path: Directory or Hub name of a stock checkpoint.
        output_dir: Directory of the result.
        recipe: Settings of the fusion.
        batches: Calibration data.
        overwrite: Whether to replace an earlier result.
        memory: Number of bytes of weights that stay in memory although they are not in use.
        finish: Function that adds to the directory. It receives its path, the report, and the result as a model that
            reads its weights from there.
    """
    start = time.perf_counter()
    path, output = os.path.expanduser(path), Path(os.path.expanduser(output_dir))
    check_output(output, overwrite, keep=[path])
    model, weights = paged_model(path, memory)
    weights.attach(model, architecture_for(model, stack=recipe.stack))
    sequences = read(batches, model)
    if not sequences:
        raise RecipeError(
            "fusing layer by layer needs calibration data: pass batches=, or load the model and pass it to fuse()."
        )
    work = unfinished(output, [stamp(path), asdict(recipe), _digest(sequences)])
    work.mkdir(parents=True, exist_ok=True)
    if (work / _PLAN).exists():
        plan = Plan.from_json((work / _PLAN).read_text(encoding="utf-8"))
    else:
        plan = plan_by_layers(model, recipe, sequences)
        write_whole(work / _PLAN, plan.to_json())
    fusion = LayerByLayer(model, weights, plan, sequences)
    layers = _Layers(work, fusion)
    refit = fusion.run(layers.read, layers.write, layers.undo)
    plan = replace(plan, notes=replace(plan.notes, refit=refit))
    with new_directory(output, overwrite=overwrite) as fresh:
        _save_weights(fresh, fusion, weights, layers)
        _save_configs(fresh, fusion, path)
        report = FusionReport(
            method="fusion",
            plan=plan,
            parameters=(parameters_of(model), parameters_of(fusion.result)),
            bytes=tuple(parameters_of(each) * fusion.dtype.itemsize for each in (model, fusion.result)),
            seconds=time.perf_counter() - start,
        )
        report.save(fresh)
        write_whole(fresh / _PLAN, plan.to_json())
        copy_companions(companions_of(path), fresh)
        finish(fresh, report, _verified(fresh, fusion, refit.after, memory))
    shutil.rmtree(work)
    return report


class _Layers:
    """The finished layers of a result, each in a file of its own, with the rows of its report beside it.

    Weights have the names that Transformers gave them in the files of the original.
    """

    def __init__(self, work: Path, fusion: LayerByLayer) -> None:
        self.work, self.names = work, fusion.names
        self.path = fusion.architecture.layers_path(fusion.result)
        self._undone: set[int] = set()

    def file(self, index: int) -> Path:
        """File of a layer of the result."""
        return self._file(index, "unrepaired" if index in self._undone else "layer")

    def read(self, index: int) -> Finished | None:
        """A layer that an earlier call has written, with its repair; None if there is none."""
        file = self._file(index, "layer")
        if not file.exists():
            return None
        prefix = f"{self.path}.{index}."
        live = {stored: name for name, stored in self.names.items() if name.startswith(prefix)}
        layer = {live.get(name, name).removeprefix(prefix): tensor for name, tensor in load_file(file).items()}
        return Finished(layer, json.loads(file.with_suffix(".json").read_text(encoding="utf-8")))

    def write(self, index: int, made: Finished) -> None:
        """Write a layer with its repair."""
        file = self._file(index, "layer")
        write_whole(file.with_suffix(".json"), json.dumps(made.rows))
        self._save(index, made.layer, file)

    def undo(self, index: int, layer: Layer) -> None:
        """Write a layer without its repair, beside the other, so that a later call finds what it resumes with."""
        self._undone.add(index)
        self._save(index, layer, self.file(index))

    def _file(self, index: int, kind: str) -> Path:
        return self.work / f"{kind}-{index:05}.safetensors"

    def _save(self, index: int, layer: Layer, file: Path) -> None:
        named = {f"{self.path}.{index}.{name}": tensor for name, tensor in layer.items()}
        _write({self.names.get(name, name): tensor for name, tensor in named.items()}, file)


def _write(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a file of weights under a temporary name, then rename it."""
    fresh = path.with_name(f".{path.name}.partial")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, fresh, metadata={"format": "pt"})
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def _save_weights(fresh: Path, fusion: LayerByLayer, weights: PagedWeights, layers: _Layers) -> None:
    """Write the weights in shards: those outside the stack, and one for each layer, with an index."""
    outside = [name for name in _unique(fusion.result) if not name.startswith(f"{layers.path}.")]
    shards: list[list[str]] = [[]]
    room = _SHARD
    for name in outside:
        size = weights.size(fusion.names[name])
        if shards[-1] and size > room:
            shards.append([])
            room = _SHARD
        shards[-1].append(name)
        room -= size
    count = len(shards) + len(fusion.slots)
    places: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{count:05}.safetensors"
        stored = [fusion.names[name] for name in names]
        _write({name: weights.tensor(name) for name in stored}, fresh / file)
        places |= dict.fromkeys(stored, file)
    for index in range(len(fusion.slots)):
        file = f"model-{len(shards) + index + 1:05}-of-{count:05}.safetensors"
        _link(layers.file(index), fresh / file)
        with safe_open(fresh / file, "pt") as layer:
            places |= dict.fromkeys(layer.keys(), file)
    total = sum((fresh / file).stat().st_size for file in set(places.values()))
    index = {"metadata": {"total_size": total}, "weight_map": places}
    write_whole(fresh / SAFE_WEIGHTS_INDEX_NAME, json.dumps(index, indent=2) + "\n")


def _link(source: Path, target: Path) -> None:
    """A second name of a file, or a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _save_configs(fresh: Path, fusion: LayerByLayer, path: str) -> None:
    config = copy.deepcopy(fusion.result.config)
    config.architectures, config.dtype = [type(fusion.result).__name__], fusion.dtype
    config.save_pretrained(fresh)
    if (generation := local_file(path, GENERATION_CONFIG_NAME, {})) is not None:
        shutil.copyfile(generation, fresh / GENERATION_CONFIG_NAME)


def _unique(model: PreTrainedModel) -> list[str]:
    """Names of the weights of a model without tied copies."""
    return [name for name in model.state_dict() if name not in model.all_tied_weights_keys]


def parameters_of(model: PreTrainedModel) -> int:
    """Number of parameters of a hollow model; tied ones count once."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return sum(sizes.get(name, 0) for name in _unique(model))


def _verified(fresh: Path, fusion: LayerByLayer, expected: float, memory: int) -> PreTrainedModel:
    """The result, reloaded. It must have the calibration loss that was measured."""
    model, weights = paged_model(fresh, memory)
    weights.attach(model, fusion.architecture)
    found = fusion.loss_of(model)
    if not math.isclose(found, expected, rel_tol=_TOLERANCE, abs_tol=1e-7):
        raise VerificationError(
            f"the calibration loss of the result is {expected:.6g}, and {found:.6g} after reloading it: the result is "
            "not saved. Please report this with the config of the model."
        )
    return model


def _digest(batches: Iterable[Mapping[str, Any]]) -> str:
    """Digest of the tensors of all batches."""
    found = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            if isinstance(batch[name], Tensor):
                found.update(name.encode() + batch[name].contiguous().cpu().numpy().tobytes())
    return found.hexdigest()
