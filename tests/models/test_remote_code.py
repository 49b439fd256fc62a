"""Checkpoints with code load, compute the same and can be saved again without this library."""

import ast
import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import network, some_merge_plan, tiny_model
from safetensors.torch import load_file, save_file

from hf_layerfuse import AutoFusedModel, Blend, Drop, Fuse, Linearize, Plan, UnsupportedModelError, apply
from hf_layerfuse.evaluation.divergence import prediction
from hf_layerfuse.evaluation.dummy_inputs import dummy_inputs
from hf_layerfuse.models.remote_code import FOLDER

MODELS = {
    "gpt2": ("AutoModelForCausalLM", "GPT2LMHeadModel", (Fuse("layer", (1, 3), "share", rank=2), Linearize(4))),
    "bert": ("AutoModelForTokenClassification", "BertForTokenClassification", (Linearize(2, fold=True), Blend(4))),
    "distilbert": ("AutoModelForMaskedLM", "DistilBertForMaskedLM", (Fuse("mlp", (1, 2), "share"),)),
    "vit": ("AutoModelForImageClassification", "ViTForImageClassification", (Fuse("layer", (1, 2), "basis", rank=4),)),
    # its body is built by an Auto class
    "llama": ("AutoModelForSequenceClassification", "LlamaForSequenceClassification", (Drop("attention", 1),)),
    "qwen3": ("AutoModel", "Qwen3Model", (Drop("mlp", 0), Fuse("attention", (2, 3), "share"))),
    "basic": ("AutoModelForImageClassification", None, None),
    "mobilenet": ("AutoModelForImageClassification", None, None),
}

LOAD = """
import sys
sys.modules["hf_layerfuse"] = None  # which is what an import finds where it is not installed
import torch, transformers
from safetensors.torch import load_file, save_file

for name, auto_class in zip(sys.argv[1::2], sys.argv[2::2]):
    model = getattr(transformers, auto_class).from_pretrained(name, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules.")
    inputs = load_file(f"{name}/inputs.safetensors")
    with torch.inference_mode():
        found = model.double().eval()(**inputs)
    output = found.logits if hasattr(found, "logits") else found.last_hidden_state
    save_file({"output": output}, f"{name}/output.safetensors")
    model.float().save_pretrained(f"{name}/again")
    if model.can_generate():
        ids = [model.generate(**inputs, max_new_tokens=6, use_cache=use, do_sample=False) for use in (True, False)]
        assert torch.equal(*ids)
"""


def without_library(tmp_path, code, *arguments):
    """Output of a process that cannot import this library."""
    hidden = {**os.environ, "HF_HOME": str(tmp_path / "hub"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-W", "error::UserWarning", "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=hidden, capture_output=True, text=True, check=False, cwd=tmp_path)


def fused(name):
    _, head, edits = MODELS[name]
    if edits is None:
        model = network(name)
        return apply(model, some_merge_plan(model, 3)).float().eval()
    return apply(tiny_model(name, head), Plan(name, 6, edits)).eval()


@pytest.mark.slow
def test_loads_where_the_library_is_not(tmp_path):
    """Without the library, every kind of fused model gives the same outputs, generates with and without a cache, and
    can be saved."""
    expected = {}
    for name in MODELS:
        model = fused(name)
        model.save_pretrained(tmp_path / name, with_code=True)
        inputs = dict(dummy_inputs(model.double(), 1))
        save_file(inputs, tmp_path / name / "inputs.safetensors")
        with torch.inference_mode():
            expected[name] = prediction(model(**inputs))
    done = without_library(tmp_path, LOAD, *(word for name in MODELS for word in (name, MODELS[name][0])))
    assert done.returncode == 0, done.stderr
    for name, output in expected.items():
        found = load_file(tmp_path / name / "output.safetensors")["output"]
        torch.testing.assert_close(found, output, rtol=1e-9, atol=1e-9)
        again = tmp_path / name / "again"
        for path in (tmp_path / name / FOLDER).iterdir():  # to the byte, however often it is saved
            assert (again / FOLDER / path.name).read_text() == path.read_text()
        ours = AutoFusedModel.from_pretrained(again)
        assert type(ours).__module__ == "hf_layerfuse.models.modeling"
        assert ours.config.auto_map == json.loads((tmp_path / name / "config.json").read_text())["auto_map"]


def test_needs_torch_and_transformers_alone(tmp_path):
    """Shipped files import only each other, torch and transformers."""
    fused("gpt2").save_pretrained(tmp_path, with_code=True)
    files = list((tmp_path / FOLDER).iterdir())
    allowed = {"torch", "transformers", *sys.stdlib_module_names}
    for path in files:
        text = path.read_text()
        assert text.startswith("# From hf_layerfuse ")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                assert {alias.name.partition(".")[0] for alias in node.names} <= allowed
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert node.module.partition(".")[0] in allowed
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 1
                assert tmp_path / FOLDER / f"{node.module}.py" in files


def test_code_is_run_only_for_those_who_trust_it(tmp_path):
    """Without `trust_remote_code`, transformers refuses the checkpoint and runs none of its code."""
    fused("bert").save_pretrained(tmp_path / "model", with_code=True)
    load = "import sys; sys.modules['hf_layerfuse'] = None; from transformers import AutoModel as A; "
    done = without_library(tmp_path, f"{load}A.from_pretrained('model', trust_remote_code=False)")
    assert "trust_remote_code" in done.stderr
    assert "FusedBert" not in done.stdout
    assert not (tmp_path / "modules" / "transformers_modules" / "model").exists()


def test_code_goes_along_when_asked(tmp_path):
    """Code is saved with `with_code`, or after `register_for_auto_class`; otherwise the config names no code."""
    model = fused("bert")
    model.save_pretrained(tmp_path / "with", with_code=True)
    model.save_pretrained(tmp_path / "without")
    AutoFusedModel.from_pretrained(tmp_path / "with").save_pretrained(tmp_path / "reloaded")
    for name in ("without", "reloaded"):
        assert "auto_map" not in json.loads((tmp_path / name / "config.json").read_text())
        assert not (tmp_path / name / FOLDER).exists()
    try:
        type(model).register_for_auto_class("AutoModelForTokenClassification")
        model.save_pretrained(tmp_path / "registered")
    finally:
        del type(model)._ships_code
    assert (tmp_path / "registered" / "config.json").read_text() == (tmp_path / "with" / "config.json").read_text()
    auto_map = json.loads((tmp_path / "with" / "config.json").read_text())["auto_map"]
    assert (
        auto_map["AutoModelForTokenClassification"]
        == "layerfuse/layerfuse_models_modeling.FusedBertForTokenClassification"
    )
    assert auto_map["AutoConfig"] == "layerfuse/layerfuse_models_modeling.FusedBertConfig"


def test_a_stock_export_names_no_code(tmp_path):
    model = apply(tiny_model("gpt2", "GPT2LMHeadModel"), Plan("gpt2", 6, (Fuse("layer", (1, 3), "share"),)))
    model.save_pretrained(tmp_path / "with", with_code=True)
    AutoFusedModel.from_pretrained(tmp_path / "with").save_pretrained(tmp_path / "stock", expanded=True)
    assert "auto_map" not in json.loads((tmp_path / "stock" / "config.json").read_text())


def test_code_of_others_is_not_shipped(tmp_path):
    """An architecture from outside the package is refused before anything is written, with the next step."""
    model = network("cifar")
    model = apply(model, some_merge_plan(model, 3))
    with pytest.raises(UnsupportedModelError, match=r"the code of 'cifar_resnet' is not in this package.*with_code"):
        model.save_pretrained(tmp_path / "model", with_code=True)
    assert not (tmp_path / "model").exists()
