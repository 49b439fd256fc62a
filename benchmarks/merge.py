"""Models within a latency budget: convolutions merged, and blocks of transformers chosen for, against baselines.

    python benchmarks/merge.py [JOB ...] [--threads 2] [--train] [--budgets 0.5 ...] [--methods ours ...]

Data and checkpoints come from LAYERFUSE_DATA (default ../shared). What is merged is decided on 512 training images and
on latencies that are measured here, for each number of threads once (outputs/merge); test images are reported.
Latencies of a model and of the original are measured in turn, on a machine that ought to do nothing else. With
`--train`, models are retrained, and so is the original, on the same budget.

A row that is in benchmarks/results/merge.json, or merge_heal.json, already is not measured again; delete the files to
start afresh.
"""

import argparse
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import fusion
import heal
import torch
from cifar_resnet import published
from transformers import (
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
)

from hf_layerfuse import FusionRecipe, HealRecipe, MergeRecipe, Plan, RecipeError, search, search_merge
from hf_layerfuse.blocktimes import BlockTimes
from hf_layerfuse.budget import batch_of
from hf_layerfuse.calibration import Sample
from hf_layerfuse.evaluate import parameter_counts
from hf_layerfuse.found import Found
from hf_layerfuse.report import describe, text_table
from hf_layerfuse.timing import interleaved

RESULT, TRAINED = (fusion.RESULT.with_name(name) for name in ("merge.json", "merge_heal.json"))
FOLDER = fusion.ROOT / "outputs" / "merge"
BUDGETS = (0.75, 0.6, 0.5, 0.4)
BATCH = 8
"""Images of a forward pass that is timed."""

Search = Callable[[PreTrainedModel, float], Found]
"""From a model and a share of its latency to one that is faster."""


@dataclass
class Compared:
    """A checkpoint, what it is timed with, and what competes.

    Attributes:
        base: the model, calibration and test data.
        inputs: a batch.
        methods: name -> search.
        later: the same of models that are only to be trained.
        trained: makes the job that retrains models; None where there is none.
    """

    name: str
    base: fusion.Job
    inputs: dict[str, torch.Tensor]
    methods: dict[str, Search]
    trained: Callable[[], heal.Job] | None = None
    later: Mapping[str, Search] = field(default_factory=dict)


def tables_of(name: str) -> str:
    return str(FOLDER / f"{name}-{torch.get_num_threads()}")


def convolutions(name: str, base: fusion.Job, trained: Callable[[], heal.Job] | None = None) -> Compared:
    """A classifier of images, whose convolutions are merged."""

    def search(model: PreTrainedModel, budget: float, **options: Any) -> Found:
        recipe = MergeRecipe(budget=budget, batch_size=BATCH, max_kernel=5, tables=tables_of(name), **options)
        return search_merge(model, recipe, base.calibration)

    size = base.model.config.image_size
    methods = {
        "activations removed": {"choose": "activations"},
        "convolutions removed": {"choose": "convolutions"},
        "smallest weights removed": {"choose": "magnitude"},
        "ours, not fitted": {"refit": "none"},
        "ours": {},
    }
    searches = {method: partial(search, **options) for method, options in methods.items()}
    later = {"ours, merged after training": partial(search, method="open")}
    return Compared(name, base, {"pixel_values": torch.randn(BATCH, 3, size, size)}, searches, trained, later)


def blocks(name: str, base: fusion.Job) -> Compared:
    """A transformer, of whose blocks each is chosen for."""
    options = {"latency_batch_size": BATCH, "latency_repeats": 20, "tables": tables_of(name)}

    def chosen(model: PreTrainedModel, budget: float, **more: Any) -> Found:
        return search(model, FusionRecipe(latency_budget=budget, **options, **more), base.calibration)

    def fused(model: PreTrainedModel, budget: float) -> Found:
        """As many layers as the budget allows, whatever else there is."""
        inputs = batch_of(Sample.of(base.calibration), BATCH)
        times = BlockTimes(model, inputs, Path(options["tables"]) / "latency.json", repeats=20)
        keep = int((budget * times.original - times.rest) / times.layer(0))
        found = search(model, FusionRecipe(keep_layers=keep), base.calibration)
        latency = {"original": times.original, "predicted": times.rest + keep * times.layer(0)}
        return replace(found, plan=replace(found.plan, notes={**found.plan.notes, "latency_ms": latency}))

    methods = {
        "layers fused": fused,
        "ours, runs of layers alone": partial(chosen, choose="runs"),
        "ours, sums of losses": partial(chosen, effort="low"),
        "ours": chosen,
    }
    return Compared(name, base, batch_of(Sample.of(base.calibration), BATCH), methods)


def resnet56_trained() -> heal.Job:
    """With 1,000 batches of training, and the answers of the original beside the labels."""
    recipe = HealRecipe(steps=1000, batch_size=64, eval_every=250, temperature=4.0, teacher_top_k=10)
    return heal.images("resnet56", resnet56_model(), recipe, heal.rates(1e-4, 3e-4), pilot=100)


def resnet56_model() -> PreTrainedModel:
    return published(fusion.DATA / "models" / "resnet-cifar10" / "resnet56.safetensors")


def resnet34() -> Compared:
    """The shape of ResNet-34, half as wide and for small images; 62 segments."""
    config = ResNetConfig(
        embedding_size=32, hidden_sizes=[32, 64, 128, 256], depths=[3, 4, 6, 3], layer_type="basic", num_labels=10
    )
    config.image_size = 32
    torch.manual_seed(0)
    model = heal.grown("resnet34", ResNetForImageClassification(config), 3000)
    return convolutions("resnet34", heal.images_base(model))


def mobilenet_v2() -> Compared:
    """Half as wide, for small images, which it makes no smaller than 4 x 4: fewer strides, and 306 segments."""
    config = MobileNetV2Config(image_size=32, depth_multiplier=0.5, output_stride=8, num_labels=10)
    torch.manual_seed(0)
    model = MobileNetV2ForImageClassification(config)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.1  # transformers has TensorFlow's 0.997, which is 0.003 here
    return convolutions("mobilenet-v2", heal.images_base(heal.grown("mobilenet-v2", model, 2000)))


JOBS: dict[str, Callable[[], Compared]] = {
    "resnet56": lambda: convolutions("resnet56", heal.images_base(resnet56_model()), resnet56_trained),
    "resnet34": resnet34,
    "mobilenet-v2": mobilenet_v2,
    "minilm-sst2": lambda: blocks("minilm-sst2", fusion.minilm_sst2()),
    "gpt2": lambda: blocks("gpt2", fusion.gpt2()),
}


def timed(job: Compared, model: PreTrainedModel) -> dict[str, Any]:
    """Milliseconds of a model and of the original for a batch, in turn."""
    with torch.inference_mode():
        runs = {"ms": partial(model, **job.inputs), "original_ms": partial(job.base.model, **job.inputs)}
        found = interleaved(runs, model.device, repeats=40, warmup=5)
    return {name: value.median for name, value in found.items()} | {"spread_ms": found["ms"].spread}


def rows(job: Compared, budgets: Sequence[float], methods: Sequence[str]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Budget, method and what was measured without any training."""
    for budget, method in itertools.product(budgets, methods):
        start = time.perf_counter()
        try:
            found = job.methods[method](job.base.model, budget)
        except RecipeError as error:
            yield f"{budget:.0%}", method, {"refused": str(error)}
            continue
        seconds = time.perf_counter() - start
        times = found.plan.notes["latency_ms"]
        model = found.model.eval()
        yield (
            f"{budget:.0%}",
            method,
            {
                **job.base.score(model),
                **parameter_counts(model),
                **timed(job, model),
                "predicted_ms": times["predicted"],
                "predicted_share": times["predicted"] / times["original"],
                "threads": torch.get_num_threads(),
                "seconds": seconds,
                "edits": describe(found.plan),
            },
        )


def run(name: str, budgets: Sequence[float], methods: Sequence[str]) -> None:
    """Measure all rows of a job that are not there yet, and save after each."""
    job = JOBS[name]()
    known = heal.load(RESULT).get(name, {})
    if "original" not in known:
        known["original"] = {**job.base.score(job.base.model), **parameter_counts(job.base.model)}
    for budget in budgets:
        todo = [method for method in methods or job.methods if method not in known.get(f"{budget:.0%}", {})]
        for share, method, row in rows(job, [budget], todo):
            known.setdefault(share, {})[method] = row
            print(f"{name}, {share}, {method}: {row}", flush=True)
            with heal.updated(RESULT) as results:
                results[name] = known


def train(name: str, budgets: Sequence[float], methods: Sequence[str]) -> None:
    """Retrain what is not there yet, and save after each model."""
    compared = JOBS[name]()
    every = {**compared.methods, **compared.later}
    targets = {f"{budget:.0%} of the time": {"budget": budget} for budget in budgets}
    job = replace(compared.trained(), targets=targets, pilots=tuple(targets)[:1])
    known = heal.save(job, TRAINED, {})

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two are not faster at training small convolutions

    def made(method: str, model: PreTrainedModel, asked: dict[str, Any]) -> tuple[PreTrainedModel, Plan]:
        torch.set_num_threads(threads)  # for which it is timed
        found = every[method](model, asked["budget"])
        torch.set_num_threads(1)
        return found.model, found.plan

    models = [("original", {}, "original", 1, heal.untouched)]
    methods = methods or list(every)
    models += [(t, asked, m, 1, partial(made, m)) for t, asked in targets.items() for m in methods]
    for model in models:
        for news in heal.measure(job, known, *model):
            heal.save(job, TRAINED, news)


QUALITY = {
    "accuracy": ("accuracy", "{:.2%}"),
    "cross_entropy": ("cross-entropy", "{:.3f}"),
    "token_perplexity": ("perplexity", "{:.1f}"),
}
"""Figure -> its name in a table, and its form."""


def table(results: dict[str, Any], name: str) -> list[list[str]]:
    """One row a budget and method: quality, and time against the original's, predicted and measured."""
    found = results[name]
    original = found["original"]
    shown = {key: form for key, (_, form) in QUALITY.items() if key in original}
    made = [[f"{name}, budget", "method", *(QUALITY[key][0] for key in shown), "predicted", "measured", "parameters"]]
    made.append(["100%", "original", *(form.format(original[key]) for key, form in shown.items()), *["100%"] * 3])
    for budget, methods in sorted((item for item in found.items() if item[0] != "original"), reverse=True):
        for method, row in methods.items():
            if "refused" in row:
                made.append([budget, method, "out of reach", *[""] * (len(shown) + 2)])
                continue
            shares = row["predicted_share"], row["ms"] / row["original_ms"], row["parameters"] / original["parameters"]
            quality = [form.format(row[key]) for key, form in shown.items()]
            made.append([budget, method, *quality, *(f"{share:.0%}" for share in shares)])
    return made


def tables(results: dict[str, Any]) -> list[list[list[str]]]:
    """A table for each checkpoint."""
    return [table(results, name) for name in results]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("jobs", nargs="*", choices=[*JOBS, []], help=f"default: all of {', '.join(JOBS)}")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--train", action="store_true", help="retrain models, and measure nothing without training")
    parser.add_argument("--budgets", nargs="*", type=float, default=BUDGETS)
    parser.add_argument("--methods", nargs="*", help="only these")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    for name in options.jobs or JOBS:
        if options.train:
            train(name, options.budgets, options.methods)
        else:
            run(name, options.budgets, options.methods)
    for made in [*tables(heal.load(RESULT)), *heal.tables(heal.load(TRAINED))]:
        print("\n" + text_table(made))


if __name__ == "__main__":
    main()
