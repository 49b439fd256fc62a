"""`fuse.py` end to end on small local data: every task, its output, its errors, and interruption."""

import contextlib
import copy
import dataclasses
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from helpers import ROOT, network, tiny_model
from hub import hub
from runs import (
    causal_lm,
    feature_extraction,
    files_named_by,
    image_classification,
    machine_paths,
    masked_lm,
    save_text_model,
    sentences,
    text_classification,
    token_classification,
)
from transformers import (
    AutoTokenizer,
    ResNetConfig,
    ResNetForImageClassification,
    ViTImageProcessorPil,
)

from hf_layerfuse import AutoFusedModel, Plan, RecipeError, apply, collapse, fuse, fused_parameters, merge, verify
from hf_layerfuse.cli import parse_overrides
from hf_layerfuse.cli import run as main
from hf_layerfuse.evaluation.dummy_inputs import dummy_inputs
from hf_layerfuse.pipeline import rounds
from hf_layerfuse.pipeline import run as job
from hf_layerfuse.recipe import load_recipe
from hf_layerfuse.training.teacher_cache import with_teacher

# random models are worse than chance, and say so
pytestmark = [
    pytest.mark.usefixtures("fresh_accelerate"),
    pytest.mark.filterwarnings("ignore::hf_layerfuse.errors.LayerFuseWarning"),
]


@pytest.fixture(autouse=True)
def undrawn(request, monkeypatch):
    """Pictures take a fifth of a tiny run and have tests of their own: few runs draw them."""
    if request.function not in (test_end_to_end, test_homotopy_end_to_end):
        monkeypatch.setattr(job, "draw", lambda *_: {})


JOBS = {
    "causal-lm": (causal_lm, ["token_perplexity", "word_perplexity"]),
    "masked-lm": (masked_lm, ["accuracy", "cross_entropy"]),
    "text-classification": (text_classification, ["accuracy", "cross_entropy"]),
    "token-classification": (token_classification, ["accuracy", "cross_entropy"]),
    "image-classification": (image_classification, ["accuracy", "cross_entropy"]),
    "feature-extraction": (feature_extraction, ["cosine"]),
}


# every kind of content and of label once; together the others take long
QUICK = [("causal-lm", "share"), ("text-classification", "depth"), ("image-classification", "depth")]
QUICK += [("token-classification", "depth"), ("feature-extraction", "depth")]
RUNS = [
    pytest.param(task, mode, marks=() if (task, mode) in QUICK else pytest.mark.slow)
    for task in JOBS
    for mode in ("depth", "share")
]


@pytest.mark.parametrize(("task", "mode"), RUNS)
def test_end_to_end(tmp_path, capsys, task, mode):
    """Every task and mode gives a consistent checkpoint with processor, plan, results and card."""
    prepare, metrics = JOBS[task]
    words = [*prepare(tmp_path), "--fusion.mode", mode, "--fusion.similarity", "block_influence"]
    words += ["--fusion.effort", "medium"] if task == "causal-lm" else []
    assert main(words) == 0
    out = tmp_path / "out"
    assert not list(tmp_path.glob(".out*")), "a temporary directory was left behind"

    results = json.loads((out / "results.json").read_text())
    for stage in ("before", "fused", "healed"):
        assert {"parameters", "non_embedding_parameters", "bytes", "latency_ms", "metrics"} <= results[stage].keys()
        assert set(results[stage]["latency_ms"]) == {"1", "8"}
        assert set(metrics) <= results[stage]["metrics"].keys()
    assert results["healed"]["bytes"] == (out / "model.safetensors").stat().st_size
    assert results["fused"]["parameters"] < results["before"]["parameters"]
    assert results["heal"]["steps"] == 3
    compared = {f"{metrics[0]}_change_interval"} if metrics[0] != "cosine" else set()
    assert compared == {name for name in results["healed"]["metrics"] if name.endswith("_change_interval")}
    assert json.loads((out / "samples.json").read_text())["rows"] > 0

    model = AutoFusedModel.from_pretrained(out)
    assert model.num_parameters() == results["healed"]["parameters"]
    plan = Plan.load(out / "plan.json")
    assert plan.layout().is_stock == (mode == "depth")
    assert sum(len(edit.layers) - 1 for edit in plan.edits) == 2
    processor = ViTImageProcessorPil if task == "image-classification" else AutoTokenizer
    assert processor.from_pretrained(out)

    card = (out / "README.md").read_text()
    printed = capsys.readouterr().out
    for text in (f"{results['healed']['parameters']:,}", f"{results['before']['metrics'][metrics[0]]:.4g}"):
        assert text in card
        assert text in printed
    assert ("not make the model faster" in card) == (mode == "share")
    assert not machine_paths(card)
    files = files_named_by(card)
    assert {"plan.json", "results.json"} <= files
    assert all((out / file).is_file() for file in files), files


def collapsing(words: list[str]) -> list[str]:
    """The recipe of a run with two linear MLPs instead of a fusion."""
    path = Path(words[0])
    recipe = json.loads(path.read_text())
    del recipe["fusion"]
    path.write_text(json.dumps({**recipe, "collapse": {"count": 2}}))
    return words


@pytest.mark.parametrize(
    "task",
    ["causal-lm", *(pytest.param(f"{kind}-classification", marks=pytest.mark.slow) for kind in ("text", "image"))],
)
def test_collapse_end_to_end(tmp_path, task):
    """A collapse recipe gives a healed checkpoint whose plan, results and card describe the linear MLPs."""
    words = collapsing(JOBS[task][0](tmp_path))
    assert main(words) == 0
    out = tmp_path / "out"
    results = json.loads((out / "results.json").read_text())
    assert results["healed"]["parameters"] == results["fused"]["parameters"] < results["before"]["parameters"]
    model = AutoFusedModel.from_pretrained(out)
    assert model.num_parameters() == results["healed"]["parameters"]
    plan = Plan.load(out / "plan.json")
    assert [edit.edit for edit in plan.edits] == ["linearize"] * 2
    assert len(plan.notes.losses) == plan.num_layers
    assert all("r2" in row for row in plan.notes.refit.blocks if row["map"] == "linear map")
    card = (out / "README.md").read_text()
    for edit in plan.edits:
        assert f"| The MLP of layer {edit.layer} | becomes one linear map |" in card
    assert "layer-collapse" in card
    assert "import hf_layerfuse" in card


@pytest.mark.slow
@pytest.mark.usefixtures("steady")
def test_latency_end_to_end(tmp_path, capsys):
    """A recipe with a latency budget gives a faster, healed checkpoint with its latency; rounds are refused."""
    words = text_classification(tmp_path)
    out = tmp_path / "out"
    assert main([*words, "--fusion.latency_budget", "0.7"]) == 0
    plan = Plan.load(out / "plan.json")
    assert plan.edits
    times = plan.notes.latency_ms
    assert times.measured <= 1.02 * 0.7 * times.original
    results = json.loads((out / "results.json").read_text())
    assert results["healed"]["parameters"] < results["before"]["parameters"]
    assert AutoFusedModel.from_pretrained(out).num_parameters() == results["healed"]["parameters"]
    card = (out / "README.md").read_text()
    assert f"The whole model was measured at {times.measured / times.original:.0%}" in card
    assert main([*words, "--overwrite", "--fusion.latency_budget", "0.7", "--heal.schedule", "uniform"]) == 1
    assert "a latency target is met in one step" in capsys.readouterr().err


@pytest.mark.usefixtures("steady")
@pytest.mark.parametrize("method", [pytest.param("fitted", marks=pytest.mark.slow), "open"])
def test_merge_end_to_end(tmp_path, capsys, method):
    """A merge recipe gives a faster, healed checkpoint that lists its merged convolutions."""
    words = image_classification(tmp_path)
    shutil.rmtree(tmp_path / "model")
    torch.manual_seed(0)
    config = ResNetConfig(depths=[3, 2], hidden_sizes=[8, 16], embedding_size=8, layer_type="basic", num_labels=2)
    ResNetForImageClassification(config).save_pretrained(tmp_path / "model")
    ViTImageProcessorPil(size={"height": 40, "width": 40}).save_pretrained(tmp_path / "model")
    path = tmp_path / "recipe.yaml"
    recipe = json.loads(path.read_text())
    del recipe["fusion"]
    recipe["merge"] = {"latency_budget": 0.9, "latency_batch_size": 2, "latency_repeats": 3, "method": method}
    path.write_text(json.dumps(recipe))
    out = tmp_path / "out"
    words += ["--evaluate.retrain_original", "true", "--heal.hidden_weight", "1"]
    assert main([*words, "--merge.latency_budget", "0.01"]) == 1
    assert "the fastest available plan takes" in capsys.readouterr().err
    assert main(words) == 0
    plan = Plan.load(out / "plan.json")
    assert all(edit.edit == "merge" and edit.merged for edit in plan.edits)
    assert plan.notes.latency_ms.predicted <= 0.9 * plan.notes.latency_ms.original
    results = json.loads((out / "results.json").read_text())
    model = AutoFusedModel.from_pretrained(out)
    assert model.num_parameters() == results["healed"]["parameters"]
    assert results["original_retrained"]["heal"]["steps"] == results["heal"]["steps"]
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in model.resnet.embedder.modules())
    card = (out / "README.md").read_text()
    assert "layer-merge" in card
    assert "Changes to its 11 convolutions" in card
    assert "The whole model was measured" in card
    if method == "open":
        assert (
            main(
                [
                    *words,
                    "--output_dir",
                    str(tmp_path / "other"),
                    "--heal.steps",
                    "0",
                    "--evaluate.retrain_original",
                    "false",
                ]
            )
            == 1
        )
        assert "merges convolutions after healing" in capsys.readouterr().err


@pytest.mark.slow
def test_homotopy_end_to_end(tmp_path, capsys):
    """Activations become lines during healing, and maps are merged. As a regulariser, homotopy merges nothing."""
    words = [*collapsing(text_classification(tmp_path)), "--collapse.method", "homotopy", "--heal.steps", "6"]
    assert main([*words, "--collapse.threshold", "0.001"]) == 1
    assert "not a line yet: the activation of layer" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(words) == 0
    out = tmp_path / "out"
    results = json.loads((out / "results.json").read_text())
    assert results["healed"]["parameters"] < results["fused"]["parameters"] == results["before"]["parameters"] + 2
    assert all(a > 0.95 for a in results["heal"]["homotopy"][-1][1].values())
    plan = Plan.load(out / "plan.json")
    assert [edit.edit for edit in plan.edits] == ["linearize"] * 2
    assert [row.layer for row in plan.notes.homotopy] == [edit.layer for edit in plan.edits]
    assert all(0 <= row.relative_error < 0.05 and row.a > 0.95 for row in plan.notes.homotopy)
    assert (out / "homotopy.png").read_bytes().startswith(b"\x89PNG")
    assert "(homotopy.png)" in (out / "README.md").read_text()
    assert AutoFusedModel.from_pretrained(out).num_parameters() == results["healed"]["parameters"]
    more = ["--output_dir", str(tmp_path / "bent"), "--collapse.merge", "false", "--heal.homotopy_strength", "3"]
    assert main([*words, *more]) == 0
    results = json.loads((tmp_path / "bent" / "results.json").read_text())
    assert all(0 < a < 0.5 for a in results["heal"]["homotopy"][-1][1].values())
    assert [edit.edit for edit in Plan.load(tmp_path / "bent" / "plan.json").edits] == ["blend"] * 2
    assert AutoFusedModel.from_pretrained(tmp_path / "bent").num_parameters() == results["before"]["parameters"] + 2


LOW_MEMORY = ["--low_memory", "true", "--heal.steps", "0"]


@pytest.mark.parametrize(
    "task", [pytest.param(task, marks=() if task == "causal-lm" else pytest.mark.slow) for task in JOBS]
)
def test_low_memory_end_to_end(tmp_path, capsys, task):
    """A run that fuses layer by layer gives the figures of the run that loads the model."""
    prepare, metrics = JOBS[task]
    words = [*prepare(tmp_path), "--heal.steps", "0", "--fusion.refit", "linear"]
    assert main([*words, "--output_dir", str(tmp_path / "loaded"), "--evaluate.latency", "false"]) == 0
    capsys.readouterr()
    assert main([*words, *LOW_MEMORY]) == 0
    printed = capsys.readouterr().out
    out, loaded = ({**json.loads((tmp_path / name / "results.json").read_text())} for name in ("out", "loaded"))
    for stage in ("before", "fused"):
        for name in ("parameters", "non_embedding_parameters"):
            assert out[stage][name] == loaded[stage][name]
        assert out[stage]["metrics"][metrics[0]] == pytest.approx(loaded[stage]["metrics"][metrics[0]], rel=1e-3)
    assert f"{out['fused']['parameters']:,}" in printed
    assert Plan.load(tmp_path / "out" / "plan.json").edits == Plan.load(tmp_path / "loaded" / "plan.json").edits
    model = AutoFusedModel.from_pretrained(tmp_path / "out")
    assert model.num_parameters() == out["fused"]["parameters"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert all((tmp_path / "out" / file).is_file() for file in files_named_by(card))
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_low_memory_is_refused_where_it_cannot_be(tmp_path, capsys):
    """Healing, other methods, and settings that need the whole model are refused by name."""
    words = causal_lm(tmp_path)
    assert main([*words, "--low_memory", "true"]) == 1
    assert "heal.steps 0" in capsys.readouterr().err
    assert main([*words, *LOW_MEMORY, "--fusion.effort", "medium"]) == 1
    assert "needs the whole model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_recipe_has_one_method(tmp_path, capsys):
    """Two methods in one recipe, no method, and rounds of collapse are refused."""
    words = causal_lm(tmp_path)
    assert main([*words, "--collapse.count", "2"]) == 1
    assert "one method" in capsys.readouterr().err
    words = collapsing(words)
    assert main([*words, "--heal.schedule", "uniform"]) == 1
    assert "use schedule 'one-shot'" in capsys.readouterr().err
    assert main([*words, "--collapse.method", "homotopy", "--heal.steps", "0"]) == 1
    assert "heal.steps is 0" in capsys.readouterr().err
    assert main([*words, "--heal.homotopy_strength", "auto"]) == 1
    assert "use that, or leave it out" in capsys.readouterr().err
    assert main([*words, "--collapse.max_loss", "1e-12"]) == 1
    assert "allows no linear MLP" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_figures_are_those_of_the_file(tmp_path):
    """A float16 checkpoint stays float16, and results are measured with the rounded weights of the file."""
    words = text_classification(tmp_path)
    AutoFusedModel.from_pretrained(tmp_path / "model", dtype=torch.float16).save_pretrained(tmp_path / "model")
    assert main(words) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert AutoFusedModel.from_pretrained(tmp_path / "out").dtype == torch.float16
    assert results["before"]["bytes"] == pytest.approx(2 * results["before"]["parameters"], rel=0.3)
    # the same recipe on the result, without healing or fusing further than one layer, measures the result as `before`
    again = [*words, "--model", str(tmp_path / "out"), "--output_dir", str(tmp_path / "again"), "--heal.steps", "0"]
    assert main([*again, "--fusion.keep_layers", "3"]) == 0
    measured = json.loads((tmp_path / "again" / "results.json").read_text())
    low, high = results["healed"]["metrics"].pop("accuracy_change_interval")
    assert measured["before"]["metrics"] == results["healed"]["metrics"]
    assert low <= measured["before"]["metrics"]["accuracy"] - results["before"]["metrics"]["accuracy"] <= high
    assert "healed" not in measured


def test_never_overwrites_unasked(tmp_path, capsys):
    """A directory that is not empty is refused before any work, and replaced as a whole with --overwrite."""
    words = [*causal_lm(tmp_path), "--heal.steps", "0", "--evaluate.latency", "false"]
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    assert main(words) == 1
    message = capsys.readouterr().err
    assert "not empty" in message
    assert "--overwrite" in message
    assert "loading" not in message, "it was refused after work had begun"
    assert main([*words, "--overwrite"]) == 1, "what fuse.py did not write, it does not replace"
    assert [path.name for path in out.iterdir()] == ["precious.txt"]
    (out / "results.json").write_text("{}")
    assert main([*words, "--overwrite"]) == 0
    assert not (out / "precious.txt").exists()
    assert (out / "model.safetensors").exists()


def test_never_overwrites_its_inputs(tmp_path, capsys):
    """An output directory that contains the model or the data is refused, with or without --overwrite."""
    words = [*causal_lm(tmp_path), "--overwrite", "--output_dir"]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for place in (tmp_path, tmp_path / "model"):
        assert main([*words, str(place)]) == 1
        assert "holds the input" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_interrupted_while_saving(tmp_path, monkeypatch, capsys):
    """Ctrl-C during saving leaves the earlier content. Finished work is kept elsewhere until the same command
    completes."""
    words = [*causal_lm(tmp_path), "--heal.steps", "0", "--evaluate.latency", "false", "--overwrite"]
    out = tmp_path / "out"
    before = set(tmp_path.iterdir())

    def interrupt(*arguments, **more):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(job, "run_card", interrupt)
        assert main(words) == 130
        assert "the same command to resume" in capsys.readouterr().err
        assert [path.suffix for path in set(tmp_path.iterdir()) - before] == [".unfinished"]
        out.mkdir()
        (out / "results.json").write_text("old")
        assert main(words) == 130
    assert [path.name for path in out.iterdir()] == ["results.json"]
    assert (out / "results.json").read_text() == "old"
    assert main(words) == 0
    assert set(tmp_path.iterdir()) == {*before, out}


@pytest.mark.slow
@pytest.mark.parametrize("streaming", ["false", "true"])
def test_interrupted_while_healing(tmp_path, monkeypatch, interrupt, streaming):
    """A run interrupted in any step resumes without fusing again, and ends with the same file to the bit, also with
    streamed rows. With other data it starts afresh."""
    words = [*causal_lm(tmp_path), "--evaluate.latency", "false", "--heal.steps", "6", "--heal.eval_every", "2"]
    words += ["--data.streaming", streaming]
    assert main([*words, "--output_dir", str(tmp_path / "whole")]) == 0
    interruption = interrupt(4, KeyboardInterrupt)
    with monkeypatch.context() as patch:
        assert main(words) == 130
        patch.setattr(rounds, "_compress", lambda *arguments: pytest.fail("it fused again"))
        assert main(words) == 0
    assert interruption.passes == 4 + 4
    results = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert results[0] == results[1]
    figures = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "out")]
    for part in ("before", "fused", "healed"):
        assert figures[0][part]["metrics"] == figures[1][part]["metrics"]

    interruption = interrupt(4, KeyboardInterrupt)
    assert main([*words, "--output_dir", str(tmp_path / "other")]) == 130
    (tmp_path / "train.txt").write_text("\n".join(sentences(70, 1)) + "\n")
    assert main([*words, "--output_dir", str(tmp_path / "other")]) == 0
    assert interruption.passes == 4 + 6


@pytest.mark.parametrize(
    "task",
    [
        pytest.param("causal-lm", marks=pytest.mark.slow),
        "text-classification",
        pytest.param("token-classification", marks=pytest.mark.slow),
    ],
)
def test_the_teacher_is_asked_once(tmp_path, task):
    """With all classes cached, healing from cached teacher outputs equals healing from the teacher."""
    words = [*JOBS[task][0](tmp_path), "--evaluate.latency", "false", "--heal.mixed_precision", "no"]
    assert main([*words, "--output_dir", str(tmp_path / "asked")]) == 0
    assert main([*words, "--heal.teacher_top_k", "100"]) == 0
    losses = [
        json.loads((tmp_path / name / "results.json").read_text())["heal"]["train_loss"] for name in ("asked", "out")
    ]
    for (_, asked), (_, kept) in zip(*losses, strict=True):
        assert kept == pytest.approx(asked, rel=2e-3)


def test_answers_are_kept_for_other_runs(tmp_path, monkeypatch):
    """Cached teacher outputs are in the cache of `datasets`. The same teacher does not run again for the same windows;
    another teacher does."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    windows = {"input_ids": torch.randint(3, 64, (6, 8), generator=torch.Generator().manual_seed(0)).tolist()}
    asked = []

    def answers(seed):
        teacher = tiny_model("gpt2", "GPT2LMHeadModel", seed=seed)
        teacher.register_forward_hook(lambda *_: asked.append(seed))

        def collate(rows):
            return {"input_ids": torch.tensor([row["input_ids"] for row in rows])}

        settings = {"top_k": 5, "temperature": 1.0, "batch_size": 4}
        return with_teacher(datasets.Dataset.from_dict(windows), teacher, collate, **settings)

    first, again, other = answers(0), answers(0), answers(1)
    assert asked == [0, 0, 1, 1]
    assert [file["filename"].startswith(str(tmp_path)) for file in again.cache_files] == [True]
    assert (first[0]["teacher_logprobs"] == again[0]["teacher_logprobs"]).all()
    assert (first[0]["teacher_logprobs"] != other[0]["teacher_logprobs"]).any()


@pytest.mark.parametrize("words", [["--fusion.operator", "mix", "--heal.mix", "true"], ["--heal.freeze_fused", "true"]])
def test_variants_of_healing(tmp_path, words):
    """Fused weights stay mixed, or stay frozen, until the end of a run."""
    words = [*causal_lm(tmp_path), *words, "--fusion.mode", "share", "--evaluate.latency", "false"]
    words += ["--fusion.refit", "none", "--heal.weight_decay", "0", "--heal.learning_rate", "1e-2"]
    assert main(words) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["healed"]["metrics"]["nll"] < results["fused"]["metrics"]["nll"]
    plan = Plan.load(tmp_path / "out" / "plan.json")
    original, model = (AutoFusedModel.from_pretrained(tmp_path / name) for name in ("model", "out"))
    before = apply(original, plan).state_dict()
    fused = fused_parameters(model, plan)
    same = {name for name, value in model.named_parameters(remove_duplicate=False) if torch.equal(value, before[name])}
    assert same == (fused if "--heal.freeze_fused" in words else set())


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_model_and_data_by_their_names_on_the_hub(tmp_path, streaming):
    """A model and data from a Hub give the same result as the same files on disk; an unknown name is an error."""
    words = causal_lm(tmp_path)
    words += ["--data.streaming", str(streaming).lower(), "--heal.mixed_precision", "no"]
    assert main([*words, "--output_dir", str(tmp_path / "local")]) == 0
    folder = tmp_path / "hub" / "datasets" / "some" / "lines"
    folder.mkdir(parents=True)
    for split in ("train", "validation", "test"):
        shutil.copy(tmp_path / f"{split}.txt", folder)
    (tmp_path / "hub" / "models" / "some").mkdir(parents=True)
    shutil.copytree(tmp_path / "model", tmp_path / "hub" / "models" / "some" / "gpt2")
    named = ["--model", "some/gpt2", "--data.name", "some/lines", "--output_dir", str(tmp_path / "out")]
    for split in ("train", "validation", "test"):
        named += [f"--data.{split}", split]
    with hub(tmp_path / "hub") as site:
        own = {
            "HF_ENDPOINT": site.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
        }
        own["HF_DATASETS_CACHE"] = str(tmp_path / "home" / "datasets")

        def run(*more: str) -> subprocess.CompletedProcess:
            command = [sys.executable, str(ROOT / "fuse.py"), *words, *named, *more]
            return subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True)

        wrong = run("--data.name", "some/pages")
        assert wrong.returncode != 0
        assert "some/pages" in wrong.stderr
        assert "Traceback" not in wrong.stderr
        assert not (tmp_path / "out").exists()
        right = run()
    assert right.returncode == 0, right.stderr
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("local", "out")]
    assert files[0] == files[1]
    assert AutoFusedModel.from_pretrained(tmp_path / "out").config.num_hidden_layers == 4


@pytest.mark.slow
def test_killed_at_any_moment_and_started_again(tmp_path):
    """A `fuse.py` that is killed repeatedly, at any moment, ends with the file of an undisturbed run."""
    words = [*causal_lm(tmp_path), "--evaluate.latency", "false", "--fusion.keep_layers", "2", "--heal.steps", "60"]
    words += ["--heal.schedule", "uniform", "--heal.rounds", "2", "--heal.eval_every", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(name: str) -> subprocess.Popen:
        command = [sys.executable, str(ROOT / "fuse.py"), *words, "--output_dir", str(tmp_path / name)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    began = time.monotonic()
    assert start("whole").wait() == 0
    whole, rng, killed = time.monotonic() - began, random.Random(0), 0
    while not (tmp_path / "out").exists():
        process = start("out")
        with contextlib.suppress(subprocess.TimeoutExpired):
            # early, so that a faster machine is also killed in time
            share = rng.uniform(0.3, 1.0) if killed else 0.3
            process.wait(timeout=None if killed == 6 else share * whole)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            killed += 1
        assert process.wait() in (0, -signal.SIGKILL)
    assert killed >= 1
    assert not list(tmp_path.glob(".out*")), "something of the killed processes was left behind"
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert files[0] == files[1]


def test_the_original_is_retrained_by_the_same_rule(tmp_path, capsys):
    """It takes the same steps, and keeps the one of the lowest validation loss: step 0, if training only harms."""
    words = [*causal_lm(tmp_path), "--evaluate.retrain_original", "true", "--heal.hidden_weight", "1"]
    words += ["--heal.eval_every", "1", "--heal.learning_rate", "0.1"]
    assert main(words) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    retrained = results["original_retrained"]
    assert retrained["heal"]["steps"] == results["heal"]["steps"]
    losses = dict(retrained["heal"]["validation_loss"])
    assert len(losses) == 4
    assert retrained["heal"]["best_step"] == min(losses, key=losses.get) == 0
    unchanged = {"token_perplexity_change_interval": [0.0, 0.0]}
    assert retrained["metrics"] == results["before"]["metrics"] | unchanged
    assert retrained["bytes"] == results["before"]["bytes"]
    assert retrained["latency_ms"] == results["before"]["latency_ms"]
    assert "original, retrained" in capsys.readouterr().out
    assert "original, retrained" in (tmp_path / "out" / "README.md").read_text()


def test_low_rank_healing(tmp_path):
    """`fuse.py` trains residuals and merges them: the result keeps its number of parameters, and the embeddings of the
    original."""
    words = [*causal_lm(tmp_path), "--evaluate.latency", "false"]
    words += ["--heal.lora_rank", "2", "--heal.learning_rate", "0.01"]
    assert main(words) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["healed"]["parameters"] == results["fused"]["parameters"]
    assert results["healed"]["metrics"]["nll"] < results["fused"]["metrics"]["nll"]
    original, model = (AutoFusedModel.from_pretrained(tmp_path / name) for name in ("model", "out"))
    assert torch.equal(model.transformer.wte.weight, original.transformer.wte.weight)


@pytest.mark.slow
def test_rounds_of_rank_auto(tmp_path):
    """Each round removes its part of the ratio, with the rank that follows from it."""
    words = [*causal_lm(tmp_path), "--evaluate.latency", "false", "--fusion.keep_layers", "null"]
    words += ["--fusion.ratio", "0.6", "--fusion.mode", "share", "--fusion.rank", "auto"]
    words += ["--heal.schedule", "uniform", "--heal.rounds", "2", "--heal.steps", "4", "--heal.eval_every", "1"]
    assert main(words) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [r["ratio"] for r in results["rounds"]] == [0.3, 0.6]
    model, original = (AutoFusedModel.from_pretrained(tmp_path / name) for name in ("out", "model"))
    left, whole = (sum(p.numel() for p in of.transformer.h.parameters()) for of in (model, original))
    assert left <= 0.4 * whole
    assert main([*words, "--fusion.ratio", "null", "--fusion.max_parameters", "9e4", "--overwrite", "true"]) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "schedule", "goals"),
    [("depth", "uniform", [4, 2]), ("share", "uniform", [4, 2]), ("depth", "exponential", [3, 2])],
)
def test_fused_in_rounds(tmp_path, interrupt, mode, schedule, goals):
    """An iterative schedule alternates fusing and healing. Interrupted in a later round, it resumes there and ends with
    the same file."""
    words = [*causal_lm(tmp_path), "--evaluate.latency", "false", "--fusion.keep_layers", "2", "--fusion.mode", mode]
    words += ["--heal.schedule", schedule, "--heal.rounds", "2", "--heal.steps", "4", "--heal.eval_every", "1"]
    words += ["--heal.hidden_weight", "1", "--heal.attention_weight", "1"]  # of the layers that both rounds made
    assert main([*words, "--output_dir", str(tmp_path / "whole")]) == 0
    results = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert [(r["keep_layers"], r["steps"]) for r in results["rounds"]] == [(goal, 2) for goal in goals]
    plan = Plan.load(tmp_path / "whole" / "plan.json")
    assert len(plan.notes.rounds) == 2
    assert sum(len(edit.layers) - 1 for edit in plan.edits) == 4
    assert plan.num_layers == 6
    model = AutoFusedModel.from_pretrained(tmp_path / "whole")
    assert model.num_parameters() == results["healed"]["parameters"] < results["before"]["parameters"]

    interruption = interrupt(4, KeyboardInterrupt)
    assert main(words) == 130
    assert main(words) == 0
    assert interruption.passes == 4 + 1
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "./nowhere"], "there is no directory './nowhere'"),
        (["--fusion.keep_layer", "3"], "Did you mean --fusion.keep_layers?"),
        (["--fusion.keep_layers", "7"], "--fusion.keep_layers=7 of the model's 6"),
        (["--data.train", "missing.txt"], "no such file"),
        (["--data.text_column", "sentence"], "no column 'sentence'"),
        (["--data.train", "EMPTY"], "cannot be loaded, or is empty"),
        (["--data.config", "wikitext-2"], "--data.name is not set"),
        (["--task", "text-classification"], "lacks weights"),
        (["--evaluate.retrain_original", "true", "--heal.steps", "0"], "which is 0: use more, or"),
        (["--surprise"], "--surprise is not an option"),
        (["surprise"], "not an option"),
    ],
)
def test_bad_input(tmp_path, capsys, words, message):
    """Each mistake ends with exit code 1, one clear line, and no output directory."""
    (tmp_path / "empty.txt").write_text("")
    words = [str(tmp_path / "empty.txt") if word == "EMPTY" else word for word in words]
    assert main([*causal_lm(tmp_path), *words]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("fuse.py: ")
    assert message in error
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_said_in_words(tmp_path, monkeypatch, capsys):
    """If the result cannot be written, nothing of it is left, and the same command resumes once there is space."""
    words = [*causal_lm(tmp_path), "--evaluate.latency", "false"]

    def fill(model, dtype, path, **more):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(job, "save_weights", fill)
        assert main(words) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("fuse.py: ")
    assert "No space left on device" in error
    assert "the same command to resume" in error
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out-*.partial"))
    assert main(words) == 0


def test_recipe_comes_first(tmp_path, capsys):
    """An option before the recipe would take the recipe as its value, so it is refused."""
    assert main(["--heal.steps", "0", *causal_lm(tmp_path)]) == 1
    assert "the recipe comes first" in capsys.readouterr().err


def test_missing_tokenizer(tmp_path, capsys):
    """transformers makes an empty tokenizer from a config; results on its tokens would be meaningless."""
    words = text_classification(tmp_path)
    for path in (tmp_path / "model").glob("token*"):
        path.unlink()
    assert main(words) == 1
    assert "has no tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        pytest.param(lambda i: i % 3, "labels from 0 to 2", id="ids"),
        pytest.param(lambda i: "abc"[i % 3], "set id2label", id="names"),
    ],
)
def test_more_classes_than_the_model_has(tmp_path, capsys, labels, message):
    """Data with three classes and a model with two are refused before any computation."""
    words = text_classification(tmp_path)
    rows = [f"{text}\t{labels(i)}" for i, text in enumerate(sentences(60, 0))]
    (tmp_path / "train.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n")
    assert (
        main([*words, "--data.test", str(tmp_path / "train.tsv"), "--data.validation", str(tmp_path / "train.tsv")])
        == 1
    )
    error = capsys.readouterr().err
    assert message in error
    assert "planning" not in error


def test_overrides():
    """Values are YAML, with and without an equals sign."""
    words = ["--heal.steps", "0", "--data.name=null", "--model", "a/b", "--heal.learning_rate", "1e-4", "--x.y=a=b"]
    assert parse_overrides(words) == {
        "heal.steps": 0,
        "data.name": None,
        "model": "a/b",
        "heal.learning_rate": "1e-4",  # YAML 1.1 reads this as text; the recipe takes it for a number
        "x.y": "a=b",
    }
    for wrong in (["steps", "3"], ["--steps"], ["--steps", "--other"], ["--steps", "[1"]):
        with pytest.raises(RecipeError):
            parse_overrides(wrong)


MODELS = {  # tiny versions of the models in the shipped recipes
    "gpt2-wikitext2": ("gpt2", "GPT2LMHeadModel", {"n_layer": 12}),
    "bert-sst2": ("bert", "BertForSequenceClassification", {"num_hidden_layers": 12}),
    "latency-bert-sst2": ("bert", "BertForSequenceClassification", {"num_hidden_layers": 4}),
    "vit-cifar10": ("vit", "ViTForImageClassification", {"num_hidden_layers": 12}),
    "demo": ("gpt2", "GPT2LMHeadModel", {"n_layer": 6}),
    "collapse-bert-sst2": ("bert", "BertForSequenceClassification", {"num_hidden_layers": 12}),
}


def test_shipped_recipes_are_valid():
    """Every recipe can be read; the tests of their runs are slow, but for two."""
    for path in (ROOT / "recipes").glob("*.yaml"):
        load_recipe(path, {})


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(
            path, id=path.stem, marks=() if path.stem in ("gpt2-wikitext2", "vit-cifar10") else pytest.mark.slow
        )
        for path in sorted((ROOT / "recipes").glob("*.yaml"))
    ],
)
def test_shipped_recipes(path, request, tmp_path, monkeypatch):
    """Every shipped recipe can be parsed and overridden, and gives a plan for a model of its depth."""
    recipe = load_recipe(path, {"heal.learning_rate": "1e-4", "output_dir": "elsewhere"})
    if recipe.fusion:
        recipe.fusion.effort = "low"
    assert recipe.heal.learning_rate == 1e-4
    assert recipe.output_dir == "elsewhere"
    request.getfixturevalue("steady")
    monkeypatch.chdir(tmp_path)
    if recipe.merge:
        model = copy.deepcopy(network("bottleneck")).float()
        small = merge(model, dataclasses.replace(recipe.merge, latency_budget=0.95), batches=[dummy_inputs(model)])
    else:
        model_type, head, changes = MODELS[path.stem]
        model = tiny_model(model_type, head, **changes)
        compress = fuse if recipe.fusion else collapse
        small = compress(model, recipe.fusion or recipe.collapse, batches=[dummy_inputs(model)])
    assert small.num_parameters() < model.num_parameters()


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_accelerate_configs(path):
    """Accelerate reads every shipped configuration, each is for several GPUs, and the page about running names it."""
    config = load_config_from_file(str(path))
    assert config.num_processes == 4
    assert config.distributed_type.lower().replace("_", "-") in path.stem
    if path.stem == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
    assert f"recipes/accelerate/{path.name}" in path.read_text()
    assert f"recipes/accelerate/{path.name}" in (ROOT / "docs" / "running.md").read_text()


@pytest.mark.slow
def test_under_accelerate_launch(tmp_path):
    """The command of the README works in its own process."""
    words = [*causal_lm(tmp_path), "--evaluate.latency", "false"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", str(ROOT / "fuse.py")]
    subprocess.run([*launch, *words], check=True, env=environment, cwd=tmp_path)
    assert json.loads((tmp_path / "out" / "results.json").read_text())["heal"]["num_processes"] == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("causal-lm", ["--heal.teacher_top_k", "8"]),
        ("masked-lm", []),
        ("text-classification", ["--data.streaming", "true"]),
        ("image-classification", ["--data.augment", "true"]),
        ("text-classification", ["--collapse.method", "homotopy", "--heal.steps", "6"]),
    ],
)
def test_two_processes_share_the_work(tmp_path, task, options):
    """Rows, masked words and augmentation are the same with two processes. With a batch each, they equal one process
    with two batches per step, and agree on the result."""
    words = JOBS[task][0](tmp_path)
    if "homotopy" in options:
        collapsing(words)
    words += [*options, "--evaluate.latency", "false", "--heal.mixed_precision", "no"]
    words += ["--heal.batch_size", "4", "--heal.eval_every", "1"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    for count, name, accumulated in (("1", "one", "2"), ("2", "two", "1")):
        own = ["--output_dir", str(tmp_path / name), "--heal.gradient_accumulation_steps", accumulated]
        subprocess.run([*torchrun, count, str(ROOT / "fuse.py"), *words, *own], check=True, env=environment)
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    assert two["heal"]["num_processes"] == 2
    assert two["heal"]["distributed_type"] == "MULTI_CPU"
    assert one["fused"]["metrics"] == two["fused"]["metrics"]
    for history in ("train_loss", "validation_loss"):
        losses, expected = ([loss for _, loss in results["heal"][history]] for results in (two, one))
        assert losses == pytest.approx(expected, rel=1e-4)
    for (_, ours), (_, theirs) in zip(two["heal"]["homotopy"], one["heal"]["homotopy"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert bool(two["heal"]["homotopy"]) == ("homotopy" in options)
    assert verify(AutoFusedModel.from_pretrained(tmp_path / "two"))["reload"] == 0


def test_a_padding_token_beyond_the_embeddings_is_refused(tmp_path, capsys):
    """A new padding token is the usual recipe for GPT-2; its row in the embeddings is often forgotten."""
    words = text_classification(tmp_path)
    save_text_model(tmp_path / "model", "BertForSequenceClassification", vocab_size=63)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.pad_token = "<unk>"
    tokenizer.save_pretrained(tmp_path / "model")
    assert main(words) == 1
    error = capsys.readouterr().err
    assert "the tokenizer, for padding, has the token id 63, and the model has 63 token embeddings" in error
