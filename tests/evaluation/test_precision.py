"""Models in half precision on a CPU are computed in float32, and keep the data type of their file."""

import copy

import pytest
import torch
from helpers import network, tiny_model

from hf_layerfuse import compare, evaluate, fuse
from hf_layerfuse.evaluation.dummy_inputs import dummy_inputs
from hf_layerfuse.evaluation.precision import dtype_in_file, in_float32, store_as
from hf_layerfuse.methods.fusion import search as fusion
from hf_layerfuse.models.surgery.size import planned_size
from hf_layerfuse.plan import Plan


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_half_precision_is_computed_in_float32(dtype, monkeypatch) -> None:
    """`fuse` searches on a float32 copy, and returns a model in the given type; the model itself does not change."""
    model = tiny_model("gpt2", "GPT2LMHeadModel").to(dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen, applied = set(), fusion.applied

    def look(model, *arguments):
        seen.add(model.dtype)
        return applied(model, *arguments)

    monkeypatch.setattr(fusion, "applied", look)
    small = fuse(model, keep_layers=3, effort="low", batches=[dummy_inputs(model)])
    assert seen == {torch.float32}
    assert {parameter.dtype for parameter in small.parameters()} == {dtype}
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert small.fusion_report.bytes[0] == sum(parameter.nbytes for parameter in model.parameters())


@pytest.mark.slow
def test_images_in_half_precision_fit() -> None:
    """Images that a model in half precision takes are converted with it."""
    model = copy.deepcopy(network("cifar")).to(torch.bfloat16)
    images = dummy_inputs(model, 4)
    assert images["pixel_values"].dtype == torch.bfloat16
    small = fuse(model, keep_layers=4, effort="low", batches=[images])
    assert small.dtype == torch.bfloat16


def test_a_model_in_float32_is_not_copied() -> None:
    model = tiny_model("gpt2")
    assert in_float32(model) is model
    assert dtype_in_file(model) == torch.float32


def test_sizes_are_those_of_the_file() -> None:
    """Targets in bytes mean the file, so half precision fits twice the parameters."""
    model = tiny_model("gpt2", "GPT2LMHeadModel")
    nothing = Plan("gpt2", model.config.n_layer)
    whole = planned_size(model, nothing)
    half = planned_size(store_as(tiny_model("gpt2", "GPT2LMHeadModel"), torch.float16), nothing)
    assert half["parameters"] == whole["parameters"]
    assert half["bytes"] == whole["bytes"] / 2
    limit = 0.8 * whole["bytes"]
    small = fuse(model, max_bytes=limit)
    assert small.num_parameters() < model.num_parameters()
    assert fuse(model.half(), max_bytes=limit / 2).num_parameters() == small.num_parameters()


def test_comparisons_compute_in_float32() -> None:
    """`evaluate` and `compare` give the figures of float32 copies, and the sizes of the models themselves."""
    model = tiny_model("gpt2", "GPT2LMHeadModel").half()
    small = tiny_model("gpt2", "GPT2LMHeadModel", n_layer=3).half()
    batches = [dummy_inputs(model, seed=seed) for seed in range(2)]
    wide = evaluate(copy.deepcopy(model).float(), batches)
    assert evaluate(model, batches) == wide
    found = compare(model, small, batches, batch_sizes=())
    assert found.quality[0] == wide["value"]
    assert found.bytes == tuple(sum(weight.nbytes for weight in one.parameters()) for one in (model, small))
    assert {model.dtype, small.dtype} == {torch.float16}
