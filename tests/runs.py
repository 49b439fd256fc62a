"""Runs of recipes on tiny models and data, and their output: plans, results and the files of a page."""

import dataclasses
import json
import random
import re
from pathlib import Path

from helpers import tiny_model
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, ViTImageProcessorPil

from hf_layerfuse import Drop, Fuse, FusionRecipe, Linearize, MergeConvs, Plan
from hf_layerfuse.pipeline.results import Goal, HealRound, Latency, Measurement, RunResults
from hf_layerfuse.plan import CONV_GRAPH_KINDS
from hf_layerfuse.recipe import DataRecipe, Recipe
from hf_layerfuse.training.heal import HealReport

WORDS = [f"w{i}" for i in range(3, 60)]


def save_text_model(path: Path, head: str, **changes):
    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {word: i for i, word in enumerate(WORDS, start=3)}
    backend = Tokenizer(models.WordLevel(vocabulary | {"<mask>": 62, "<unk>": 63}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "<eos>", "mask_token": "<mask>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=32, **tokens).save_pretrained(path)
    model = tiny_model("gpt2" if "GPT2" in head else "bert", head, **changes)
    model.save_pretrained(path)
    return model


def sentences(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(3, 12))) for _ in range(count)]


def causal_lm(path: Path) -> list[str]:
    save_text_model(path / "model", "GPT2LMHeadModel")
    for split in ("train", "validation", "test"):
        (path / f"{split}.txt").write_text("\n".join(sentences(60, len(split))) + "\n")
    return [*local(path, "causal-lm", "txt"), "--data.max_length", "16"]


def text_classification(path: Path) -> list[str]:
    save_text_model(path / "model", "BertForSequenceClassification")
    for split in ("train", "validation", "test"):
        rows = [f"{text}\t{int('w7' in text)}" for text in sentences(60, len(split))]
        (path / f"{split}.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n")
    return local(path, "text-classification", "tsv")


def feature_extraction(path: Path) -> list[str]:
    save_text_model(path / "model", "BertModel")
    for split in ("train", "validation", "test"):
        lines = [json.dumps({"text": text}) for text in sentences(40, len(split))]
        (path / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return local(path, "feature-extraction", "jsonl")


def masked_lm(path: Path) -> list[str]:
    save_text_model(path / "model", "BertForMaskedLM")
    for split in ("train", "validation", "test"):
        (path / f"{split}.txt").write_text("\n".join(sentences(40, len(split))) + "\n")
    return local(path, "masked-lm", "txt")


def token_classification(path: Path) -> list[str]:
    save_text_model(path / "model", "BertForTokenClassification")
    for split in ("train", "validation", "test"):
        words = [text.split() for text in sentences(40, len(split))]
        rows = [json.dumps({"text": row, "label": [int("7" in word) for word in row]}) for row in words]
        (path / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    return local(path, "token-classification", "jsonl")


def image_classification(path: Path) -> list[str]:
    tiny_model("vit", "ViTForImageClassification").save_pretrained(path / "model")
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(path / "model")
    rng = random.Random(0)
    for split in ("train", "validation", "test"):
        for kind in ("cat", "dog"):
            folder = path / split / kind
            folder.mkdir(parents=True)
            for index in range(12):
                pixels = bytes(rng.randrange(256) for _ in range(10 * 10 * 3))
                Image.frombytes("RGB", (10, 10), pixels).save(folder / f"{index}.png")
    return local(path, "image-classification", None)


def local(path: Path, task: str, suffix: str | None) -> list[str]:
    """A recipe file for data in `path`, and the arguments that run it."""
    splits = {
        split: str(path / (f"{split}.{suffix}" if suffix else split)) for split in ("train", "validation", "test")
    }
    recipe = {
        "model": str(path / "model"),
        "task": task,
        "output_dir": str(path / "out"),
        "data": {**splits, "max_length": 32, "calibration_samples": 8},
        "fusion": {"keep_layers": 4, "effort": "low"},
        "heal": {"steps": 3, "batch_size": 8, "eval_every": 2},
        "evaluate": {"latency_repeats": 1},
    }
    (path / "recipe.yaml").write_text(json.dumps(recipe))
    return [str(path / "recipe.yaml")]


def timed(milliseconds: float, speedup: float) -> Latency:
    """A latency with some details."""
    details = {"repeats": 2, "warmup": 3, "threads": 1, "device": "cpu", "dtype": "float32", "input_shape": [1, 16]}
    return Latency(median_ms=milliseconds, spread_ms=0.5, speedup=speedup, **details)


STAGE = Measurement(
    parameters=1000,
    non_embedding_parameters=800,
    bytes=4000,
    metrics={"accuracy": 0.9},
).with_latency({1: timed(5.0, 1.0), 8: timed(30.0, 1.0)})


SMALLER = dataclasses.replace(STAGE, parameters=750, metrics={"accuracy": 0.875}).with_latency(
    {1: timed(4.0, 1.25), 8: timed(20.0, 1.5)}
)


RESULTS = RunResults(
    before=STAGE,
    fused=SMALLER,
    metrics_on="test",
    recipe={},
    command="accelerate launch fuse.py x",
    environment={"device": "cpu"},
)


PLAN = Plan("bert", 12, (Fuse("layer", (2, 3)), Drop("attention", 7)))


SHARED = Plan("bert", 12, (Fuse("mlp", (0, 1), "share"), Linearize(5)))


MERGED = Plan("resnet", 3, (MergeConvs(-1, 0, (0,)), MergeConvs(0, 2, (2,))), kinds=CONV_GRAPH_KINDS)


def recipe(**changes) -> Recipe:
    given = {
        "model": "user/model",
        "task": "text-classification",
        "output_dir": "out",
        "data": {"name": "glue", "config": "sst2", "test": "validation"},
        "fusion": FusionRecipe(keep_layers=11),
    }
    given |= changes
    return Recipe(**{**given, "data": DataRecipe(**given["data"])})


REPORT = HealReport(
    steps=2,
    best_step=2,
    train_loss=[(1, 3.0), (2, 2.5)],
    validation_loss=[(0, 3.1), (2, 2.6)],
    homotopy=[],
    seconds=71.6,
    mixed_precision="bf16",
    num_processes=1,
    distributed_type="NO",
)


def healed_by(*reports: HealReport) -> tuple[HealRound, ...]:
    """Rounds of healing with these reports."""
    return tuple(HealRound(Goal(), report) for report in reports)


def results(**changes) -> RunResults:
    return dataclasses.replace(RESULTS, **{"rounds": healed_by(REPORT), "healed": SMALLER, **changes})


def machine_paths(text: str) -> list[str]:
    """Absolute paths in a text, and paths that lead out of their folder or to a home."""
    return re.findall(r"(?<![\w.:/])/\w[\w.-]*/[\w.-]+|\.\./\S*|~/\S*|\b[A-Z]:\\\S*", text)


def files_named_by(card: str) -> set[str]:
    """Files that a model card names as beside it: links and names in its text, outside front matter and code."""
    text = re.sub(r"\A---.*?^---$|^```.*?^```$", "", card, flags=re.DOTALL | re.MULTILINE)
    links = {link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link}
    # the reader is told to save this one
    return (links | set(re.findall(r"`([\w./-]+\.\w+)`", text))) - {"recipe.yaml"}


def written(folder: Path, plan: Plan = PLAN, made=None) -> Path:
    """A folder with the files that a page needs."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.json").write_text(plan.to_json())
    tree = results(recipe=dataclasses.asdict(made or recipe())).to_dict()
    (folder / "results.json").write_text(json.dumps(tree))
    return folder
