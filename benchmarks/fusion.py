"""Fusing without training: every stage of the engine against what else there is, in one run.

    python benchmarks/fusion.py [JOB ...] [--targets "8 layers" ...] [--threads 2]

Data and checkpoints come from LAYERFUSE_DATA (default ../shared). Everything is chosen on calibration data (training
text) or validation data, and reported on test data: WikiText-2 test lines and windows, SST-2 validation sentences (the
split that everybody reports; what has to be chosen is chosen on rows of train). A row that is in
benchmarks/results/fusion.json already is not measured again; delete the file to start afresh.
"""

import argparse
import itertools
import json
import lzma
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import torch
from transformers import AutoTokenizer, PreTrainedModel

from hf_layerfuse import AutoFusedModel, Drop, Fuse, FusionRecipe, Plan, apply
from hf_layerfuse.calibration.recorder import observe
from hf_layerfuse.calibration.refit.transformer import refit
from hf_layerfuse.calibration.samples import Sample
from hf_layerfuse.evaluation.divergence import calibration_loss
from hf_layerfuse.evaluation.metrics import classification, embedding_fidelity, parameter_counts
from hf_layerfuse.math.similarity import Angular
from hf_layerfuse.methods.fusion.grouping import even
from hf_layerfuse.methods.fusion.planner import importances
from hf_layerfuse.methods.fusion.search import search
from hf_layerfuse.models.architectures import adapter_for
from hf_layerfuse.pipeline.report.tables import text_table

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "fusion.json"
PLOT = ROOT / "benchmarks" / "results" / "fusion.png"
DATA = Path(os.environ.get("LAYERFUSE_DATA", ROOT.parent / "shared"))

Batches = list[dict[str, torch.Tensor]]


@dataclass
class Job:
    """A checkpoint, its data, and the depths it is brought to.

    Attributes:
        score: the figures of a model on test data; the first one is the headline.
        removed: layers in the order in which greedy removal takes them.
    """

    model: PreTrainedModel
    calibration: Batches
    validation: Batches
    score: Callable[[PreTrainedModel], dict[str, float]]
    keeps: tuple[int, ...]
    shares: tuple[tuple[int, int], ...] = ()
    removed: tuple[int, ...] = ()

    def choose(self, model: PreTrainedModel) -> float:
        """What baselines are chosen by, on validation data; less is better."""
        return calibration_loss(model, self.model, self.validation)


def lines(split: str, count: int) -> list[str]:
    """The first lines of more than 30 words of a WikiText-2 split."""
    text = lzma.decompress((DATA / "data" / "wikitext2" / f"{split}.txt.xz").read_bytes()).decode()
    return [line.strip() for line in text.split("\n") if len(line.split()) > 30][:count]


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


def minilm_sst2() -> Job:
    path = DATA / "models" / "minilm-l6-sst2"
    model = AutoFusedModel.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    train = lzma.decompress((DATA / "data" / "sst2" / "train.tsv.xz").read_bytes()).decode().splitlines()[1:]
    # half of the rows are phrases of a few words, which the sentences that are tested are not like
    sentences = [text for text in (row.split("\t")[0] for row in train) if len(text.split()) >= 10]
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
    test = _windows(tokenizer, "test", 64)
    return Job(
        model,
        _windows(tokenizer, "train", 192),
        _windows(tokenizer, "valid", 16),
        lambda student: _perplexity(student, test),
        keeps=(8, 6, 4, 10),
        shares=tuple((blocks, rank) for blocks in (8, 6, 4) for rank in (0, 8, 32)),
    )


def _windows(tokenizer: Any, split: str, count: int, length: int = 256) -> Batches:
    text = lzma.decompress((DATA / "data" / "wikitext2" / f"{split}.txt.xz").read_bytes()).decode()
    ids = tokenizer(text[: count * length * 8], verbose=False)["input_ids"][: count * length]
    return [{"input_ids": part} for part in torch.tensor(ids).view(-1, length).split(16)]


@torch.inference_mode()
def _perplexity(model: PreTrainedModel, batches: Batches) -> dict[str, float]:
    total = count = 0
    for batch in batches:
        logits = model(**batch, use_cache=False).logits[:, :-1].flatten(0, 1)
        targets = batch["input_ids"][:, 1:].flatten()
        total += torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum").item()
        count += len(targets)
    return {"token_perplexity": math.exp(total / count)}


JOBS: dict[str, Callable[[], Job]] = {"minilm": minilm, "minilm-sst2": minilm_sst2, "gpt2": gpt2}


def drops(job: Job, layers: Any) -> Plan:
    depth = job.model.config.num_hidden_layers
    return Plan(adapter_for(job.model).model_type, depth, tuple(Drop("layer", layer) for layer in sorted(layers)))


def groups(job: Job, keep: int, operator: str, align: str = "none") -> Plan:
    depth = job.model.config.num_hidden_layers
    edits = (Fuse("layer", g, operator=operator, align=align) for g in even(depth, keep) if len(g) > 1)
    return Plan(adapter_for(job.model).model_type, depth, tuple(edits))


def angular_run(job: Job, count: int) -> range:
    """The run of `count` layers across which the residual stream turns least (UIDL, Gromov et al. 2024)."""
    measure = Angular()
    adapter = adapter_for(job.model)
    observe(job.model, adapter, job.calibration, {"layer": measure.update})
    turned = measure.distance()
    start = min(range(len(turned) - count), key=lambda i: turned[i, i + count].item())
    return range(start + 1, start + 1 + count)


def best_drop(job: Job, keep: int) -> Plan:
    """The best of all subsets on validation data, or where there are too many, greedy removal."""
    depth = job.model.config.num_hidden_layers
    if math.comb(depth, keep) <= 20:
        plans = [drops(job, gone) for gone in itertools.combinations(range(depth), depth - keep)]
        return min(plans, key=lambda plan: job.choose(apply(job.model, plan)))
    while len(job.removed) < depth - keep:
        options = [(*job.removed, layer) for layer in range(depth) if layer not in job.removed]
        job.removed = min(options, key=lambda layers: job.choose(apply(job.model, drops(job, layers))))
    return drops(job, job.removed[: depth - keep])


def depth_methods(job: Job, keep: int) -> Iterator[tuple[str, Callable[[], PreTrainedModel]]]:
    """Name and maker of a model of `keep` layers, baselines first."""
    depth = job.model.config.num_hidden_layers
    made = lambda plan: apply(job.model, plan)  # noqa: E731

    def influence() -> PreTrainedModel:
        order = importances(job.model, Sample.of(job.calibration))
        return made(drops(job, sorted(range(depth), key=order.__getitem__)[: depth - keep]))

    def replace_me() -> PreTrainedModel:
        plan = drops(job, angular_run(job, depth - keep))
        student = made(plan)
        refit(student, job.model, plan, job.calibration, "linear")
        return student

    yield "drop: block influence", influence
    yield "drop: angular (UIDL)", lambda: made(drops(job, angular_run(job, depth - keep)))
    yield "drop: best on validation", lambda: made(best_drop(job, keep))
    yield "average", lambda: made(groups(job, keep, "mean"))
    yield "LaCo", lambda: made(groups(job, keep, "telescope"))
    yield "ReplaceMe", replace_me
    ours = partial(searched, job, keep_layers=keep)
    yield "ours: align", partial(ours, operator="mean", align="rotation", refit="none", effort="low")
    yield "ours: auto, no refit", partial(ours, refit="none")
    yield "ours: refit (low)", partial(ours, effort="low")
    yield "ours (medium)", ours


def searched(job: Job, **options: Any) -> PreTrainedModel:
    return search(job.model, FusionRecipe(**options), job.calibration).model


def measure(job: Job, make: Callable[[], PreTrainedModel]) -> dict[str, Any]:
    """Scores on test data, and size."""
    student = make().eval()
    return {**job.score(student), **parameter_counts(student)}


def run(name: str, results: dict[str, Any], targets: list[str] | None) -> None:
    """Measure all rows of a job, or those of some targets, that are not there yet, and save after each."""
    job = JOBS[name]()
    rows = results.setdefault(name, {})
    if "original" not in rows:
        rows["original"] = {**job.score(job.model), **parameter_counts(job.model)}
    todo = [(f"{keep} layers", method, make) for keep in job.keeps for method, make in depth_methods(job, keep)]
    for blocks, rank in job.shares:
        target = f"share, {blocks} blocks"
        sharing = partial(searched, job, keep_layers=blocks, mode="share", effort="low")
        if rank == 0:
            plain = {"operator": "mean", "cluster": "adjacent", "refit": "none"}
            todo.append((target, "average", partial(sharing, **plain)))
        todo.append((target, f"ours (low), rank {rank}", partial(sharing, rank=rank)))
    for target, method, make in todo:
        if targets and target not in targets:
            continue
        if method not in rows.setdefault(target, {}):
            rows[target][method] = measure(job, make)
            print(f"{name}, {target}, {method}: {rows[target][method]}", flush=True)
            save(results)


def save(results: dict[str, Any], path: Path = RESULT) -> None:
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=1) + "\n")
    temporary.replace(path)


HEADLINE = {
    "minilm": ("cosine", "{:.3f}"),
    "minilm-sst2": ("accuracy", "{:.2%}"),
    "gpt2": ("token_perplexity", "{:.1f}"),
}


def table(results: dict[str, Any], name: str, targets: str) -> list[list[str]]:
    """One row a method, one column a target, whose name has `targets` in it.

    Where weights are shared, methods differ in size: the share of block parameters that is left stands beside.
    """
    rows, (metric, form) = results[name], HEADLINE[name]
    columns = sorted((target for target in rows if targets in target), key=_size, reverse=True)
    methods = dict.fromkeys(method for column in columns for method in rows[column])
    first = [f"{name}, {metric.replace('_', ' ')}; original {form.format(rows['original'][metric])}", *columns]
    whole = rows["original"]["non_embedding_parameters"]

    def cell(row: dict[str, Any] | None) -> str:
        if row is None:
            return ""
        size = f" ({row['non_embedding_parameters'] / whole:.0%})" if targets == "share" else ""
        return form.format(row[metric]) + size

    return [first, *([method, *(cell(rows[column].get(method)) for column in columns)] for method in methods)]


def tables(results: dict[str, Any]) -> list[list[list[str]]]:
    """A table for each checkpoint and way to be smaller."""
    kinds = [(name, kind) for name in results for kind in ("layers", "share")]
    return [table(results, *pair) for pair in kinds if any(pair[1] in target for target in results[pair[0]])]


def _size(target: str) -> int:
    return int("".join(filter(str.isdigit, target)))


def plot(results: dict[str, Any]) -> None:
    """Quality against size, every method a line."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(5 * len(results), 4.2), squeeze=False)
    for axis, (name, rows) in zip(axes[0], results.items(), strict=True):
        metric, _ = HEADLINE[name]
        columns = sorted((target for target in rows if "layers" in target), key=_size, reverse=True)
        for i, method in enumerate(dict.fromkeys(m for column in columns for m in rows[column])):
            found = [rows[column][method] for column in columns if method in rows[column]]
            sizes = [row["parameters"] / rows["original"]["parameters"] for row in found]
            style = (
                {"marker": "o", "linewidth": 2.2} if method.startswith("ours") else {"marker": ".", "linestyle": ":"}
            )
            axis.plot(sizes, [row[metric] for row in found], label=method, color=f"C{i}", **style)
        axis.axhline(rows["original"][metric], color="grey", linewidth=0.8)
        axis.set(title=name, xlabel="share of the parameters", ylabel=metric.replace("_", " "))
        if "perplexity" in metric:
            # averages that break the model would press all others into one line
            most = 10 * rows["original"][metric]
            axis.set_yscale("log")
            axis.set_ylim(0.95 * rows["original"][metric], most)
            axis.set_ylabel(f"{metric.replace('_', ' ')} (up to {most:.0f})")
    axes[0, -1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(PLOT, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("jobs", nargs="*", choices=[*JOBS, []], help=f"default: all of {', '.join(JOBS)}")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--targets", nargs="*", help="only these, such as '8 layers' or 'share, 6 blocks'")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    results = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    for name in options.jobs or JOBS:
        run(name, results, options.targets)
    for rows in tables(results):
        print("\n" + text_table(rows))
    plot(results)


if __name__ == "__main__":
    main()
