"""Models whose modules or weights were exchanged after they were built, and the call that undoes it."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from transformers import PreTrainedModel

from ...errors import UnsupportedModelError


def check_unaltered(model: PreTrainedModel) -> None:
    """Raise `UnsupportedModelError` unless a model has the modules and weights of its class.

    A fused model is built from the class and the config, so that other modules and weights would be lost. The check
    compares names, shapes and the numbers of layers, and reads no weights.
    """
    with torch.device("meta"):
        stock = type(model)(copy.deepcopy(model.config))  # building a model may change its config
    own = dict(stock.named_modules())
    for name, module in model.named_modules():
        for what, remedy in _alterations(module):
            if name not in own or all(what != other for other, _ in _alterations(own[name])):  # wav2vec 2.0 has some
                raise UnsupportedModelError(f"{name or type(model).__name__} {what}: {remedy}, then fuse.")
    expected, found = _shapes(stock), _shapes(model)
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    # maps whose biases were removed by hand still become linear MLPs
    wrong = [name for name in wrong if name in found or not name.endswith(".bias")]
    if wrong:
        name = wrong[0]
        raise UnsupportedModelError(
            f"{type(model).__name__} has {found.get(name, 'no weight')} at {name}, and its config asks for "
            f"{expected.get(name, 'none')}: the model was changed after it was built. Correct the config where layers "
            "were deleted (num_hidden_layers and lists with one entry per layer) or sizes changed; otherwise load the "
            "model with from_pretrained, and fuse it before you change it."
        )
    places = {name: module.layer_idx for name, module in stock.named_modules() if hasattr(module, "layer_idx")}
    for name, module in model.named_modules():
        if name in places and getattr(module, "layer_idx", places[name]) != places[name]:
            raise UnsupportedModelError(
                f"{name} has layer_idx={module.layer_idx}, and its place is {places[name]}: layers were deleted, and "
                "the others still count as before. Save the model with save_pretrained and load it again, then fuse."
            )


def _shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _alterations(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Ways in which a module was altered, and how to undo each."""
    origin = type(module).__module__.partition(".")[0]
    if origin == "peft":
        yield (
            "was put there by PEFT",
            "call merge_and_unload() on the PeftModel to keep the adapters, or unload() to drop them, and pass the "
            "result",
        )
    if origin in ("bitsandbytes", "torchao", "optimum", "quanto", "gptqmodel", "awq", "compressed_tensors"):
        yield f"is quantised by {origin}", "load the full-precision model, fuse it, quantise the result"
    if hasattr(module, "_orig_mod"):
        yield "is compiled", "use the model from before torch.compile, whose weights are the same"
    if is_parametrized(module):
        names = ", ".join(module.parametrizations)
        yield (
            f"has a parametrisation of {names}",
            "call torch.nn.utils.parametrize.remove_parametrizations(module, name) for each",
        )
    for name, _ in module.named_parameters(recurse=False):
        if not name.endswith(("_orig", "_g")):
            continue
        weight = name.rpartition("_")[0]
        if f"{weight}_mask" in module._buffers:
            yield f"has a pruning mask on {weight}", f"call torch.nn.utils.prune.remove(module, {weight!r}) for each"
        elif f"{weight}_v" in module._parameters:
            yield f"has a weight norm on {weight}", "call torch.nn.utils.remove_weight_norm(module) for each"
        elif f"{weight}_u" in module._buffers:
            yield f"has a spectral norm on {weight}", "call torch.nn.utils.remove_spectral_norm(module) for each"
