"""Help and a plain import load no heavy library, and the Auto classes still know fused models."""

import importlib.metadata
import os
import pickle
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import tiny_model
from runs import causal_lm

import hf_layerfuse
from hf_layerfuse import AutoFusedModel, FusionRecipe, fuse
from hf_layerfuse.cli import main, run
from hf_layerfuse.math.similarity import ON_ACTIVATIONS, ON_WEIGHTS

ROOT = Path(hf_layerfuse.__file__).parents[1]
HEAVY = ("torch", "transformers", "accelerate", "datasets", "scipy", "matplotlib")


def python(code: str) -> str:
    """Output of code in a new process."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("main", ["--help"]),
        ("main", ["run", "--help"]),
        ("main", ["inspect", "--help"]),
        ("main", ["adapt", "--help"]),
        ("main", ["plan", "--help"]),
        ("main", ["report", "--help"]),
        ("main", ["--print-completion", "bash"]),
        ("run", ["--help"]),
    ],
)
def test_help_is_light(function, words) -> None:
    """Help and completion import the parser and the recipes, and no library that computes."""
    printed = python(
        "import contextlib, sys\n"
        f"from hf_layerfuse.cli import {function}\n"
        "with contextlib.suppress(SystemExit):\n"
        f"    {function}({words})\n"
        f"print('HEAVY', [name for name in {HEAVY} if name in sys.modules])"
    )
    assert len(printed) > 300
    assert printed.splitlines()[-1] == "HEAVY []"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "--help"], "usage: hf-layerfuse run"),
        (["adapt", "--help"], "usage: hf-layerfuse adapt"),
        (["--help"], "usage: accelerate launch fuse.py"),
        (["recipe.yaml", "--help"], "usage: accelerate launch fuse.py"),
        (["dance"], "invalid choice: 'dance'"),
    ],
)
def test_the_module_takes_commands_and_recipes(words, said, monkeypatch, capsys) -> None:
    """`python -m hf_layerfuse` is `hf-layerfuse`, or `fuse.py` if a recipe or an option comes first."""
    monkeypatch.setattr(sys, "argv", ["hf_layerfuse", *words])
    with pytest.raises(SystemExit):
        runpy.run_module("hf_layerfuse", run_name="__main__")
    assert said in "".join(capsys.readouterr())


def test_run_is_fuse_py(tmp_path, capsys) -> None:
    """`hf-layerfuse run` and `fuse.py` have the same options and the same error messages."""
    texts = []
    for command, words in ((main, ["run"]), (run, [])):
        with pytest.raises(SystemExit):
            command([*words, "--help"])
        texts.append(capsys.readouterr().out)
    options = [text[text.index("\npositional arguments") :] for text in texts]
    assert options[0] == options[1]
    for wrong in (["--heal.steps", "0", "x.yaml"], [str(tmp_path / "absent.yaml")], ["x.yaml", "word"]):
        messages = []
        for command, words in ((main, ["run"]), (run, [])):
            assert command([*words, *wrong]) == 1
            messages.append(capsys.readouterr().err.replace("hf-layerfuse run", "fuse.py"))
        assert messages[0] == messages[1]
        assert messages[0].startswith("fuse.py: ")


@pytest.mark.usefixtures("fresh_accelerate")
def test_run_reads_a_recipe(tmp_path, capsys) -> None:
    """A recipe that can be read gets as far as its model, under both names, and a mistake is one line."""
    words = [*causal_lm(tmp_path), "--model", "./nowhere"]
    capsys.readouterr()
    for command, own in ((main, ["run"]), (main, ["plan"]), (run, [])):
        assert command([*own, *words]) == 1
        step, message = capsys.readouterr().err.splitlines()
        assert step.endswith("loading ./nowhere")
        assert "there is no directory './nowhere'" in message


def test_version(capsys) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"hf-layerfuse {importlib.metadata.version('hf-layerfuse')}\n"


def test_dashes_are_underscores(tmp_path, capsys) -> None:
    """Options have either, also in sections; values keep their dashes."""
    tiny_model("gpt2").config.save_pretrained(tmp_path)
    shown = []
    for option in ("--keep_layers", "--keep-layers"):
        assert main(["plan", str(tmp_path), option, "3"]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    assert run([str(tmp_path / "no-such.yaml"), "--heal.batch-size=4", "--output-dir", "a-b"]) == 1
    assert "no-such.yaml" in capsys.readouterr().err


def test_similarities_in_the_help(capsys) -> None:
    """The parser takes the similarities from the recipe, and all of them can be computed."""
    with pytest.raises(SystemExit):
        main(["inspect", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "{" + ",".join([*ON_WEIGHTS, *ON_ACTIVATIONS]) + "}" in text
    assert "These compare activations and need --text: " + ", ".join(ON_ACTIVATIONS) in text


def test_import_is_light() -> None:
    """The package is imported without heavy libraries; recipes and plans do not need torch."""
    code = f"import sys, hf_layerfuse; print([name for name in {HEAVY} if name in sys.modules])"
    assert python(code) == "[]\n"
    code = "import sys; from hf_layerfuse import FusionRecipe, Plan, PlanError; print('torch' in sys.modules)"
    assert python(code) == "False\n"


def test_names() -> None:
    """Every public name can be imported, `*` imports all, and an unknown name is an AttributeError."""
    for name in hf_layerfuse.__all__:
        assert getattr(hf_layerfuse, name).__module__.startswith("hf_layerfuse."), name
    space: dict[str, object] = {}
    exec("from hf_layerfuse import *", space)
    assert space.keys() >= set(hf_layerfuse.__all__)
    assert set(hf_layerfuse.__all__) <= set(dir(hf_layerfuse))
    assert "fuse" in hf_layerfuse.__all__
    with pytest.raises(AttributeError, match="unknown"):
        hf_layerfuse.unknown  # noqa: B018


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("fused")
    fuse(tiny_model("gpt2", "GPT2LMHeadModel"), FusionRecipe(keep_layers=4, mode="share")).save_pretrained(path)
    return path


@pytest.mark.parametrize(
    "code",
    [
        "from transformers import AutoModelForCausalLM as Auto; import hf_layerfuse",
        pytest.param(
            "import hf_layerfuse; from transformers import AutoModelForCausalLM as Auto", marks=pytest.mark.slow
        ),
        pytest.param("import hf_layerfuse; from transformers import AutoConfig as Auto", marks=pytest.mark.slow),
        pytest.param(
            "import hf_layerfuse.evaluation.dummy_inputs; from transformers import AutoModel as Auto",
            marks=pytest.mark.slow,
        ),
        pytest.param("from hf_layerfuse import AutoFusedModel as Auto", marks=pytest.mark.slow),
    ],
)
def test_fused_checkpoints_load_in_a_fresh_process(checkpoint, code) -> None:
    """The Auto classes know fused models, in either order of importing the two libraries."""
    assert "FusedGPT2" in python(f"{code}; print(type(Auto.from_pretrained({str(checkpoint)!r})).__name__)")


@pytest.mark.slow
def test_a_fused_model_is_unpickled_in_a_fresh_process(checkpoint) -> None:
    """A pickle names the class by its module, and importing the module registers the fused classes."""
    path = checkpoint / "model.pickle"
    path.write_bytes(pickle.dumps(AutoFusedModel.from_pretrained(checkpoint)))
    code = f"import pickle, pathlib; print(type(pickle.loads(pathlib.Path({str(path)!r}).read_bytes())).__name__)"
    assert "FusedGPT2LMHeadModel" in python(code)
