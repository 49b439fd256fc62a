"""The README, the guide and docs/ are correct: code and commands run, and messages are those of the package."""

import argparse
import ast
import importlib
import importlib.metadata
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
import safetensors.torch
import torch
import transformers
from accelerate.commands.config.config_args import load_config_from_file
from helpers import ROOT, blocks_of
from hub import TOKEN, hub
from packaging.requirements import Requirement
from PIL import Image
from runs import image_classification, save_text_model, sentences, text_classification, written
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessorPil

import hf_layerfuse
from hf_layerfuse import recipe as recipes
from hf_layerfuse.cli import parse_overrides
from hf_layerfuse.cli import run as main
from hf_layerfuse.recipe import load_recipe

PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
}
BIN = Path(sys.executable).parent


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGES[page], flags=re.DOTALL | re.MULTILINE)


# --- stand-ins: tiny checkpoints and data, where the pages say they are


def classifier(path: Path) -> None:
    """A small ResNet and its processor."""
    torch.manual_seed(0)
    config = ResNetConfig(depths=[3, 2], hidden_sizes=[8, 16], embedding_size=8, layer_type="basic", num_labels=2)
    ResNetForImageClassification(config).save_pretrained(path)
    ViTImageProcessorPil(size={"height": 40, "width": 40}).save_pretrained(path)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A working directory with fuse.py and recipes/ of this checkout, and models and texts under the names in the
    pages."""
    for name in ("fuse.py", "recipes"):
        (tmp_path / name).symlink_to(ROOT / name)
    save_text_model(tmp_path / "openai-community" / "gpt2", "GPT2LMHeadModel", n_layer=12, n_positions=128)
    classifier(tmp_path / "fxmarty" / "resnet-50-finetuned-cifar10")
    (tmp_path / "images").mkdir()
    draws = random.Random(0)
    for index in range(8):
        pixels = bytes(draws.randrange(256) for _ in range(10 * 10 * 3))
        Image.frombytes("RGB", (10, 10), pixels).save(tmp_path / "images" / f"{index}.png")
    (tmp_path / "train.txt").write_text("\n".join(sentences(200, 0)) + "\n")
    (tmp_path / "lines.txt").write_text("\n".join(sentences(20, 1)) + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def dataset(path: Path, config: str, splits: dict[str, datasets.Dataset]) -> None:
    """A data set of a Hub, with one configuration."""
    (path / config).mkdir(parents=True)
    files = ""
    for split, rows in splits.items():
        rows.to_parquet(path / config / f"{split}.parquet")
        files += f"  - split: {split}\n    path: {config}/{split}.parquet\n"
    (path / "README.md").write_text(f"---\nconfigs:\n- config_name: {config}\n  data_files:\n{files}---\n")


def fill_hub(root: Path) -> None:
    """Put the models and data of the recipes on the Hub."""
    models, data = root / "models", root / "datasets"
    save_text_model(models / "openai-community" / "gpt2", "GPT2LMHeadModel", n_layer=12)
    save_text_model(models / "textattack" / "bert-base-uncased-SST-2", "BertForSequenceClassification")
    lines = {
        name: datasets.Dataset.from_dict({"text": sentences(60, seed)})
        for seed, name in enumerate(("train", "validation", "test"))
    }
    dataset(data / "Salesforce" / "wikitext", "wikitext-2-raw-v1", lines)
    rows = {name: split.rename_column("text", "sentence") for name, split in lines.items()}
    rows = {name: split.add_column("label", [0, 1] * 30) for name, split in rows.items()}
    dataset(data / "nyu-mll" / "glue", "sst2", rows)


def embedder(root: Path) -> None:
    """The model and the text of the first example, as folders with their names on the Hub."""
    save_text_model(
        root / "sentence-transformers" / "all-MiniLM-L6-v2",
        "BertModel",
        num_hidden_layers=6,
        max_position_embeddings=128,
    )
    long = [" ".join(sentences(12, seed)) for seed in range(1300)]
    dataset(
        root / "Salesforce" / "wikitext", "wikitext-2-raw-v1", {"train": datasets.Dataset.from_dict({"text": long})}
    )


# --- Python


@pytest.mark.usefixtures("steady", "fresh_accelerate")
@pytest.mark.filterwarnings("ignore::hf_layerfuse.errors.LayerFuseWarning")  # random models are worse than chance
@pytest.mark.parametrize(
    "page",
    [
        pytest.param("README.md", marks=pytest.mark.slow),
        pytest.param("docs/index.md", marks=pytest.mark.slow),  # trains a model
        pytest.param("docs/fusion.md", marks=pytest.mark.slow),
        pytest.param("docs/collapse.md", marks=pytest.mark.slow),
        "docs/merge.md",
        "docs/extending.md",
    ],
)
def test_python_blocks_run(here, capsys, page):
    """The blocks of a page run unchanged, one after the other."""
    names: dict = {}
    if page == "README.md":
        embedder(here)
    for block in blocks(page, "python"):
        exec(compile(block, page, "exec"), names)
    printed = capsys.readouterr().out
    if page == "README.md":
        assert re.search(r"^cosine to the original +1 +0\.\d+", printed, flags=re.MULTILINE)
        assert (here / "minilm-4-layers" / "model.safetensors").is_file()
    if page == "docs/index.md":
        before, after = re.findall(r"([\d,]+) parameters, loss ([\d.]+)", printed)
        assert int(after[0].replace(",", "")) < 0.6 * int(before[0].replace(",", ""))
        assert float(after[1]) < float(before[1]) + 0.05, "the page says that the loss stays where it was"
        bare = hf_layerfuse.fuse(names["model"], keep_layers=3)
        assert bare(names["test"], labels=names["test"]).loss > float(before[1]) + 0.5, "and that it would not without"


def test_python_blocks_are_known():
    """Every page with Python has a test; test_contributing.py runs the code in CONTRIBUTING.md."""
    [mark] = [mark for mark in test_python_blocks_run.pytestmark if mark.name == "parametrize"]
    run = {page if isinstance(page, str) else page.values[0] for page in mark.args[1]}
    assert {page for page in PAGES if blocks(page, "python")} == run | {"CONTRIBUTING.md", "docs/sharing.md"}
    assert blocks("CONTRIBUTING.md", "python") == blocks_of("Add an architecture")


def run(command: list[str], here: Path, url: str | None = None) -> subprocess.CompletedProcess:
    """Run a command in a new process, with this checkout's package, on the CPU, with or without a Hub."""
    own = {"HF_HOME": str(here / "home"), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    own |= {"PYTHONPATH": str(ROOT), "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    own["HF_DATASETS_CACHE"] = str(here / "home" / "datasets")
    if url is not None:
        own |= {"HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
    done = subprocess.run(command, env=os.environ | own, cwd=here, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.slow
def test_sharing(here):
    """The blocks of that page run in their own process, with a Hub; one block runs without this library."""
    code = [block.replace("user/", "someone/") for block in blocks("docs/sharing.md", "python")]
    [elsewhere] = [block for block in code if "trust_remote_code" in block]
    code.remove(elsewhere)
    with hub(here / "hub") as site:
        run([sys.executable, "-c", "\n".join(code)], here, site.url)
        assert ("models", "someone/gpt2-shared") in site.repositories
    sizes = {name: (here / name / "model.safetensors").stat().st_size for name in ("shared", "stock", "with-code")}
    assert sizes["shared"] == sizes["with-code"] < sizes["stock"]
    assert (here / "small-int8.onnx").stat().st_size < (here / "small.onnx").stat().st_size
    missing = "import sys\nsys.modules['hf_layerfuse'] = None\n"
    same = (
        f"\nassert model.num_parameters() == {hf_layerfuse.AutoFusedModel.from_pretrained('shared').num_parameters()}"
    )
    run([sys.executable, "-c", missing + elsewhere + same], here)


# --- commands

SMALLER = shlex.split(
    "--heal.steps 2 --heal.batch_size 4 --evaluate.latency false --data.held_out 8 --data.calibration_samples 8 "
    "--data.max_length 16"
)
"""Added to the commands that run a recipe, which is about large models and data."""


def existing_target(words: list[str], here: Path) -> None:
    """`make TARGET`: make knows the rules; they are not run."""
    assert len(words) == 2
    planned = subprocess.run(["make", "-n", words[1]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert planned.returncode == 0, planned.stderr
    assert planned.stdout.strip()
    assert "Nothing to be done" not in planned.stdout, "a folder has that name, and no rule"


def requirement(words: list[str], here: Path) -> None:
    """`pip install -e .[EXTRA]`: this checkout has the extra."""
    assert words[:3] == ["pip", "install", "-e"]
    [target] = words[3:]
    assert target.startswith(".")
    extras = Requirement(target.replace(".", "hf-layerfuse", 1)).extras
    assert extras <= set(importlib.metadata.metadata("hf-layerfuse").get_all("Provides-Extra"))


def benchmark(words: list[str], here: Path) -> None:
    """`python benchmarks/X.py ...`: its parser accepts the arguments; the run itself would take hours."""
    tree = ast.parse((ROOT / words[1]).read_text(encoding="utf-8"))
    added = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and "add_argument" in ast.unparse(node.func)]
    flags = [call.args[0].value for call in added]
    assert flags, f"{words[1]} has no parser"
    parser = argparse.ArgumentParser()
    for call, flag in zip(added, flags, strict=True):
        options = {option.arg: ast.unparse(option.value) for option in call.keywords}
        takes = {"action": "store_true"} if options.get("action") == "'store_true'" else {"nargs": "*"}
        parser.add_argument(flag, **takes)
    jobs = getattr(parser.parse_args(words[2:]), "jobs", [])
    assert all(f'"{job}"' in (ROOT / words[1]).read_text(encoding="utf-8") for job in jobs)


def looked_at(words: list[str], here: Path) -> None:
    """`hf-layerfuse ...`: runs on a local checkpoint instead of the one on the Hub."""
    shown = run([str(BIN / words[0]), *words[1:]], here).stdout
    assert "parameters" in shown


def adapted(words: list[str], here: Path) -> None:
    """`hf-layerfuse adapt ...`: runs on a local checkpoint instead of the one on the Hub."""
    assert "class Gpt2Architecture(TransformerArchitecture):" in run([str(BIN / words[0]), *words[1:]], here).stdout


def reported(words: list[str], here: Path) -> None:
    """`hf-layerfuse report OUTPUT_DIR`: runs on the output of a run."""
    written(here / words[2])
    run([str(BIN / words[0]), *words[1:]], here)
    assert (here / words[2] / "report.html").is_file()


def completed(words: list[str], here: Path) -> None:
    """`hf-layerfuse --print-completion SHELL > FILE`: the shell can read the script."""
    *command, redirection, _ = words
    assert redirection == ">"
    script = run([str(BIN / command[0]), *command[1:]], here).stdout
    subprocess.run([words[2], "-n"], input=script, text=True, check=True)


def split_launch(words: list[str]) -> tuple[dict[str, str], list[str], list[str], list[str]]:
    """Environment, launcher, program and arguments of a command that runs a recipe."""
    variables = {}
    while "=" in words[0]:
        name, _, value = words[0].partition("=")
        variables[name], words = value, words[1:]
    start = next(words.index(name) for name in ("hf-layerfuse", "-m", "fuse.py") if name in words)
    end = start + (1 if words[start] == "fuse.py" else 2)
    return variables, words[:start], words[start:end], words[end:]


def launched(words: list[str], here: Path) -> None:
    """A recipe: runs with few steps on few rows; a local Hub replaces the real one."""
    fill_hub(here / "hub")
    shutil.rmtree(here / "openai-community")  # a folder would be taken for the name
    save_text_model(here / "path" / "to" / "your-bert", "BertForSequenceClassification")
    (here / "your-recipe.yaml").write_text((ROOT / "recipes" / "gpt2-wikitext2.yaml").read_text())
    variables, launcher, program, given = split_launch(words)
    given = [word.replace("user/", "someone/") for word in given]
    if "path/to/your-bert" in given:
        given += ["--fusion.ratio", "null"]
    given += SMALLER
    environment = [f"{name}={value}" for name, value in variables.items()]
    with hub(here / "hub") as site:
        done = run(["env", *environment, *launcher, *program, *given], here, site.url)
        if program[-1] == "plan":
            assert "The run decides the same" in done.stdout
            return
        recipe = load_recipe(given[0], parse_overrides(private_to_hub(given[1:])))
        assert (here / recipe.output_dir / "model.safetensors").is_file()
        results = json.loads((here / recipe.output_dir / "results.json").read_text())
        assert results["heal"]["num_processes"] == (2 if "torchrun" in launcher else 1)
        if recipe.hub.push_to_hub:
            repository = site.repositories["models", recipe.hub.push_to_hub]
            assert repository.private == recipe.hub.private
            assert "model.safetensors" in repository.files(recipe.hub.revision)[1]


def private_to_hub(given: list[str]) -> list[str]:
    """Short options replaced by the recipe fields that they set."""
    short = {
        "--push_to_hub": ["--hub.push_to_hub"],
        "--revision": ["--hub.revision"],
        "--private": ["--hub.private=true"],
    }
    return [part for word in given for part in short.get(word, [word])]


def timed(words: list[str], here: Path) -> None:
    """A recipe with a latency budget: runs in this process, where latencies are simulated."""
    _, launcher, program, given = split_launch(words)
    assert [*launcher, *program] == ["hf-layerfuse", "run"]
    given += [*SMALLER, "--data.name", "null", "--data.config", "null", "--model", str(here / "local" / "model")]
    (here / "local").mkdir()
    if "merge" in given[0]:
        image_classification(here / "local")
        shutil.rmtree(here / "local" / "model")
        classifier(here / "local" / "model")
        given += ["--data.image_column", "image", "--merge.latency_budget", "0.9", "--merge.latency_batch_size", "2"]
    else:
        text_classification(here / "local")
        given += ["--data.text_column", "text"]
    for split in ("train", "validation", "test"):
        [path] = (here / "local").glob(f"{split}*")
        given += [f"--data.{split}", str(path)]
    assert main(given) == 0


def on_several_gpus(words: list[str], here: Path) -> None:
    """A command for several GPUs: Accelerate reads the configuration, which is for several devices, and the library
    reads the recipe."""
    _, launcher, program, given = split_launch(words)
    assert launcher[:3] == ["accelerate", "launch", "--config_file"]
    assert program == ["fuse.py"]
    assert load_config_from_file(str(ROOT / launcher[3])).num_processes > 1
    load_recipe(given[0], parse_overrides(given[1:]))


def handler(command: str) -> Callable[[list[str], Path], None]:
    """Function that checks a command of a page."""
    known = (
        (r"make (demo|test|slow|lint|docs|bench-check)", existing_target),
        (r"pip install ", requirement),
        (r"python benchmarks/", benchmark),
        (r"hf-layerfuse plan \S+\.yaml", launched),
        (r"hf-layerfuse (inspect|plan) ", looked_at),
        (r"hf-layerfuse adapt ", adapted),
        (r"hf-layerfuse report ", reported),
        (r"hf-layerfuse --print-completion ", completed),
        (r"hf-layerfuse run recipes/(latency|merge)-", timed),
        (r"accelerate launch --config_file ", on_several_gpus),
        (r"([A-Z_]+=\S+ )*(accelerate launch|torchrun --nproc_per_node 2) (fuse\.py|-m hf_layerfuse) ", launched),
        (r"([A-Z_]+=\S+ )*hf-layerfuse run ", launched),
    )
    for pattern, check in known:
        if re.match(pattern, command):
            return check
    raise LookupError(f"no test knows how to run {command!r}")


COMMANDS = sorted(
    {
        re.sub(r"\s+#.*", "", line)
        for page in PAGES
        for block in blocks(page, "bash")
        for line in block.replace("\\\n", " ").splitlines()
        if line.strip()
    }
)


def test_commands_are_known():
    """Each line of each `bash` block has a check; others are outputs, trees, citations and the reference."""
    assert len(COMMANDS) > 20
    for command in COMMANDS:
        assert handler(command)
    with pytest.raises(LookupError, match="no test knows"):
        handler("rm -rf outputs")
    for page, text in PAGES.items():
        fences = re.findall(r"^ *```(.*)$", text, flags=re.MULTILINE)
        others = {
            "README.md": {"text", "bibtex"},
            "CONTRIBUTING.md": {""},
            "docs/api.md": {"{eval-rst}"},
            "docs/running.md": {"{eval-rst}"},
        }
        assert set(fences[::2]) <= {"python", "bash"} | others.get(page, set()), page


QUICK = ("make", "pip", "python benchmarks/", "accelerate launch --config_file")


@pytest.mark.usefixtures("steady", "fresh_accelerate")
@pytest.mark.filterwarnings("ignore::hf_layerfuse.errors.LayerFuseWarning")
@pytest.mark.parametrize(
    "command",
    [command if command.startswith(QUICK) else pytest.param(command, marks=pytest.mark.slow) for command in COMMANDS],
)
def test_commands_run(request, tmp_path, command):
    """Every command works on a small scale; a command that takes hours or several GPUs exists as written."""
    check = handler(command)
    check(shlex.split(command), tmp_path if command.startswith(QUICK) else request.getfixturevalue("here"))


# --- messages, names and links


def templates(path: Path) -> set[str]:
    """Strings in a Python file, joined as the compiler joins them, with … for expressions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
            found.add(re.sub("…+", "…", "".join(map(str, parts))))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
    return found


def quoted(text: str) -> tuple[list[str], list[str]]:
    """Messages on the troubleshooting page: those of this package, which are in code format, and those of others."""
    lines = re.findall(r"^> (.*)$", text, flags=re.MULTILINE)
    ours = [found[2] for line in lines if (found := re.fullmatch(r"(`+)(.*?)\1", line))]
    return ours, [line for line in lines if not re.fullmatch(r"(`+)(.*?)\1", line)]


def test_messages_are_those_of_the_package():
    """Every message on the troubleshooting page is part of a message in the source, word for word."""
    ours, theirs = quoted(PAGES["docs/troubleshooting.md"])
    package = set().union(*(templates(path) for path in (ROOT / "hf_layerfuse").rglob("*.py")))
    assert len(ours) > 30
    for message in ours:
        assert len(message.replace("…", "")) > 10
        assert any(message in text for text in package), message
    others = (
        Path(transformers.__file__).parent / "models/auto/configuration_auto.py",
        Path(safetensors.torch.__file__),
    )
    texts = set().union(*map(templates, others))
    assert len(theirs) == 2
    for message in theirs:
        assert any(message.removesuffix(".") in text for text in texts), message


def test_everything_public_is_in_the_reference():
    """The API page has each name of `__all__` exactly once, and no other."""
    shown = re.findall(
        r"^\.\. auto(?:function|class|exception):: hf_layerfuse\.(.+)$", PAGES["docs/api.md"], re.MULTILINE
    )
    assert sorted(shown) == sorted(hf_layerfuse.__all__)


def test_recipe_fields_are_documented():
    """The fields of a method are in the table of its page; the page about running shows all other fields."""
    for page, recipe in (
        ("docs/fusion.md", recipes.FusionRecipe),
        ("docs/collapse.md", recipes.CollapseRecipe),
        ("docs/merge.md", recipes.MergeRecipe),
    ):
        table = PAGES[page].split("## Options")[1]
        for name in recipe.__dataclass_fields__:
            assert f"`{name}`" in table, f"{name} is not on {page}"
    shown = PAGES["docs/running.md"] + PAGES["docs/api.md"]
    for recipe in (recipes.Recipe, *(recipe for recipe in recipes.SECTIONS.values())):
        assert re.search(rf"^\.\. autoclass:: hf_layerfuse\.(recipe\.)?{recipe.__name__}$", shown, re.MULTILINE), recipe
        for name in recipe.__dataclass_fields__:
            sections = recipe is recipes.Recipe and name in recipes.SECTIONS
            assert sections or re.search(rf"^ +{name}: ", recipe.__doc__, flags=re.MULTILINE), f"{recipe}: {name}"


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(page):
    """Links in the files beside docs/ lead to existing files and headings; Sphinx checks those of the pages."""
    links = re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", PAGES[page])
    assert links
    for target, anchor in links:
        path = ROOT / (target or page)
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
