"""Write one saved artifact of every kind with the release that is installed: what later releases must reload.

    python tests/corpus/make.py FOLDER

Once a release, into a new folder named after it: `checkpoints` with inputs and expected outputs, `plans` with the notes
of real searches, `runs` as `fuse.py` leaves them, and `tables` of what was measured. Models are tiny and random.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["ACCELERATE_USE_CPU"] = "true"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.utils.data import DataLoader
from transformers import CONFIG_MAPPING, PreTrainedModel, PreTrainedTokenizerFast, ViTImageProcessorPil

from hf_layerfuse import (
    AutoFusedModel,
    Blend,
    CollapseRecipe,
    Drop,
    Found,
    Fuse,
    FusionRecipe,
    HealRecipe,
    Linearize,
    MergeRecipe,
    Plan,
    RecipeError,
    apply,
    heal,
    merge_convs,
    plan_fusion,
    search,
    search_collapse,
    search_merge,
    straighten,
)

LAYERS, VOCABULARY, SIDE = 4, 32, 16

_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}
_LLAMA = {**_TEXT, **_SPECIAL, "num_key_value_heads": 1}
_RESNET = {"depths": [3, 2], "hidden_sizes": [8, 8], "embedding_size": 8, "layer_type": "basic"}

# an architecture -> its Auto class, its head, and its tiny config
TINY = {
    "gpt2": (
        "AutoModelForCausalLM",
        "GPT2LMHeadModel",
        {**_SPECIAL, "vocab_size": VOCABULARY, "n_embd": 16, "n_layer": LAYERS, "n_head": 2, "n_positions": 32}
        | {"n_inner": 24},
    ),
    "bert": ("AutoModelForSequenceClassification", "BertForSequenceClassification", _TEXT),
    "distilbert": (
        "AutoModelForMaskedLM",
        "DistilBertForMaskedLM",
        {"vocab_size": VOCABULARY, "dim": 16, "n_layers": LAYERS, "n_heads": 2, "hidden_dim": 24}
        | {"max_position_embeddings": 32},
    ),
    "llama": ("AutoModelForCausalLM", "LlamaForCausalLM", _LLAMA),
    "qwen2": (
        "AutoModelForCausalLM",
        "Qwen2ForCausalLM",
        {**_LLAMA, "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2},
    ),
    "vit": (
        "AutoModelForImageClassification",
        "ViTForImageClassification",
        {name: value for name, value in _TEXT.items() if name not in ("vocab_size", "max_position_embeddings")}
        | {"image_size": 8, "patch_size": 2, "num_labels": 3},
    ),
    "resnet": ("AutoModelForImageClassification", "ResNetForImageClassification", {**_RESNET, "num_labels": 3}),
    "mobilenet_v2": (
        "AutoModelForImageClassification",
        "MobileNetV2ForImageClassification",
        {"depth_multiplier": 0.05, "depth_divisible_by": 4, "min_depth": 4, "expand_ratio": 2, "num_labels": 3}
        | {"image_size": SIDE, "finegrained_output": False, "first_layer_is_expansion": True},
    ),
}

# a checkpoint -> the architecture, and the edits that lead to it
CHECKPOINTS = {
    "gpt2-depth": ("gpt2", [Fuse("layer", (1, 2))]),
    "bert-separate": (
        "bert",
        [Fuse("attention", (0, 1), "share"), Fuse("mlp", (2, 3), "share", operator="mean"), Drop("attention", 3)],
    ),
    "gpt2-share": ("gpt2", [Fuse("layer", (0, 2), "share", operator="mean")]),
    "llama-share-rank": ("llama", [Fuse("layer", (1, 2, 3), "share", operator="mean", align="rotation", rank=2)]),
    "bert-basis": ("bert", [Fuse("layer", (1, 2), "basis", rank=6)]),
    "llama-drop": ("llama", [Drop("attention", 1), Drop("mlp", 2)]),
    "bert-linearize": ("bert", [Linearize(1), Linearize(3)]),
    "gpt2-linearize-rank": ("gpt2", [Linearize(2, rank=4)]),
    "bert-linearize-fold": ("bert", [Linearize(1, fold=True)]),
    "bert-blend-faithful": ("bert", [Blend(2, faithful=True)]),
    "vit-share": ("vit", [Fuse("layer", (1, 2), "share")]),
    "distilbert-drop": ("distilbert", [Drop("attention", 2), Drop("mlp", 0)]),
    "qwen2-drop-layer-types": ("qwen2", [Drop("attention", 0), Fuse("layer", (2, 3))]),
    "gpt2-with-code": ("gpt2", [Fuse("layer", (1, 3), "share", rank=2), Linearize(2)]),
}


def tiny(kind: str, **changes: object) -> PreTrainedModel:
    """A random model in which all weights have an effect; the statistics of batch norms are random too."""
    _, head, values = TINY[kind]
    torch.manual_seed(0)
    model = getattr(transformers, head)(CONFIG_MAPPING[kind](**values, **changes)).eval()
    convolutional = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    for parameter in model.parameters():
        parameter.data += (0.05 if convolutional else 0.2) * torch.randn(parameter.shape)
    if convolutional:
        model.train()
        pixels = torch.cat([batch["pixel_values"] for batch in batches(model, 24)])
        with torch.no_grad():
            for _ in range(20):  # a running average, which starts from nothing
                model(pixel_values=pixels)
    return model.eval()


def batches(model: PreTrainedModel, count: int = 6, seed: int = 1) -> list[dict[str, torch.Tensor]]:
    """Random batches. Images have three decimals, the number that is written to JSON."""
    generator = torch.Generator().manual_seed(seed)
    if model.main_input_name == "input_ids":
        shape = (2, 8)
        return [{"input_ids": torch.randint(3, VOCABULARY, shape, generator=generator)} for _ in range(count)]
    side = getattr(model.config, "image_size", SIDE)
    images = [torch.randn(1, 3, side, side, generator=generator) for _ in range(count)]
    return [{"pixel_values": image.mul(1000).round().div(1000)} for image in images]


def save(model: PreTrainedModel, folder: Path, kind: str, **options: object) -> None:
    """Write a checkpoint with inputs and the outputs of the reloaded model."""
    auto_class = TINY[kind][0]
    model.save_pretrained(folder, **options)
    inputs = batches(model, 1, seed=2)[0]
    with torch.inference_mode():
        logits = AutoFusedModel.from_pretrained(folder).eval()(**inputs).logits
    tree = {
        "auto_class": auto_class,
        "inputs": {name: _short(value) for name, value in inputs.items()},
        "outputs": {"logits": _short(logits)},
    }
    (folder / "expected.json").write_text(json.dumps(tree) + "\n", encoding="utf-8")


def _short(values: torch.Tensor) -> object:
    """Nested lists, with floats of seven digits, the precision of float32."""
    return json.loads(json.dumps(values.tolist()), parse_float=lambda text: float(f"{float(text):.7g}"))


def make_checkpoints(folder: Path) -> None:
    """Write one checkpoint for each kind of edit; `make_merges` writes those of merged convolutions."""
    for name, (kind, edits) in CHECKPOINTS.items():
        model = apply(tiny(kind), Plan(kind, LAYERS, edits))
        save(model, folder / name, kind, **({"with_code": True} if name.endswith("with-code") else {}))


def make_plans(folder: Path, checkpoints: Path, tables: Path) -> None:
    """Write plans with the notes of real searches. The model with `Blend` edits is one of the checkpoints."""
    folder.mkdir(parents=True)
    gpt2, llama, bert = (tiny(kind) for kind in ("gpt2", "llama", "bert"))

    def write(name: str, plan: Plan) -> None:
        (folder / f"{name}.json").write_text(plan.to_json(), encoding="utf-8")

    write("plan-fusion", plan_fusion(gpt2, FusionRecipe(keep_layers=3)))
    for name, model, recipe in (
        ("fuse-low", gpt2, FusionRecipe(keep_layers=3, effort="low")),
        ("fuse-medium", gpt2, FusionRecipe(keep_layers=2)),
        ("fuse-separate", bert, FusionRecipe(keep_layers=3, blocks="separate", effort="low")),
        ("share-rank-auto", llama, FusionRecipe(ratio=0.4, mode="share", rank="auto", effort="low")),
        ("basis", bert, FusionRecipe(keep_layers=3, mode="basis", rank=6, effort="low")),
        ("fuse-latency", llama, FusionRecipe(latency_budget=0.7, effort="low", tables=str(tables / "fusion"))),
    ):
        write(name, search(model, recipe, batches(model)).plan)
    write("collapse-fitted", search_collapse(gpt2, CollapseRecipe(count=2), batches(gpt2)).plan)
    write("collapse-rank", search_collapse(gpt2, CollapseRecipe(count=1, rank=4), batches(gpt2)).plan)

    found = search_collapse(gpt2, CollapseRecipe(count=2, method="homotopy"), batches(gpt2))
    write("collapse-homotopy", found.plan)
    rows = [{"input_ids": row, "labels": row} for batch in batches(gpt2) for row in batch["input_ids"]]
    options = {"learning_rate": 1e-3, "mixed_precision": "no"}
    heal(found.model, DataLoader(rows, 4), HealRecipe(steps=3, straighten=60.0, **options), teacher=gpt2)
    save(found.model.eval(), checkpoints / "gpt2-blend", "gpt2")
    heal(found.model, DataLoader(rows, 4), HealRecipe(steps=6, straighten="auto", **options), teacher=gpt2)
    small, plan = straighten(found.model.eval(), batches=batches(gpt2))
    write("straighten", plan)
    save(small, checkpoints / "gpt2-straightened", "gpt2")


def make_merges(plans: Path, checkpoints: Path, tables: Path) -> None:
    """Write results of merging. Measurements choose the merges, so they differ from run to run."""
    resnet, mobilenet = tiny("resnet"), tiny("mobilenet_v2")
    for name, kind, model, recipe in (
        ("merge-fitted", "resnet", resnet, {"tables": str(tables / "merge")}),
        ("merge-open", "resnet", resnet, {"method": "open"}),
        ("merge-mobilenet", "mobilenet_v2", mobilenet, {"max_kernel": 3}),
    ):
        found = _merged(model, recipe)
        (plans / f"{name}.json").write_text(found.plan.to_json(), encoding="utf-8")
        save(found.model.eval(), checkpoints / f"{kind}-{name}", kind)
        if name == "merge-open":
            save(merge_convs(found.model)[0].eval(), checkpoints / f"{kind}-{name}-closed", kind)


BUDGETS = (0.6, 0.65, 0.7, 0.75, 0.8, 0.9)
"""Tried in turn: which of them tiny models can meet is a matter of the machine."""


def _merged(model: PreTrainedModel, fields: dict[str, object]) -> Found:
    """The result of the smallest possible budget, which needs more than folded batch norms."""
    for budget in BUDGETS:
        with contextlib.suppress(RecipeError):
            found = search_merge(model, MergeRecipe(budget=budget, batch_size=1, repeats=3, **fields), batches(model))
            assert any(len(edit.layers) > 1 for edit in found.plan.edits), "nothing was merged: try again"
            return found
    raise AssertionError("no budget was met: try again")


WORDS = [f"w{i}" for i in range(3, VOCABULARY - 1)]
SPLITS = ("train", "validation", "test")


def _save_text_model(kind: str) -> None:
    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {word: i for i, word in enumerate(WORDS, start=3)}
    backend = Tokenizer(models.WordLevel(vocabulary | {"<unk>": VOCABULARY - 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "<eos>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=32, **tokens).save_pretrained("model")
    tiny(kind).save_pretrained("model")


def _sentences(count: int, seed: int) -> list[str]:
    chance = random.Random(seed)
    return [" ".join(chance.choices(WORDS, k=chance.randint(3, 8))) for _ in range(count)]


def _language() -> dict[str, object]:
    _save_text_model("gpt2")
    for split in SPLITS:
        Path(f"{split}.txt").write_text("\n".join(_sentences(40, len(split))) + "\n", encoding="utf-8")
    return {"task": "causal-lm", "data": {split: f"{split}.txt" for split in SPLITS}}


def _classes() -> dict[str, object]:
    _save_text_model("bert")
    for split in SPLITS:
        rows = [f"{text}\t{int('w7' in text)}" for text in _sentences(40, len(split))]
        Path(f"{split}.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n", encoding="utf-8")
    return {"task": "text-classification", "data": {split: f"{split}.tsv" for split in SPLITS}}


def _images() -> dict[str, object]:
    tiny("resnet", id2label={0: "cat", 1: "dog", 2: "owl"}).save_pretrained("model")
    ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained("model")
    chance = random.Random(0)
    for split in SPLITS:
        for label in ("cat", "dog", "owl"):
            folder = Path(split, label)
            folder.mkdir(parents=True)
            for index in range(8):
                Image.frombytes("RGB", (SIDE, SIDE), chance.randbytes(3 * SIDE**2)).save(folder / f"{index}.png")
    return {"task": "image-classification", "data": {split: split for split in SPLITS}}


_HEAL = {"steps": 4, "batch_size": 8, "eval_every": 2}
_ROUNDS = {**_HEAL, "schedule": "uniform", "rounds": 2, "hidden_weight": 1.0}

# a run -> what makes its model and data, and its recipe
RUNS = {
    "fusion-rounds": (_language, {"fusion": {"keep_layers": 2}, "heal": _ROUNDS}),
    "collapse-fitted": (_classes, {"collapse": {"count": 2}, "heal": _HEAL}),
    "collapse-homotopy": (_classes, {"collapse": {"count": 2, "method": "homotopy"}, "heal": {**_HEAL, "steps": 6}}),
    "merge": (_images, {"merge": {"budget": BUDGETS[0], "batch_size": 1, "repeats": 10}, "heal": _HEAL}),
}


def make_runs(folder: Path) -> None:
    """Write output folders of `fuse.py`, without pictures. Each run has a working directory for its relative paths."""
    folder = folder.absolute()
    here = Path.cwd()
    for name, (prepare, recipe) in RUNS.items():
        with tempfile.TemporaryDirectory() as work:
            os.chdir(work)
            try:
                tree = prepare()
                tree["data"] |= {"max_length": 16, "calibration_samples": 12}
                tree |= {"model": "model", "output_dir": name, "evaluate": {"latency_repeats": 2}, **recipe}
                Path("recipe.yaml").write_text(json.dumps(tree), encoding="utf-8")
                environment = {**os.environ, "HF_DATASETS_CACHE": str(Path(work, "cache"))}
                command = [sys.executable, "-m", "hf_layerfuse", "recipe.yaml"]
                tries = [["--merge.budget", str(budget)] for budget in BUDGETS] if "merge" in recipe else [[]]
                if all(subprocess.run([*command, *words], env=environment).returncode for words in tries):
                    raise RuntimeError(f"the run {name} has failed")
                shutil.copytree(name, folder / name, ignore=shutil.ignore_patterns("*.png"))
            finally:
                os.chdir(here)


def main() -> None:
    """Write the corpus of the installed release to a new folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="to be made; named after the release")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True)
    checkpoints, plans, tables, runs = (folder / name for name in ("checkpoints", "plans", "tables", "runs"))
    make_checkpoints(checkpoints)
    make_plans(plans, checkpoints, tables)
    make_merges(plans, checkpoints, tables)
    make_runs(runs)
    # plans of several rounds, which only the library makes
    shutil.copy(runs / "fusion-rounds" / "plan.json", plans / "composed-rounds.json")
    # shipped code is kept to the byte
    lines = ('extend = "../../../pyproject.toml"', 'cache-dir = "../../../.ruff_cache"', 'exclude = ["checkpoints"]')
    (folder / "ruff.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for path in folder.rglob("*.json"):  # tables and notes name the folder of tables
        path.write_text(path.read_text(encoding="utf-8").replace(f"{folder}/", ""), encoding="utf-8")


if __name__ == "__main__":
    main()
