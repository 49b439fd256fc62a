"""Published results can be loaded from a Hub, and nothing is published partially. These tests use the real client."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT
from hub import TOKEN, Hub, hub
from huggingface_hub import ModelCard
from runs import causal_lm

from hf_layerfuse import RecipeError
from hf_layerfuse.recipe import HubRecipe


@pytest.fixture
def site(tmp_path):
    with hub(tmp_path / "hub") as found:
        yield found


def python(site: Hub, home: Path, *command: str, token: str | None = TOKEN) -> subprocess.CompletedProcess:
    """Run Python in a new process with this Hub and this login."""
    own = {"HF_ENDPOINT": site.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home / "home")}
    environment = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"} | own
    environment |= {"HF_TOKEN": token} if token else {}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, cwd=ROOT)


LOAD = """
import sys, torch
from hf_layerfuse import AutoFusedModel
model = AutoFusedModel.from_pretrained(sys.argv[1], **dict(word.split("=") for word in sys.argv[2:]))
print("SUM", f"{model(torch.arange(8)[None]).logits.double().sum().item():.9f}")
"""


@pytest.mark.slow
def test_a_run_is_published_and_comes_back(tmp_path, site) -> None:
    """One commit holds checkpoint, tokenizer, plan, results and card, on a branch of a private repository. Users
    without access get a clear error. The token appears nowhere."""
    words = [*causal_lm(tmp_path), "--evaluate.latency", "false", "--heal.steps", "2"]
    named = ["--push_to_hub", "someone/small", "--private", "--revision", "v1"]
    nobody = python(site, tmp_path, "fuse.py", *words, *named, token=None)
    assert nobody.returncode == 1
    assert "nobody is logged in: run `hf auth login`" in nobody.stderr
    assert not (tmp_path / "out").exists()
    done = python(site, tmp_path, "fuse.py", *words, *named)
    assert done.returncode == 0, done.stderr
    repository = site.repositories["models", "someone/small"]
    assert repository.private
    assert len(repository.commits) == 2  # the first one is that of an empty repository
    files = repository.files("v1")[1]
    local = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert local.pop("samples.json")
    assert "samples.json" not in files, "rows of the data were published"
    assert local.items() <= files.items()
    assert {"model.safetensors", "config.json", "tokenizer.json", "plan.json", "results.json", "README.md"} <= set(
        local
    )
    assert "model.safetensors" not in repository.files("main")[1]
    assert 'from_pretrained("someone/small", revision="v1")' in local["README.md"].decode()
    for text in (done.stdout, done.stderr, *(content.decode(errors="replace") for content in local.values())):
        assert TOKEN not in text
    back = python(site, tmp_path, "-c", LOAD, "someone/small", "revision=v1")
    same = python(site, tmp_path, "-c", LOAD, str(tmp_path / "out"))
    assert "SUM" in back.stdout, back.stderr
    assert back.stdout == same.stdout
    hidden = python(site, tmp_path / "elsewhere", "-c", LOAD, "someone/small", "revision=v1", token=None)
    assert "CheckpointError: cannot load a model from 'someone/small'" in hidden.stderr


ANYWHERE = """
import sys
sys.modules["hf_layerfuse"] = None  # which is what an import finds where it is not installed
import torch, transformers
generate = transformers.pipeline("text-generation", model=sys.argv[1], trust_remote_code=True)
assert type(generate.model).__module__.startswith("transformers_modules.")
assert generate("w3 w4", max_new_tokens=3, do_sample=False)[0]["generated_text"].startswith("w3 w4")
print("SUM", f"{generate.model(torch.arange(8)[None]).logits.double().sum().item():.9f}")
"""


@pytest.mark.slow
def test_what_is_published_with_its_code_runs_anywhere(tmp_path, site) -> None:
    """The original comes from the Hub with its licence, and the result runs in `pipeline` without this library."""
    words = [*causal_lm(tmp_path), "--evaluate.latency", "false", "--heal.steps", "0", "--fusion.mode", "share"]
    base = tmp_path / "hub" / "models" / "someone" / "base"
    base.parent.mkdir(parents=True)
    shutil.move(tmp_path / "model", base)
    (base / "README.md").write_text("---\nlicense: mit\n---\n\n# A model\n")
    words += ["--model", "someone/base", "--with_code", "--push_to_hub", "someone/small"]
    done = python(site, tmp_path, "fuse.py", *words)
    assert done.returncode == 0, done.stderr
    files = site.repositories["models", "someone/small"].files("main")[1]
    card = ModelCard(files["README.md"].decode())
    assert (card.data.license, card.data.base_model) == ("mit", "someone/base")
    assert 'from_pretrained("someone/small", trust_remote_code=True)' in card.content
    assert "layerfuse/layerfuse_models_modeling.py" in files
    ours = python(site, tmp_path, "-c", LOAD, "someone/small")
    theirs = python(site, tmp_path / "elsewhere", "-c", ANYWHERE, "someone/small")
    assert "SUM" in theirs.stdout, theirs.stderr
    assert theirs.stdout.splitlines()[-1] == ours.stdout.splitlines()[-1]


PUBLISH = """
import sys
from pathlib import Path
from hf_layerfuse.errors import PublishError
from hf_layerfuse.pipeline.report.hub import check_publish, publish
from hf_layerfuse.recipe import HubRecipe
recipe = HubRecipe(push_to_hub=sys.argv[1], private="private" in sys.argv[3:])
try:
    if "unchecked" not in sys.argv[3:]:
        check_publish(recipe)
    print("DONE", publish(Path(sys.argv[2]), recipe, "a model"))
except PublishError as error:
    print("REFUSED", error)
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    found = tmp_path / "result"
    found.mkdir()
    (found / "model.safetensors").write_bytes(bytes(range(256)) * 4096)
    (found / "config.json").write_text("{}")
    (found / "README.md").write_text("---\ntags:\n- model-compression\n---\n\n# A model\n")
    return found


@pytest.mark.slow
def test_a_result_that_could_not_be_published_is_by_the_command_that_the_error_names(tmp_path, site) -> None:
    """The result is complete, and the command in the error publishes it to the requested repository, with the requested
    privacy."""
    words = [*causal_lm(tmp_path), "--evaluate.latency", "false", "--heal.steps", "0"]
    site.drops["create"] = 1
    failed = python(site, tmp_path, "fuse.py", *words, "--push_to_hub", "someone/late", "--private", "--revision", "v1")
    assert failed.returncode == 1
    assert not site.repositories
    [command] = re.findall(r"`(hf upload .*?)` publishes it", failed.stderr)
    program, *rest = shlex.split(command)
    done = python(site, tmp_path, str(Path(sys.executable).with_name(program)), *rest)
    assert done.returncode == 0, done.stdout + done.stderr
    repository = site.repositories["models", "someone/late"]
    assert repository.private
    local = {path.name for path in (tmp_path / "out").iterdir()}
    assert local - set(repository.files("v1")[1]) == {"samples.json"}
    assert "model.safetensors" not in repository.files("main")[1]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["upload", "commit", "batch"])
def test_a_connection_that_drops_leaves_nothing(tmp_path, site, folder, what) -> None:
    """If the connection drops during a file or a commit, the earlier content stays, and a second try succeeds."""
    first = python(site, tmp_path, "-c", PUBLISH, "someone/small", str(folder))
    assert "DONE" in first.stdout, first.stdout + first.stderr
    repository = site.repositories["models", "someone/small"]
    before = dict(repository.branches)
    (folder / "model.safetensors").write_bytes(bytes(range(255)) * 4096)
    site.drops[what] = 100
    dropped = python(site, tmp_path, "-c", PUBLISH, "someone/small", str(folder))
    assert site.drops[what] < 100
    assert "REFUSED" in dropped.stdout
    assert "try again" in dropped.stdout
    assert repository.branches == before
    site.drops.clear()
    again = python(site, tmp_path, "-c", PUBLISH, "someone/small", str(folder))
    assert "DONE" in again.stdout, again.stdout + again.stderr
    assert repository.files("main")[1]["model.safetensors"] == (folder / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_repository_that_is_there(tmp_path, site, folder) -> None:
    """An existing repository keeps unrelated files, and has no old weights beside new ones."""
    there = tmp_path / "hub" / "models" / "someone" / "small"
    there.mkdir(parents=True)
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "notes.txt", "config.json"):
        (there / name).write_text("of before")
    done = python(site, tmp_path, "-c", PUBLISH, "someone/small", str(folder))
    assert "DONE" in done.stdout, done.stdout + done.stderr
    files = site.repositories["models", "someone/small"].files("main")[1]
    assert set(files) == {"model.safetensors", "config.json", "README.md", "notes.txt"}
    assert files["config.json"] == b"{}"


@pytest.mark.slow
def test_what_is_to_be_private_never_becomes_public(tmp_path, site, folder) -> None:
    """If a public repository exists, a private result is not published, whether this is found before or after the
    run."""
    for how in ("unchecked", "checked"):
        assert "DONE" in python(site, tmp_path, "-c", PUBLISH, "someone/small", str(folder)).stdout
        before = dict(site.repositories["models", "someone/small"].branches)
        refused = python(site, tmp_path, "-c", PUBLISH, "someone/small", str(folder), "private", how)
        assert "exists and is public" in refused.stdout, refused.stdout + refused.stderr
        assert site.repositories["models", "someone/small"].branches == before


@pytest.mark.slow
def test_what_cannot_be_published_is_said_before_the_work(tmp_path, site, folder) -> None:
    for name, token, reason in (
        ("another/small", TOKEN, "the logged-in user someone can write only to someone"),
        ("someone/small", "hf_of_nobody", "the Hub answers 401. Run `hf auth login`"),
        ("someone/small", None, "nobody is logged in"),
    ):
        refused = python(site, tmp_path, "-c", PUBLISH, name, str(folder), token=token)
        assert reason in refused.stdout, refused.stdout + refused.stderr
        assert "hf_of" not in refused.stdout + refused.stderr
    assert not site.repositories


def test_bad_names_are_refused() -> None:
    for values, reason in (
        ({"push_to_hub": "a/b/c"}, "is not a valid repository name"),
        ({"private": True}, r"set hub\.push_to_hub"),
        ({"token": "hf_x"}, "has no field 'token'"),
    ):
        with pytest.raises(RecipeError, match=reason):
            HubRecipe(**values)


DIRECT = """
import sys, torch
from transformers import AutoModelForCausalLM
import hf_layerfuse
model = hf_layerfuse.AutoFusedModel.from_pretrained(sys.argv[1]).eval()
small = hf_layerfuse.fuse(model, keep_layers=2)
small.push_to_hub("someone/direct")
back = AutoModelForCausalLM.from_pretrained("someone/direct").eval()
ids = torch.arange(8)[None]
print("SAME", torch.equal(small(ids).logits, back(ids).logits), back.config.num_hidden_layers)
"""


@pytest.mark.slow
def test_a_model_is_pushed_by_its_own_method(tmp_path, site) -> None:
    """A fused model can be published by `push_to_hub` of transformers, and the Auto classes load it."""
    causal_lm(tmp_path)
    done = python(site, tmp_path, "-c", DIRECT, str(tmp_path / "model"))
    assert "SAME True 2" in done.stdout, done.stdout + done.stderr


SHARED = """
import sys, torch
import hf_layerfuse
model = hf_layerfuse.AutoFusedModel.from_pretrained(sys.argv[1]).eval()
small = hf_layerfuse.fuse(model, ratio=0.4, mode="share", check=False)
type(small).register_for_auto_class("AutoModelForCausalLM")
small.push_to_hub("someone/shared")
print("SUM", f"{small(torch.arange(8)[None]).logits.double().sum().item():.9f}")
"""

LOADED = """
import sys, torch
sys.modules["hf_layerfuse"] = None
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
print("SUM", f"{model(torch.arange(8)[None]).logits.double().sum().item():.9f}")
"""


@pytest.mark.slow
def test_a_class_that_is_registered_is_pushed_with_its_code(tmp_path, site) -> None:
    """As for other custom models in transformers: `register_for_auto_class`, then `push_to_hub`."""
    causal_lm(tmp_path)
    ours = python(site, tmp_path, "-c", SHARED, str(tmp_path / "model"))
    assert "SUM" in ours.stdout, ours.stdout + ours.stderr
    theirs = python(site, tmp_path / "elsewhere", "-c", LOADED, "someone/shared")
    assert "SUM" in theirs.stdout, theirs.stderr
    assert theirs.stdout.splitlines()[-1] == ours.stdout.splitlines()[-1]
