"""Artifacts of earlier releases still load and compute the same; `corpus/make.py` wrote them with each release."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import hf_layerfuse
from hf_layerfuse import (
    AutoFusedModel,
    FusionRecipe,
    LayerFuseError,
    MergeRecipe,
    Plan,
    search,
    search_merge,
)

CORPUS = Path(__file__).parent / "corpus"


def report(folder: Path, page: Path) -> int:
    """Exit status of `hf-layerfuse report`, which writes a page. Only this function knows the path of the command."""
    from hf_layerfuse.cli import main

    return main(["report", str(folder), "--output", str(page)])


def found(pattern: str) -> list:
    """Artifacts of a kind from every release, by path. A separate test checks that there are any."""
    paths = sorted(path for path in CORPUS.glob(f"*/{pattern}") if not path.name.startswith("."))
    return [pytest.param(path, id=str(path.relative_to(CORPUS))) for path in paths]


CHECKPOINTS, PLANS, RUNS, TABLES = map(found, ("checkpoints/*", "plans/*.json", "runs/*", "tables/*/*.json"))
SHIPPED = found("checkpoints/*-with-code")


def expected_of(folder: Path) -> tuple[str, dict[str, torch.Tensor], torch.Tensor]:
    """Auto class of a checkpoint, its inputs, and the logits that its release computed."""
    tree = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    inputs = {name: torch.tensor(values) for name, values in tree["inputs"].items()}
    return tree["auto_class"], inputs, torch.tensor(tree["outputs"]["logits"])


def test_every_kind_is_there():
    """Each release has all four kinds of artifacts, so a moved or lost corpus does not pass."""
    releases = [path for path in CORPUS.iterdir() if path.is_dir() and path.name[0].isdigit()]
    assert CORPUS / "0.1.0" in releases
    for release in releases:
        for kind in ("checkpoints", "plans", "runs", "tables"):
            assert any((release / kind).iterdir()), f"no {kind} of {release.name}"
    assert SHIPPED


@pytest.mark.parametrize("folder", CHECKPOINTS)
def test_a_checkpoint_computes_what_it_did(folder):
    """The logits equal those of the release, loaded by this library and by the Auto class of the head."""
    auto_class, inputs, logits = expected_of(folder)
    for loader in (AutoFusedModel, getattr(transformers, auto_class)):
        model = loader.from_pretrained(folder).eval()
        with torch.inference_mode():
            torch.testing.assert_close(model(**inputs).logits, logits, rtol=0, atol=1e-5)


_ALONE = """
import json, sys
sys.modules["hf_layerfuse"] = None  # which is what an import finds where it is not installed
import torch, transformers

for name in sys.argv[1:]:
    tree = json.loads(open(f"{name}/expected.json", encoding="utf-8").read())
    auto_class = getattr(transformers, tree["auto_class"])
    model = auto_class.from_pretrained(name, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules.")
    with torch.inference_mode():
        logits = model(**{key: torch.tensor(values) for key, values in tree["inputs"].items()}).logits
    torch.testing.assert_close(logits, torch.tensor(tree["outputs"]["logits"]), rtol=0, atol=1e-5)
"""


@pytest.mark.slow
def test_shipped_code_runs_without_the_library(tmp_path):
    """The code beside a checkpoint is that of its release, and computes the same without this library."""
    hidden = {**os.environ, "HF_HOME": str(tmp_path / "hub"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-W", "error::UserWarning", "-c", _ALONE]
    command += [str(shutil.copytree(p.values[0], tmp_path / str(i))) for i, p in enumerate(SHIPPED)]
    done = subprocess.run(command, env=hidden, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_public_names_of_the_release_still_work():
    """Each name of 0.1 that has a new one is the same object by both."""
    for earlier, name in hf_layerfuse._NAMES_OF_0_1.items():
        assert name in hf_layerfuse.__all__
        assert getattr(hf_layerfuse, earlier) is getattr(hf_layerfuse, name)


@pytest.mark.parametrize("path", PLANS)
def test_a_plan_is_written_as_it_was_read(path):
    """Reading and writing a plan keeps its edits and format, and loses nothing of its notes."""
    tree = json.loads(path.read_text(encoding="utf-8"))
    plan = Plan.load(path)
    assert plan.edits
    assert Plan.from_dict(plan.to_dict()) == plan
    written = json.loads(plan.to_json())
    notes, earlier = written.pop("notes"), tree.pop("notes")
    assert written == tree
    assert notes.keys() - {"format_version"} == {name for name, value in earlier.items() if value}
    assert Plan.from_json(plan.to_json()).notes == plan.notes
    assert plan.layout().slots


@pytest.mark.parametrize("folder", RUNS)
def test_a_run_has_a_page(folder, tmp_path, capsys):
    """The plan, results and recipe of a run can be read, and give a page; its model has the same size."""
    page = tmp_path / "report.html"
    assert report(folder, page) == 0, capsys.readouterr().err
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    text = page.read_text(encoding="utf-8")
    for stage in ("before", "fused", "healed"):
        assert f"{results[stage]['parameters']:,}" in text
    plan, model = Plan.load(folder / "plan.json"), AutoFusedModel.from_pretrained(folder)
    assert model.num_parameters() == results["healed"]["parameters"]
    if not plan.layout().is_stock:
        assert Plan.from_dict(model.config.layerfuse_plan) == plan


@pytest.mark.parametrize("path", TABLES)
def test_a_table_is_known_for_what_it_is_of(path, tmp_path):
    """A table of another model is refused because of its conditions, not as damaged or by its format. That its numbers
    serve another search of the same model can only be tested on the machine that measured them."""
    shutil.copy(path, tmp_path)
    model, timed = AutoFusedModel.from_pretrained(_stock(path.parent.name, tmp_path)), {"tables": str(tmp_path)}
    if path.parent.name == "merge":
        batches = [{"pixel_values": torch.randn(1, 3, 16, 16)}] * 4
        run, recipe = search_merge, MergeRecipe(budget=0.9, batch_size=1, repeats=1, **timed)
    else:
        batches = [{"input_ids": torch.arange(8).view(1, 8)}] * 4
        run, recipe = search, FusionRecipe(latency_budget=0.9, latency_repeats=1, **timed)
    with pytest.raises(LayerFuseError, match="was measured under other conditions") as caught:
        run(model, recipe, batches)
    assert path.name in str(caught.value)
    assert "format was" not in str(caught.value)


def _stock(kind: str, folder: Path) -> Path:
    """A checkpoint of a model other than those of the tables."""
    torch.manual_seed(7)
    if kind == "merge":
        config = transformers.ResNetConfig(depths=[2], hidden_sizes=[8], embedding_size=8, layer_type="basic")
        model = transformers.ResNetForImageClassification(config)
    else:
        sizes = {"vocab_size": 16, "n_embd": 8, "n_layer": 3, "n_head": 2, "n_positions": 16}
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, pad_token_id=0)
        )
    model.save_pretrained(folder / "model")
    return folder / "model"
