"""Fused, linear and merged models can be exported to ONNX, and compute the same there."""

import logging
import warnings

import onnxruntime
import pytest
import torch
from helpers import network, some_merge_plan, tiny_model

from hf_layerfuse import Blend, Drop, Fuse, Linearize, Plan, apply, architecture_for
from hf_layerfuse.evaluation.divergence import prediction
from hf_layerfuse.evaluation.dummy_inputs import dummy_inputs

slow = pytest.mark.slow
BERT = "BertForSequenceClassification"


def exported(model, path):
    """Outputs of onnxruntime and of the model for random inputs."""
    inputs = dict(dummy_inputs(model, 2))
    if model.can_generate():
        inputs["use_cache"] = False
    tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    with warnings.catch_warnings():
        # torch.onnx calls what torch has deprecated
        warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\)", category=FutureWarning)
        logging.disable(logging.WARNING)  # torchvision, which is not needed, is not there
        try:
            torch.onnx.export(model, (), kwargs=inputs, dynamo=True, verbose=False).save(path)
        finally:
            logging.disable(logging.NOTSET)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(None, {put.name: tensors[put.name].numpy() for put in session.get_inputs()})
    with torch.inference_mode():
        return torch.from_numpy(found[0]), prediction(model(**inputs))


@pytest.mark.parametrize("name", ["cifar", *(pytest.param(name, marks=slow) for name in ("basic", "mobilenet"))])
def test_merged_convolutions(name, tmp_path):
    model = network(name)
    theirs, ours = exported(apply(model, some_merge_plan(model, 3)).float().eval(), tmp_path / "model.onnx")
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4 * ours.abs().max().item())


OTHERS = (
    ("bert", BERT, (Linearize(1, rank=2), Linearize(2, fold=True), Blend(4))),
    ("roberta", "RobertaForTokenClassification", (Fuse("attention", (1, 2)), Drop("mlp", 4))),
    ("distilbert", "DistilBertForMaskedLM", (Drop("layer", 0), Fuse("mlp", (2, 4), "share"))),
    ("gpt2", "GPT2LMHeadModel", (Fuse("layer", (1, 3), "share"), Linearize(4))),
    ("gpt2", "GPT2LMHeadModel", (Fuse("layer", (1, 3), "share", rank=2),)),
    ("gpt2", "GPT2LMHeadModel", (Fuse("layer", (1, 2, 3), "basis", rank=4),)),
    ("llama", "LlamaForCausalLM", (Fuse("mlp", (1, 2), "share", rank=2), Linearize(4))),
    ("qwen3", "Qwen3ForCausalLM", (Drop("attention", 2), Fuse("layer", (3, 4)))),
    ("vit", "ViTForImageClassification", (Fuse("layer", (1, 2), "basis", rank=4), Linearize(4))),
    ("deit", "DeiTForImageClassification", (Fuse("layer", (1, 2)), Drop("mlp", 4))),
)


@pytest.mark.parametrize(
    ("model_type", "head", "edits"),
    [
        ("bert", BERT, (Drop("attention", 1), Linearize(2), Fuse("layer", (3, 4)))),
        *(pytest.param(*row, marks=slow) for row in OTHERS),
    ],
)
def test_fused_transformers(model_type, head, edits, tmp_path):
    model = tiny_model(model_type, head)
    theirs, ours = exported(apply(model, Plan(model_type, 6, edits)).eval(), tmp_path / "model.onnx")
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4 * ours.abs().max().item())


@pytest.mark.slow
@pytest.mark.parametrize(
    "edit", [Drop("conv", 1), Fuse("conv", (1, 2)), Fuse("conv", (1, 2), "share", rank=2)], ids=str
)
def test_fused_convolutional_layers(edit, tmp_path):
    """Layers of two convolutions that are dropped, fused, or share kernels."""
    model = network("cifar")
    architecture = architecture_for(model)
    plan = Plan(architecture.model_type, len(architecture.layer_list(model)), (edit,), kinds=architecture.kinds)
    theirs, ours = exported(apply(model, plan).float().eval(), tmp_path / "model.onnx")
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4 * ours.abs().max().item())
