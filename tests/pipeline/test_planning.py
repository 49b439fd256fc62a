"""`hf-layerfuse plan` shows what a run does, and changes nothing."""

import json
import shutil

import pytest
import torch
import yaml
from helpers import tiny_model
from runs import causal_lm, image_classification, sentences, text_classification
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessorPil

from hf_layerfuse import AutoFusedModel, FusionRecipe, Plan, apply, plan_fusion
from hf_layerfuse.cli import main, parse_overrides
from hf_layerfuse.methods.fusion.search import search
from hf_layerfuse.pipeline import planning
from hf_layerfuse.pipeline.inspect import text_batches
from hf_layerfuse.plan.words import change_table
from hf_layerfuse.recipe import load_recipe

pytestmark = [
    pytest.mark.usefixtures("fresh_accelerate"),
    pytest.mark.filterwarnings("ignore::hf_layerfuse.errors.LayerFuseWarning"),
]

SHORT = ["--evaluate.latency", "false"]


def residual_network(path):
    words = image_classification(path)
    shutil.rmtree(path / "model")
    torch.manual_seed(0)
    config = ResNetConfig(depths=[3, 2], hidden_sizes=[8, 16], embedding_size=8, layer_type="basic", num_labels=2)
    ResNetForImageClassification(config).save_pretrained(path / "model")
    ViTImageProcessorPil(size={"height": 40, "width": 40}).save_pretrained(path / "model")
    return words


def method(words, name, **fields):
    """The same arguments, with another method in the recipe file."""
    with open(words[0], encoding="utf-8") as file:
        recipe = yaml.safe_load(file)
    del recipe["fusion"]
    with open(words[0], "w", encoding="utf-8") as file:
        json.dump({**recipe, name: fields}, file)
    return words


RUNS = {
    "fusion": lambda path: [*causal_lm(path), "--fusion.effort", "medium"],
    "share": lambda path: [*text_classification(path), "--fusion.mode", "share", "--fusion.ratio", "0.4"],
    "latency": lambda path: [*text_classification(path), "--fusion.latency_budget", "0.7"],
    "collapse": lambda path: method(text_classification(path), "collapse", count=2),
    "homotopy": lambda path: [
        *method(text_classification(path), "collapse", count=2, method="homotopy"),
        *("--heal.steps", "6"),
    ],
    "merge": lambda path: method(residual_network(path), "merge", latency_budget=0.9, latency_batch_size=2),
    "open": lambda path: method(
        residual_network(path), "merge", latency_budget=0.9, latency_batch_size=2, method="open"
    ),
}


@pytest.mark.slow
@pytest.mark.usefixtures("steady")
@pytest.mark.parametrize("name", RUNS)
def test_the_plan_is_that_of_the_run(tmp_path, capsys, name):
    """For every method, the edits are those of the `plan.json` that the run writes, and so is the number of
    parameters. Where no step follows healing, the notes are the same too."""
    words = [*RUNS[name](tmp_path), *SHORT]
    planned = planning.plan_run(load_recipe(words[0], parse_overrides(words[1:])))
    capsys.readouterr()
    assert main(["plan", *words]) == 0
    shown = capsys.readouterr().out
    assert main(["run", *words]) == 0
    written = Plan.load(tmp_path / "out" / "plan.json")
    assert planned.plan.edits == written.edits
    if name not in ("homotopy", "open"):
        assert planned.plan == written
    assert all(cell in shown for row in change_table(written) for cell in row)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    for size, (before, after) in planned.sizes.items():
        assert (before, after) == (results["before"][size], results["healed"][size])


@pytest.mark.slow
def test_rounds_are_announced(tmp_path, capsys):
    """A schedule decides in rounds: the plan is that of the first one, and the last goal is named."""
    words = [*causal_lm(tmp_path), *SHORT, "--heal.schedule", "uniform", "--heal.rounds", "2", "--heal.steps", "4"]
    assert main(["plan", *words]) == 0
    shown = capsys.readouterr().out
    assert "This is round 1 of 2" in shown
    assert "the last one leads to keep_layers=4." in shown
    assert main(["run", *words]) == 0
    first = Plan.load(tmp_path / "out" / "plan.json").notes.rounds[0]
    assert all(cell in shown for row in change_table(first) for cell in row)


def test_a_recipe_is_planned_without_writing(tmp_path, capsys):
    """The command takes the arguments of a run, prints its plan, sizes and times, and leaves no file."""
    words = causal_lm(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main(["plan", *words, "--fusion.keep-layers", "3"]) == 0
    captured = capsys.readouterr()
    assert "The run decides the same" in captured.out
    assert "latency, batch 8 (ms)" in captured.out
    assert "measured on this machine" in captured.out
    assert "fusing with keep_layers=3" in captured.err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "words",
    [
        ["--keep_layers", "4"],
        pytest.param(["--ratio", "0.4", "--mode", "share", "--rank", "auto"], marks=pytest.mark.slow),
    ],
)
def test_a_model_without_data(tmp_path, capsys, words):
    """The command shows the decisions of `plan_fusion` and the sizes after `apply`, and says that data may change
    them. A config gives runs of about equal length and the same size, and no speed."""
    causal_lm(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    assert main(["plan", str(tmp_path / "model"), *words]) == 0
    shown = capsys.readouterr().out
    model = AutoFusedModel.from_pretrained(tmp_path / "model")
    options = {
        name.removeprefix("--"): yaml.safe_load(value) for name, value in zip(words[::2], words[1::2], strict=True)
    }
    plan = plan_fusion(model, FusionRecipe(**options))
    sizes = [f"{count:,}" for count in (model.num_parameters(), apply(model, plan).num_parameters())]
    assert all(cell in shown for row in change_table(plan) for cell in row)
    assert ["parameters", *sizes] in [line.split()[:3] for line in shown.splitlines()]
    assert "A run decides on calibration data, and may choose other groups." in shown
    assert "latency" in shown
    assert main(["plan", str(tmp_path / "model" / "config.json"), *words]) == 0
    shown = capsys.readouterr().out
    assert ["parameters", *sizes] in [line.split()[:3] for line in shown.splitlines()]
    assert "A run decides on calibration data, and may choose other groups." in shown
    assert "latency" not in shown
    assert sorted(tmp_path.rglob("*")) == before


def test_a_model_with_text_is_searched(tmp_path, capsys):
    """With lines of text, the plan is that of the calibrated search."""
    causal_lm(tmp_path)
    path, text = str(tmp_path / "model"), tmp_path / "lines.txt"
    text.write_text("\n".join(sentences(12, 1)) + "\n")
    assert main(["plan", path, "--keep_layers", "4", "--effort", "low", "--text", str(text)]) == 0
    shown = capsys.readouterr().out
    recipe = FusionRecipe(keep_layers=4, effort="low")
    found = search(AutoFusedModel.from_pretrained(path), recipe, text_batches(path, text))
    assert all(cell in shown for row in change_table(found.plan) for cell in row)
    assert f"Decided on 12 sequences from {text}" in shown
    assert main(["plan", f"{path}/config.json", "--keep_layers", "4", "--text", str(text)]) == 1
    assert "has no weights to calibrate" in capsys.readouterr().err


def test_half_precision_is_planned_in_float32(tmp_path, capsys, monkeypatch):
    """`plan` and `inspect` compute a float16 checkpoint in float32, and show the size of its file."""
    tiny_model("gpt2", "GPT2LMHeadModel").half().save_pretrained(tmp_path)
    seen = []
    monkeypatch.setattr(planning, "plan_fusion", lambda model, recipe: seen.append(model) or plan_fusion(model, recipe))
    assert main(["plan", str(tmp_path), "--keep_layers", "4"]) == 0
    assert seen[0].dtype == torch.float32
    size = 2 * seen[0].num_parameters()
    assert f"{size:,}" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["megabytes", "in", "float16", f"{size / 1e6:,.1f}"] in rows
