"""The surroundings of a caller do not leak in: gradient modes, and flags of a config."""

import copy
from collections.abc import Callable

import pytest
import torch
from helpers import LAYERS, some_batches, tiny_model
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from hf_layerfuse import (
    AutoFusedModel,
    Drop,
    Fuse,
    HealRecipe,
    Plan,
    UnsupportedModelError,
    VerificationError,
    align,
    apply,
    collapse,
    expand,
    fuse,
    heal,
    refit,
    verify,
)

SHARED = Plan("llama", LAYERS, (Fuse("layer", (1, 2), "share", align="permutation"),))


def refitted(model: PreTrainedModel) -> PreTrainedModel:
    student = apply(model, SHARED)
    refit(student, model, SHARED, some_batches(model))
    return student


MAKERS: dict[str, Callable[[PreTrainedModel], PreTrainedModel]] = {
    "depth": lambda model: fuse(model, keep_layers=4, effort="low", batches=some_batches(model)),
    "share": lambda model: fuse(model, keep_layers=4, mode="share", effort="low", batches=some_batches(model)),
    "collapse": lambda model: collapse(model, count=2, batches=some_batches(model)),
    "apply": lambda model: apply(model, Plan("llama", LAYERS, (Drop("attention", 2),))),
    "align": lambda model: align(model, SHARED),
    "refit": refitted,
    "expand": lambda model: expand(apply(model, SHARED)),
}


def healed(student: PreTrainedModel, teacher: PreTrainedModel) -> float:
    rows = [{"input_ids": row, "labels": row} for batch in some_batches(teacher) for row in batch["input_ids"]]
    return heal(student, DataLoader(rows, batch_size=4), HealRecipe(steps=2), teacher=teacher).train_loss[-1][1]


TRAINED = ("depth", "share")
"""Makers whose results are trained too; the weights of all are compared."""


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize(
    ("name", "mode"), [*((name, torch.inference_mode) for name in MAKERS), ("depth", torch.no_grad)]
)
def test_models_made_in_inference_mode_can_be_trained(name: str, mode: Callable) -> None:
    """Weights are ordinary tensors that require gradients, equal to those made outside of it."""
    model = tiny_model("llama", "LlamaForCausalLM")
    with mode():
        made = MAKERS[name](model)
    assert not any(parameter.is_inference() for parameter in made.parameters())
    assert all(parameter.requires_grad for parameter in made.parameters())
    expected = MAKERS[name](model)
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), expected.parameters(), strict=True))
    if name in TRAINED:
        assert healed(made, model) > 0


@pytest.mark.usefixtures("fresh_accelerate")
def test_loading_and_healing_in_inference_mode(tmp_path) -> None:
    model = tiny_model("llama", "LlamaForCausalLM")
    model.save_pretrained(tmp_path)
    with torch.inference_mode():
        loaded = AutoFusedModel.from_pretrained(tmp_path)
        assert healed(loaded, model) > 0
    assert not any(parameter.is_inference() for parameter in loaded.parameters())


@pytest.mark.usefixtures("fresh_accelerate")
def test_an_original_made_in_inference_mode() -> None:
    """It is refused, and the advice works."""
    with torch.inference_mode():
        model = tiny_model("llama", "LlamaForCausalLM")
    with pytest.raises(UnsupportedModelError, match=r"made under torch\.inference_mode.*copy\.deepcopy\(model\)"):
        MAKERS["depth"](model)
    made = MAKERS["depth"](copy.deepcopy(model))
    assert not any(parameter.is_inference() for parameter in made.parameters())
    assert healed(made, tiny_model("llama", "LlamaForCausalLM")) > 0


FLAGS = [{"return_dict": False}, {"output_hidden_states": True}, {"output_attentions": True}, {"use_cache": False}]


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("share", FLAGS[0]),
        *(pytest.param("depth", flags, marks=pytest.mark.slow) for flags in FLAGS),
        pytest.param("collapse", FLAGS[1], marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_flags_of_a_config_do_not_matter(name: str, flags: dict[str, bool]) -> None:
    """The result is the same to the bit, and keeps the flags, as the original does."""
    model = tiny_model("llama", "LlamaForCausalLM", attn_implementation="eager", **flags)
    made = MAKERS[name](model)
    verify(made)
    assert {flag: getattr(made.config, flag) for flag in flags} == flags
    assert {flag: getattr(model.config, flag) for flag in flags} == flags
    plain = MAKERS[name](tiny_model("llama", "LlamaForCausalLM", attn_implementation="eager"))
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), plain.parameters(), strict=True))
    assert healed(made, model) > 0
    assert {flag: getattr(made.config, flag) for flag in flags} == flags


def test_flags_that_transformers_loads_and_does_not_save(tmp_path) -> None:
    """It loads `output_attentions` with a kernel that does not return them, and refuses to save such a config."""
    model = tiny_model("llama", "LlamaForCausalLM", attn_implementation="eager", output_attentions=True)
    model.save_pretrained(tmp_path)
    with pytest.raises(VerificationError, match=r"cannot save the fused model: .*output_attentions"):
        fuse(AutoFusedModel.from_pretrained(tmp_path), keep_layers=4)
    loaded = AutoFusedModel.from_pretrained(tmp_path, attn_implementation="eager")
    assert fuse(loaded, keep_layers=4).config.output_attentions
