"""Models within a latency budget, against baselines: merged convolutions, and edits chosen per transformer block.

    python benchmarks/merge.py [JOB ...] [--device cuda] [--train] [--budgets 0.5 ...] [--methods ours ...]

Data and checkpoints come from LAYERFUSE_DATA (default ../shared). Losses on 512 training images and measured latencies
select the merges. The latencies are measured once per device and number of threads, and kept in outputs/merge. Results
are reported on test images. A model and the original are timed in turn: leave the machine otherwise idle. With
`--train`, models and the original are retrained with the same budget.

Rows that are already in benchmarks/results/merge.json or merge_heal.json are not measured again. Delete these files to
start afresh. Rows of a GPU are in merge_cuda.json and merge_heal_cuda.json.
"""

import argparse
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import common
import retraining
import torch
from cifar_resnet import published
from figures import figure, title
from transformers import (
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
)

from hf_layerfuse import FusionRecipe, HealRecipe, MergeRecipe, Plan, RecipeError, apply, search, search_merge
from hf_layerfuse.calibration.samples import Sample
from hf_layerfuse.evaluation.metrics import parameter_counts
from hf_layerfuse.evaluation.timing import device_name, interleaved
from hf_layerfuse.methods.base import SearchResult
from hf_layerfuse.methods.fusion.block_latency import BlockLatencies
from hf_layerfuse.methods.fusion.latency_search import batch_of
from hf_layerfuse.methods.merge.candidates import folded_plan
from hf_layerfuse.pipeline.report.tables import text_table
from hf_layerfuse.plan import PlanLatency
from hf_layerfuse.plan.words import describe

FOLDER = common.ROOT / "outputs" / "merge"
BUDGETS = (0.75, 0.6, 0.5, 0.4)
BATCH = {"cpu": 8, "cuda": 128}
"""Images or texts in a timed forward pass, by device."""


def result(device: str, trained: bool = False) -> Path:
    """The results file of a device, for untrained or retrained models."""
    return common.RESULTS.joinpath(f"merge{'_heal' * trained}{'' if device == 'cpu' else f'_{device}'}.json")


Search = Callable[[PreTrainedModel, float], SearchResult]
"""Function of a model and the share of its latency to keep. It returns a faster model."""


@dataclass
class Compared:
    """A checkpoint, its inputs for timing, and the competing methods.

    Attributes:
        base: The model, calibration and test data.
        inputs: Function that makes a batch of a given size.
        methods: Searches by name.
        free: Searches that ignore the budget, by name.
        trained: Function of a device that makes the job for retraining; None without retraining.
        later: Searches by name whose segments are merged after training.
    """

    name: str
    base: common.Job
    inputs: Callable[[int], dict[str, torch.Tensor]]
    methods: dict[str, Search]
    free: Mapping[str, Search] = field(default_factory=dict)
    trained: Callable[[str], retraining.Job] | None = None
    later: Mapping[str, Search] = field(default_factory=dict)


def tables_of(name: str, device: str) -> str:
    return str(FOLDER / f"{name}-{torch.get_num_threads() if device == 'cpu' else device}")


def convolutions(name: str, base: common.Job, trained: Callable[[str], retraining.Job] | None = None) -> Compared:
    """An image classifier whose convolutions are merged."""

    def search(model: PreTrainedModel, budget: float, **options: Any) -> SearchResult:
        device = model.device.type
        measured = {"latency_batch_size": BATCH[device], "max_kernel": 5, "tables": tables_of(name, device)}
        return search_merge(model, MergeRecipe(latency_budget=budget, **measured, **options), base.calibration)

    def folded(model: PreTrainedModel, budget: float) -> SearchResult:
        """The original with its batch norms folded, as inference runtimes do; it computes the same outputs."""
        plan = folded_plan(model)
        return SearchResult(apply(model, plan), plan, None)

    def inputs(count: int) -> dict[str, torch.Tensor]:
        size = base.model.config.image_size
        return {"pixel_values": torch.randn(count, 3, size, size)}

    methods = {
        "activations removed": {"choose": "activations"},
        "convolutions removed": {"choose": "convolutions"},
        "smallest weights removed": {"choose": "magnitude"},
        "ours, not fitted": {"refit": "none"},
        "ours, segments trained": {"tune_steps": 4},
        "ours": {},
    }
    searches = {method: partial(search, **options) for method, options in methods.items()}
    later = {
        f"{method}, merged after training": partial(search, method="open", **options)
        for method, options in methods.items()
        if options.get("refit") != "none"  # merging after training never fits
    }
    return Compared(name, base, inputs, searches, {"batch norms folded": folded}, trained, later)


def blocks(name: str, base: common.Job) -> Compared:
    """A transformer with one edit chosen per block."""
    sample = Sample.of(base.calibration)

    def chosen(model: PreTrainedModel, budget: float, **more: Any) -> SearchResult:
        device = model.device.type
        options = {"latency_batch_size": BATCH[device], "latency_repeats": 20, "tables": tables_of(name, device)}
        return search(model, FusionRecipe(latency_budget=budget, **options, **more), base.calibration)

    def fused(model: PreTrainedModel, budget: float) -> SearchResult:
        """Baseline that fuses whole layers, and keeps as many as the budget allows."""
        device = model.device.type
        inputs = batch_of(sample, BATCH[device])
        times = BlockLatencies(model, inputs, Path(tables_of(name, device)) / "latency.json", repeats=20)
        keep = int((budget * times.original - times.rest) / times.layer(0))
        found = search(model, FusionRecipe(keep_layers=keep), base.calibration)
        latency = PlanLatency(times.original, times.rest + keep * times.layer(0))
        return replace(found, plan=replace(found.plan, notes=replace(found.plan.notes, latency_ms=latency)))

    methods = {
        "layers fused": fused,
        "ours, runs of layers alone": partial(chosen, choose="runs"),
        "ours, sums of losses": partial(chosen, effort="low"),
        "ours": chosen,
    }
    return Compared(name, base, partial(batch_of, sample), methods)


def resnet56_trained(device: str) -> retraining.Job:
    """ResNet-56 trained on labels and on the logits of the original: 1,000 batches, or many more on a GPU."""
    if device == "cpu":
        recipe = HealRecipe(steps=1000, batch_size=64, eval_every=250, temperature=4.0, teacher_top_k=10)
        return retraining.images("resnet56", resnet56_model(), recipe, retraining.rates(1e-4, 3e-4, 1e-3), pilot=100)
    recipe = HealRecipe(steps=2500, batch_size=256, eval_every=250, temperature=4.0, mixed_precision="no")
    return retraining.images("resnet56", resnet56_model(), recipe, retraining.rates(1e-3), pilot=0)


def resnet56_model() -> PreTrainedModel:
    return published(common.DATA / "models" / "resnet-cifar10" / "resnet56.safetensors")


def resnet34_config() -> ResNetConfig:
    """ResNet-34 at half width, for small images; 62 segments."""
    config = ResNetConfig(
        embedding_size=32, hidden_sizes=[32, 64, 128, 256], depths=[3, 4, 6, 3], layer_type="basic", num_labels=10
    )
    config.image_size = 32
    return config


def resnet34() -> Compared:
    torch.manual_seed(0)
    model = retraining.grown("resnet34", ResNetForImageClassification(resnet34_config()), 3000)
    return convolutions("resnet34", retraining.images_base(model))


def mobilenet_v2_config() -> MobileNetV2Config:
    """MobileNetV2 at half width, for small images; fewer strides, so that states stay at least 4 x 4; 306 segments."""
    return MobileNetV2Config(
        image_size=32, depth_multiplier=0.5, output_stride=8, num_labels=10, classifier_dropout_prob=0.1
    )


def mobilenet_v2() -> Compared:
    torch.manual_seed(0)
    model = MobileNetV2ForImageClassification(mobilenet_v2_config())
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.1  # transformers passes TensorFlow's 0.997, which means 0.003 in PyTorch
    steps = 3500 if torch.cuda.is_available() else 2000
    return convolutions("mobilenet-v2", retraining.images_base(retraining.grown("mobilenet-v2", model, steps)))


JOBS: dict[str, Callable[[], Compared]] = {
    "resnet56": lambda: convolutions("resnet56", retraining.images_base(resnet56_model()), resnet56_trained),
    "resnet34": resnet34,
    "mobilenet-v2": mobilenet_v2,
    "minilm-sst2": lambda: blocks("minilm-sst2", common.minilm_sst2()),
    "gpt2": lambda: blocks("gpt2", common.gpt2()),
}


def timed(job: Compared, model: PreTrainedModel) -> dict[str, Any]:
    """Milliseconds per batch of a model and of the original, timed in turn."""
    inputs = {name: tensor.to(model.device) for name, tensor in job.inputs(BATCH[model.device.type]).items()}
    with torch.inference_mode():
        runs = {"ms": partial(model, **inputs), "original_ms": partial(job.base.model, **inputs)}
        found = interleaved(runs, model.device, repeats=40, warmup=5)
    times = {name: value.median for name, value in found.items()} | {"spread_ms": found["ms"].spread}
    return times | {"threads": torch.get_num_threads(), "device": device_name(model.device)}


def rows(job: Compared, budgets: Sequence[float], methods: Sequence[str]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Budget, method and measurements of each model, without any training."""
    searches = {**job.methods, **job.free}
    for budget, method in itertools.product(budgets, methods):
        start = time.perf_counter()
        try:
            found = searches[method](job.base.model, budget)
        except RecipeError as error:
            yield f"{budget:.0%}", method, {"refused": str(error)}
            continue
        seconds = time.perf_counter() - start
        times = found.plan.notes.latency_ms
        predicted = {}
        if times is not None:
            predicted = {"predicted_ms": times.predicted, "predicted_share": times.predicted / times.original}
        model = found.model.eval()
        yield (
            f"{budget:.0%}",
            method,
            {
                **job.base.score(model),
                **parameter_counts(model),
                **timed(job, model),
                **predicted,
                "seconds": seconds,
                "edits": describe(found.plan),
            },
        )


def asked_of(methods: Sequence[str] | None, known: Iterable[str]) -> list[str]:
    """The requested methods, by default all; an unknown one ends the program."""
    if unknown := sorted(set(methods or ()) - set(known)):
        raise SystemExit(f"unknown method {', '.join(unknown)}: choose from {', '.join(known)}.")
    return list(methods or known)


def run(name: str, device: str, budgets: Sequence[float], methods: Sequence[str]) -> None:
    """Measure all missing rows of a job, and save after each."""
    job = JOBS[name]()
    job.base.model.to(device)
    known = common.load(result(device)).get(name, {})
    if "original" not in known:
        model = job.base.model
        known["original"] = {**job.base.score(model), **parameter_counts(model)}
        if hasattr(model.config, "trained"):
            known["original"]["trained"] = model.config.trained
    for budget in (1.0, *budgets):
        every = job.free if budget == 1 else asked_of(methods, job.methods)
        todo = [method for method in every if method not in known.get(f"{budget:.0%}", {})]
        for share, method, row in rows(job, [budget], todo):
            known.setdefault(share, {})[method] = row
            print(f"{name}, {share}, {method}: {row}", flush=True)
            with retraining.updated(result(device)) as results:
                results[name] = known


def train(name: str, device: str, budgets: Sequence[float], methods: Sequence[str]) -> None:
    """Retrain all missing models, and save after each; `methods` may include the original."""
    compared, path = JOBS[name](), result(device, trained=True)
    every = {**compared.methods, **compared.later}
    targets = {f"{budget:.0%} of the time": {"budget": budget} for budget in budgets}
    job = replace(compared.trained(device), targets=targets, pilots=tuple(targets)[:1])
    job.base.model.to(device)
    known = retraining.save(job, path, {})

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two threads are not faster at training small convolutions

    def made(method: str, model: PreTrainedModel, asked: dict[str, Any]) -> tuple[PreTrainedModel, Plan]:
        torch.set_num_threads(threads)  # the number of threads for timing
        found = every[method](model, asked["budget"])
        torch.set_num_threads(1)
        return found.model, found.plan

    methods = asked_of(methods, ["original", *every])
    models = [("original", {}, "original", 1, retraining.untouched)] if "original" in methods else []
    models += [(t, asked, m, 1, partial(made, m)) for t, asked in targets.items() for m in methods if m in every]
    for model in models:
        for news in retraining.measure(job, known, *model):
            retraining.save(job, path, news)


QUALITY = {"accuracy": "accuracy", "cross_entropy": "cross-entropy", "token_perplexity": "token perplexity"}
"""Heading in a table, by metric."""


def table(results: dict[str, Any], name: str) -> list[list[str]]:
    """One row per budget and method: quality, and predicted and measured time as shares of the original's."""
    found = results[name]
    original = found["original"]
    shown = [key for key in QUALITY if key in original]
    named = f"{title(name, original['parameters'])}: budget"
    made = [[named, "method", *(QUALITY[key] for key in shown), "predicted", "measured", "parameters"]]
    made.append(["100%", "original", *(figure(original, key) for key in shown), *["100%"] * 3])
    budgets = sorted((name for name in found if name != "original"), key=lambda name: -float(name.rstrip("%")))
    for budget, method, row in ((name, *item) for name in budgets for item in found[name].items()):
        if "refused" in row:
            made.append([budget, method, "out of reach", *[""] * (len(shown) + 2)])
            continue
        predicted = f"{row['predicted_share']:.0%}" if "predicted_share" in row else ""
        shares = row["ms"] / row["original_ms"], row["parameters"] / original["parameters"]
        quality = [figure(row, key) for key in shown]
        made.append([budget, method, *quality, predicted, *(f"{share:.0%}" for share in shares)])
    return made


def tables(results: dict[str, Any]) -> list[list[list[str]]]:
    """One table per checkpoint."""
    return [table(results, name) for name in results]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("jobs", nargs="*", choices=[*JOBS, []], help=f"default: all of {', '.join(JOBS)}")
    parser.add_argument("--device", choices=BATCH, default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--train", action="store_true", help="retrain the models instead of measuring them untrained")
    parser.add_argument("--budgets", nargs="*", type=float, default=BUDGETS)
    parser.add_argument("--methods", nargs="*", help="methods to measure; default: all")
    options = common.parsed(parser)
    for name in options.jobs or JOBS:
        measure = train if options.train else run
        measure(name, options.device, options.budgets, options.methods)
    measured, trained = (common.load(result(options.device, trained)) for trained in (False, True))
    for made in [*tables(measured), *retraining.tables(trained)]:
        print("\n" + text_table(made))


if __name__ == "__main__":
    main()
