"""The README says what the benchmarks measured, and its examples run."""

import importlib.util
import re
from pathlib import Path

import pytest
from conftest import TINY, network, tiny_model

import hf_layerfuse
from hf_layerfuse import CollapseRecipe, FusionRecipe, MergeRecipe, fuse
from hf_layerfuse.inputs import example_inputs

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_come_from_the_results():
    """`python benchmarks/readme.py` would change nothing."""
    assert load(ROOT / "benchmarks" / "readme.py").filled(README) == README


# two short sequences through a random model: what they cost a trained one is not what this is about
@pytest.mark.usefixtures("steady")
@pytest.mark.filterwarnings("ignore:the fused model is worse than chance:hf_layerfuse.LayerFuseWarning")
def test_examples_run(tmp_path, monkeypatch):
    """Every Python block runs as it stands, on a tiny GPT-2 of 12 layers in the place of the one on the Hub."""
    model = tiny_model("gpt2", "GPT2LMHeadModel", n_layer=12)
    model.save_pretrained(tmp_path / "openai-community" / "gpt2")
    fuse(model, keep_layers=8).save_pretrained(tmp_path / "path" / "or" / "hub-name")
    monkeypatch.chdir(tmp_path)
    names: dict = {"calibration_batches": [{"input_ids": example_inputs(model)["input_ids"]}]}
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 3
    names |= {"resnet": network("cifar"), "calibration_images": [example_inputs(network("cifar"))]}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert (tmp_path / "gpt2-8-layers" / "model.safetensors").is_file()


def test_names_everything_that_is_there():
    """Each architecture, each recipe field and each module is in the README."""
    recipes = FusionRecipe(keep_layers=1), CollapseRecipe(count=1), MergeRecipe(budget=0.5)
    for name in (*TINY, *(field for recipe in recipes for field in vars(recipe))):
        assert name in README
    inside = README[README.index("## Inside") :]
    for path in (ROOT / "hf_layerfuse").glob("*.py"):
        assert path.name in inside or path.name == "__init__.py"
    for path in (ROOT / "recipes").glob("*.yaml"):
        assert f"recipes/{path.name}" in README


def test_public_names_are_documented():
    """Everything in `__all__` has a docstring."""
    for name in hf_layerfuse.__all__:
        assert getattr(hf_layerfuse, name).__doc__


@pytest.mark.parametrize("name", ["fuse", "plan_fusion", "apply", "verify", "register_adapter", "adapter_for"])
def test_docstrings_name_their_errors(name):
    """A public function that can raise says what."""
    assert "Raises:" in getattr(hf_layerfuse, name).__doc__
