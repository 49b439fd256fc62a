"""The jobs, data, result files and command line that all benchmarks share."""

import argparse
import itertools
import json
import lzma
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedModel

from hf_layerfuse import AutoFusedModel, Drop, Plan, apply
from hf_layerfuse.evaluation.divergence import calibration_loss
from hf_layerfuse.evaluation.intervals import bootstrap
from hf_layerfuse.evaluation.metrics import classification, embedding_fidelity
from hf_layerfuse.evaluation.whole_file import write_whole
from hf_layerfuse.models.architectures import architecture_for

ROOT = Path(__file__).resolve().parents[1]


RESULTS = ROOT / "benchmarks" / "results"
DATA = Path(os.environ.get("LAYERFUSE_DATA", ROOT.parent / "shared")).resolve()  # the example changes the directory

LANGUAGE_MODELS = Path(os.environ.get("LAYERFUSE_MODELS", ROOT / "outputs" / "models")).resolve()


Batches = list[dict[str, torch.Tensor]]


@dataclass
class Job:
    """A checkpoint, its data, and the numbers of layers to keep.

    Attributes:
        score: Function that measures a model on test data. Tables show its first metric.
        removed: Layers that greedy removal has dropped so far, in order.
        methods: Methods to compare; None for all.
    """

    model: PreTrainedModel
    calibration: Batches
    validation: Batches
    score: Callable[[PreTrainedModel], dict[str, float]]
    keeps: tuple[int, ...]
    shares: tuple[tuple[int, int], ...] = ()
    removed: tuple[int, ...] = ()
    methods: tuple[str, ...] | None = None

    def choose(self, model: PreTrainedModel) -> float:
        """Validation loss that selects the baselines; lower is better."""
        return calibration_loss(model, self.model, self.validation)


def text(split: str) -> str:
    """Text of a WikiText-2 split: train, valid or test."""
    return lzma.decompress((DATA / "data" / "wikitext2" / f"{split}.txt.xz").read_bytes()).decode()


def lines(split: str, count: int) -> list[str]:
    """Up to `count` lines from the start of a WikiText-2 split, each longer than 30 words."""
    return [line.strip() for line in text(split).split("\n") if len(line.split()) > 30][:count]


def encoded(path: Path, texts: list[str], length: int, size: int = 32) -> Batches:
    tokenizer = AutoTokenizer.from_pretrained(path)
    parts = [texts[i : i + size] for i in range(0, len(texts), size)]
    return [dict(tokenizer(p, truncation=True, max_length=length, padding=True, return_tensors="pt")) for p in parts]


def minilm() -> Job:
    path = DATA / "models" / "minilm-l6"
    model = AutoFusedModel.from_pretrained(path, dtype=torch.float32).eval()
    test = encoded(path, lines("test", 256), 96)
    return Job(
        model,
        encoded(path, lines("train", 1280), 96),
        encoded(path, lines("valid", 128), 96),
        lambda student: _fidelity(student, model, test),
        keeps=(3, 4, 5, 2),
    )


def _fidelity(student: PreTrainedModel, model: PreTrainedModel, test: Batches) -> dict[str, float]:
    return embedding_fidelity(student, model, test)


def sst2_train() -> list[list[str]]:
    """Rows of the SST-2 training file, as (text, label)."""
    table = lzma.decompress((DATA / "data" / "sst2" / "train.tsv.xz").read_bytes()).decode()
    return [row.split("\t") for row in table.splitlines()[1:]]


def minilm_sst2() -> Job:
    path = DATA / "models" / "minilm-l6-sst2"
    model = AutoFusedModel.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    # half of the rows are phrases of a few words, unlike the test sentences
    sentences = [text for text in (row[0] for row in sst2_train()) if len(text.split()) >= 10]
    dev = [row.split("\t") for row in (DATA / "data" / "sst2" / "dev.tsv").read_text().splitlines()[1:]]
    test = []
    for i in range(0, len(dev), 64):
        texts, labels = zip(*dev[i : i + 64], strict=True)
        batch = tokenizer(list(texts), truncation=True, max_length=128, padding=True, return_tensors="pt")
        test.append({**batch, "labels": torch.tensor([int(label) for label in labels])})
    return Job(
        model,
        encoded(path, sorted(sentences[:2400], key=len), 96),
        encoded(path, sorted(sentences[-640:], key=len), 96),
        lambda student: classification(student, test),
        keeps=(4, 3),
    )


def gpt2() -> Job:
    path = DATA / "models" / "gpt2-wikitext2"
    model = AutoFusedModel.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    test = windows(tokenizer, "test", 64)
    return Job(
        model,
        windows(tokenizer, "train", 192),
        windows(tokenizer, "valid", 16),
        lambda student: perplexity(student, test),
        keeps=(8, 6, 4, 10),
        shares=tuple((blocks, rank) for blocks in (8, 6, 4) for rank in (0, 8, 32)),
    )


def smollm2() -> Job:
    """SmolLM2 135M."""
    return _language_model("smollm2-135m", "HuggingFaceTB/SmolLM2-135M", keeps=(27, 24), count=48, size=8)


def gemma3() -> Job:
    """Gemma 3 270M. Its vocabulary is large, so that batches are small."""
    return _language_model("gemma3-270m", "google/gemma-3-270m", keeps=(16, 14, 12), count=24, size=2)


def _language_model(folder: str, name: str, keeps: tuple[int, ...], count: int, size: int) -> Job:
    """A language model of LAYERFUSE_MODELS.

    Calibration windows are spread over the training text: the fits of few windows of one article overfit it.

    Args:
        folder: Folder of the checkpoint.
        name: Name on the Hub.
        keeps: Numbers of layers to keep.
        count: Number of calibration windows.
        size: Windows in a batch.
    """
    path = LANGUAGE_MODELS / folder
    if not path.is_dir():
        raise SystemExit(f"{path} is missing: save {name} there, or set LAYERFUSE_MODELS to its folder.")
    model = AutoFusedModel.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    test = windows(tokenizer, "test", 32, size=size)
    return Job(
        model,
        spread_windows(tokenizer, "train", count, size=size),
        windows(tokenizer, "valid", 8, size=size),
        lambda student: perplexity(student, test),
        keeps=keeps,
        methods=(
            "drop: block influence",
            "drop: angular (UIDL)",
            "drop: last layers",
            "ReplaceMe",
            "ours: refit (low)",
        ),
    )


def windows(tokenizer: Any, split: str, count: int, length: int = 256, size: int = 16) -> Batches:
    """Windows of a split, one behind the other from its start. Each starts with the token that starts texts, if any."""
    return _batches(_rows(tokenizer, text(split), count, length), size)


def spread_windows(tokenizer: Any, split: str, count: int, length: int = 256, size: int = 16) -> Batches:
    """Windows as those of `windows`, evenly spread over a split."""
    whole = text(split)
    parts = [whole[i * len(whole) // count :] for i in range(count)]
    return _batches([row for part in parts for row in _rows(tokenizer, part, 1, length)], size)


def _rows(tokenizer: Any, found: str, count: int, length: int) -> list[list[int]]:
    ids = tokenizer(found[: count * length * 8], verbose=False)["input_ids"]
    start = ids[:1] if ids[0] == tokenizer.bos_token_id else []
    ids, own = ids[len(start) :], length - len(start)
    return [start + ids[at : at + own] for at in range(0, count * own, own)]


def _batches(rows: list[list[int]], size: int) -> Batches:
    return [{"input_ids": part} for part in torch.tensor(rows).split(size)]


@torch.inference_mode()
def perplexity(model: PreTrainedModel, batches: Batches) -> dict[str, Any]:
    """Perplexity, and its 95% interval by a bootstrap over windows."""
    losses = []
    for batch in batches:
        logits = model(**batch, use_cache=False).logits[:, :-1].transpose(1, 2)
        losses += torch.nn.functional.cross_entropy(logits.float(), batch["input_ids"][:, 1:], reduction="none").mean(1)
    interval = bootstrap([[loss.item()] for loss in losses], lambda means: np.exp(means[:, 0]))
    mean = math.fsum(loss.item() for loss in losses) / len(losses)
    return {"token_perplexity": math.exp(mean), "token_perplexity_interval": list(interval)}


JOBS: dict[str, Callable[[], Job]] = {"minilm": minilm, "minilm-sst2": minilm_sst2, "gpt2": gpt2}


def drops(job: Job, layers: Any) -> Plan:
    depth = job.model.config.num_hidden_layers
    return Plan(architecture_for(job.model).model_type, depth, tuple(Drop("layer", layer) for layer in sorted(layers)))


def best_drop(job: Job, keep: int) -> Plan:
    """The subset with the lowest validation loss, or a greedy one if there are too many subsets to try."""
    depth = job.model.config.num_hidden_layers
    if math.comb(depth, keep) <= 20:
        plans = [drops(job, gone) for gone in itertools.combinations(range(depth), depth - keep)]
        return min(plans, key=lambda plan: job.choose(apply(job.model, plan)))
    while len(job.removed) < depth - keep:
        options = [(*job.removed, layer) for layer in range(depth) if layer not in job.removed]
        job.removed = min(options, key=lambda layers: job.choose(apply(job.model, drops(job, layers))))
    return drops(job, job.removed[: depth - keep])


def save(results: Any, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    write_whole(path, json.dumps(results, indent=1) + "\n")


def load(path: Path) -> dict[str, Any]:
    """The results in a file; an empty dict if the file does not exist."""
    return json.loads(path.read_text()) if path.is_file() else {}


def command_line(doc: str, jobs: Iterable[str]) -> argparse.ArgumentParser:
    """A parser of the options that all benchmarks share: jobs, and number of threads."""
    names = list(jobs)
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("jobs", nargs="*", choices=[*names, []], help=f"default: all of {', '.join(names)}")
    parser.add_argument("--threads", type=int, default=2)
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options of the command line; this also sets the number of threads and the seed."""
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    return options
