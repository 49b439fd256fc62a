"""Models whose modules were exchanged are refused with the call that undoes it, and that call works."""

from collections.abc import Callable

import pytest
import torch
from helpers import LAYERS, some_batches, tiny_model
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm
from transformers import PreTrainedModel, pipeline

from hf_layerfuse import AutoFusedModel, Drop, Plan, UnsupportedModelError, apply, fuse

pytestmark = [
    # people still have models with it
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated"),
    # PEFT reads the earlier name
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]


def lora() -> LoraConfig:
    return LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


def maps(model: PreTrainedModel) -> list[nn.Linear]:
    return [layer.mlp.up_proj for layer in model.model.layers]


def each(change: Callable[[nn.Module], object]) -> Callable[[PreTrainedModel], None]:
    def alter(model: PreTrainedModel) -> None:
        for module in maps(model):
            change(module)

    return alter


ALTERED = {
    "PEFT": (lambda model: get_peft_model(model, lora()), r"put there by PEFT: call merge_and_unload\(\)"),
    "mask": (
        each(lambda module: prune.l1_unstructured(module, "weight", 0.5)),
        r"pruning mask on weight: call torch\.nn\.utils\.prune\.remove\(module, 'weight'\)",
    ),
    "mask on the head": (
        lambda model: prune.random_unstructured(model.lm_head, "weight", 0.3),
        "lm_head has a pruning mask",
    ),
    "parametrisation": (each(parametrizations.weight_norm), r"parametrisation of weight: .*remove_parametrizations"),
    "weight norm": (each(old_weight_norm), r"weight norm on weight: .*remove_weight_norm"),
    "spectral norm": (each(old_spectral_norm), r"spectral norm on weight: .*remove_spectral_norm"),
    "layers deleted": (
        lambda model: model.model.layers.__delitem__(4),
        r"no weight at model\.layers\.5\..*num_hidden_layers",
    ),
    "a module added": (
        lambda model: setattr(model.model.layers[0], "extra", nn.Linear(2, 2)),
        r"\(2,\) at model\.layers\.0\.extra\.bias, and its config asks for none",
    ),
    "a size changed": (lambda model: setattr(model.config, "intermediate_size", 40), "its config asks for"),
}


@pytest.mark.parametrize("name", ALTERED)
def test_altered_models_are_refused(name: str) -> None:
    """Each is refused before planning and before applying, with and without calibration data."""
    alter, message = ALTERED[name]
    model = tiny_model("llama", "LlamaForCausalLM")
    batches = some_batches(model)
    alter(model)
    for attempt in (
        lambda: fuse(model, keep_layers=3),
        lambda: fuse(model, keep_layers=3, mode="share", effort="low", batches=batches),
        lambda: apply(model, Plan("llama", LAYERS, (Drop("layer", 2),))),
    ):
        with pytest.raises(UnsupportedModelError, match=message):
            attempt()


def cut(model: PreTrainedModel) -> PreTrainedModel:
    """Two layers deleted, and the config changed to match."""
    del model.model.layers[2:4]
    model.config.num_hidden_layers = LAYERS - 2
    return model


def test_layers_that_count_as_before_are_refused(tmp_path) -> None:
    """A cache would have too few entries for them; saved and loaded, the model is whole."""
    model = cut(tiny_model("llama", "LlamaForCausalLM"))
    with pytest.raises(UnsupportedModelError, match=r"has layer_idx=4, and its place is 2: .*load it again"):
        fuse(model, keep_layers=2)
    model.save_pretrained(tmp_path)
    assert fuse(AutoFusedModel.from_pretrained(tmp_path), keep_layers=2).config.num_hidden_layers == 2


REMEDIES = {
    "PEFT": lambda model: get_peft_model(model, lora()).merge_and_unload(),
    "PEFT dropped": lambda model: get_peft_model(model, lora()).unload(),
    "mask": lambda model: _undone(model, ALTERED["mask"][0], lambda module: prune.remove(module, "weight")),
    "parametrisation": lambda model: _undone(
        model,
        ALTERED["parametrisation"][0],
        lambda module: parametrize.remove_parametrizations(module, "weight"),
    ),
    "weight norm": lambda model: _undone(model, ALTERED["weight norm"][0], remove_weight_norm),
    "spectral norm": lambda model: _undone(model, ALTERED["spectral norm"][0], remove_spectral_norm),
}


def _undone(model: PreTrainedModel, alter: Callable, undo: Callable[[nn.Module], object]) -> PreTrainedModel:
    alter(model)
    for module in maps(model):
        undo(module)
    return model


@pytest.mark.parametrize("name", REMEDIES)
def test_the_advice_works(name: str) -> None:
    model = REMEDIES[name](tiny_model("llama", "LlamaForCausalLM"))
    assert fuse(model, keep_layers=3).config.num_hidden_layers == 3


class Wrapped(nn.Module):
    """A module of one's own around a model."""

    def __init__(self) -> None:
        super().__init__()
        self.body = tiny_model("bert", "BertModel")


WRAPPED = {
    "name": (lambda: "openai-community/gpt2", r"load it first, with AutoFusedModel\.from_pretrained\('openai-"),
    "DataParallel": (lambda: nn.DataParallel(tiny_model("gpt2")), r"pass the model inside it, \.module"),
    "compiled": (lambda: torch.compile(tiny_model("gpt2"), backend="eager"), r"pass the model inside it, \._orig_mod"),
    "PeftModel": (
        lambda: get_peft_model(tiny_model("llama", "LlamaForCausalLM"), lora()),
        r"pass model\.merge_and_unload\(\)",
    ),
    "module": (Wrapped, r"pass the model inside it, \.get_submodule\('body'\)"),
    "sequence": (lambda: nn.Sequential(tiny_model("bert")), r"pass the model inside it, \.get_submodule\('0'\)"),
    "no model": (lambda: nn.Linear(2, 2), "pass a model as from_pretrained returns it"),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrapped_models_are_refused(name: str) -> None:
    """The error says where the model is."""
    make, message = WRAPPED[name]
    with pytest.raises(UnsupportedModelError, match=message):
        fuse(make(), keep_layers=3)


def test_pipelines_are_refused(tmp_path) -> None:
    from runs import save_text_model

    save_text_model(tmp_path, "GPT2LMHeadModel")
    with pytest.raises(UnsupportedModelError, match=r"pass the model inside it, \.model"):
        fuse(pipeline("text-generation", str(tmp_path)), keep_layers=3)
