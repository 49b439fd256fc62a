"""Linear MLPs: our fit against dropping MLPs and against W2 W1, without training and after retraining.

    python benchmarks/collapse.py [JOB ...] [--threads 2] [--train] [--counts 4 ...] [--methods fitted ...]

Data and checkpoints come from LAYERFUSE_DATA (default ../shared), as in the fusion benchmark. In addition, a small ViT
is trained on CIFAR-10 and kept in outputs/grown; its training is short enough for CPUs. MLPs and weights are chosen on
calibration data (training text or images), and results are reported on test data. Each method changes the MLPs with the
lowest cost when changed alone, measured on the same calibration sequences. With `--train`, models are retrained
instead, with the budgets of benchmarks/heal.py, and compared with the retrained originals of that benchmark.

Rows that are already in benchmarks/results/collapse.json or collapse_heal.json are not measured again. Delete these
files to start afresh.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, cached_property
from typing import Any

import common
import retraining
import torch
from figures import figure, headline, title
from transformers import ViTConfig, ViTForImageClassification

from hf_layerfuse import Blend, CollapseRecipe, Drop, HealRecipe, Linearize, Plan, apply, refit, search_collapse
from hf_layerfuse.calibration.samples import Sample
from hf_layerfuse.evaluation.divergence import calibration_loss
from hf_layerfuse.evaluation.metrics import parameter_counts
from hf_layerfuse.methods.base import SearchResult
from hf_layerfuse.models.architectures import architecture_for
from hf_layerfuse.pipeline.report.tables import text_table

RESULT, TRAINED = (common.RESULTS.joinpath(name) for name in ("collapse.json", "collapse_heal.json"))
CHECKPOINTS = retraining.CHECKPOINTS.with_name("collapse")
COUNTS = {"minilm-sst2": (1, 2, 3, 4), "gpt2": (1, 2, 3, 4, 6), "vit-cifar10": (1, 2, 3, 4)}
TRAINED_COUNTS = {"minilm-sst2": (4, 3, 2, 1), "gpt2": (4, 6, 2, 1), "vit-cifar10": (2, 4)}
"""Numbers of MLPs in the models to retrain. The first number selects the learning rate."""

Make = Callable[[int], retraining.Made]
"""Function of the number of MLPs to change. It returns the model and its plan."""


def vit_config() -> ViTConfig:
    """A ViT that reads 64 patches."""
    return ViTConfig(
        hidden_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=512,
        image_size=32,
        patch_size=4,
        num_labels=10,
    )


def vit_cifar10() -> retraining.Job:
    torch.manual_seed(0)
    model = retraining.grown("vit", ViTForImageClassification(vit_config()), 5000)
    recipe = HealRecipe(steps=400, batch_size=64, eval_every=100, teacher_top_k=10)
    return retraining.images("vit-cifar10", model, recipe, retraining.rates(1e-4, 3e-4, 1e-3), pilot=100)


def minilm_sst2() -> retraining.Job:
    """MiniLM with losses mostly of hidden states.

    The original was trained on the same sentences and has memorised their labels. With these losses, the fitted model
    with four linear MLPs has a lower validation loss than with the options of benchmarks/heal.py.
    """
    option = {"learning_rate": 5e-5, "dropout": 0.0, "hidden_weight": 5.0, "ce_weight": 0.3}
    return replace(retraining.minilm_sst2(), options=[option])


JOBS = {"minilm-sst2": minilm_sst2, "gpt2": retraining.gpt2, "vit-cifar10": vit_cifar10}


def dropping(job: common.Job) -> Make:
    """Baseline that drops MLPs, those with the lowest calibration loss first."""
    depth, kind = job.model.config.num_hidden_layers, architecture_for(job.model).model_type
    held_out = Sample.of(job.calibration).held_out_batches

    def without(layers: list[int]) -> retraining.Made:
        plan = Plan(kind, depth, tuple(Drop("mlp", layer) for layer in sorted(layers)))
        return apply(job.model, plan), plan

    @cache
    def order() -> list[int]:
        return sorted(range(depth), key=lambda layer: calibration_loss(without([layer])[0], job.model, held_out))

    return lambda count: without(order()[:count])


class Collapsing:
    """Models of a job whose cheapest MLPs are linear. The cost of each MLP is measured once, for any number of MLPs.

    Args:
        job: Checkpoint with calibration data.
        refit: Extent of the repair, as in `CollapseRecipe`.
    """

    def __init__(self, job: common.Job, refit: str = "full") -> None:
        self.job, self.refit = job, refit

    @cached_property
    def order(self) -> list[int]:
        """Layers in the order in which `collapse` selects them. All MLPs of these models have the same size."""
        losses = self.searched(1).plan.notes.losses
        return [row.edit.layer for row in sorted(losses, key=lambda row: row.loss)]

    def searched(self, count: int, **options: Any) -> SearchResult:
        recipe = CollapseRecipe(count=count, refit=self.refit, **options)
        return search_collapse(self.job.model, recipe, self.job.calibration)

    def deepest(self, count: int) -> retraining.Made:
        found = self.searched(count, order="deepest")
        return found.model, found.plan

    def fitted(self, count: int) -> retraining.Made:
        model, plan = self._made(Linearize, count)
        refit(model, self.job.model, plan, self.job.calibration, self.refit)
        return model, plan

    def homotopy(self, count: int) -> retraining.Made:
        return self._made(Blend, count)

    def _made(self, edit: type[Linearize | Blend], count: int) -> retraining.Made:
        model = self.job.model
        depth, kind = model.config.num_hidden_layers, architecture_for(model).model_type
        plan = Plan(kind, depth, tuple(map(edit, sorted(self.order[:count]))))
        return apply(model, plan, self.job.calibration), plan


def methods(job: common.Job) -> Iterator[tuple[str, Make]]:
    """Name of each method, and its function of the number of MLPs; baselines first."""
    ours = Collapsing(job)
    yield "dropped", dropping(job)
    yield "W2 W1", Collapsing(job, "none").fitted
    yield "fitted, deepest first", ours.deepest
    yield "fitted", ours.fitted


def run(name: str) -> None:
    """Measure all missing rows of a job, and save after each."""
    job = common.JOBS[name]() if name in common.JOBS else JOBS[name]().base
    rows = common.load(RESULT).get(name, {})

    def save() -> None:
        with retraining.updated(RESULT) as results:
            results[name] = rows

    if "original" not in rows:
        depth = job.model.config.num_hidden_layers
        rows["original"] = {**job.score(job.model), **parameter_counts(job.model), "depth": depth}
    for method, make in methods(job):
        for count in COUNTS[name]:
            known = rows.setdefault(str(count), {})
            if method in known:
                continue
            model, plan = make(count)
            layers = [edit.layer for edit in plan.edits]
            known[method] = {**job.score(model.eval()), **parameter_counts(model), "layers": layers}
            print(f"{name}, {count}, {method}: {known[method]}", flush=True)
            save()


def train(name: str, counts: Sequence[int], methods: Sequence[str] | None) -> None:
    """Retrain all missing models, or those of some methods, and save after each model."""
    job = JOBS[name]()
    before = retraining.current(job, common.load(common.RESULTS / "heal.json").get(name, {}))
    if any(choice["options"] != job.options for choice in before["chosen"].values()):  # trained in another way
        before = retraining.current(job, {})
    targets = {f"{count} MLPs": {"count": count} for count in TRAINED_COUNTS[name]}
    job = replace(job, targets=targets, pilots=tuple(targets)[:1])
    original = before["models"].get("original", {})
    chosen = {row: choice for row, choice in before["chosen"].items() if row.startswith("original")}
    known = retraining.save(job, TRAINED, {"chosen": chosen, "models": {"original": original}})
    drop, ours = dropping(job.base), Collapsing(job.base)
    todo = {
        "dropped": lambda model, asked: drop(asked["count"]),
        "fitted": lambda model, asked: ours.fitted(asked["count"]),
        "homotopy": lambda model, asked: ours.homotopy(asked["count"]),
    }
    models = [("original", {}, "original", 1, retraining.untouched)]
    models += [(target, asked, method, 1, step) for target, asked in targets.items() for method, step in todo.items()]
    for model in models:
        _, asked, method, *_ = model
        if asked and (asked["count"] not in counts or (methods and method not in methods)):
            continue
        for news in retraining.measure(job, known, *model):
            retraining.save(job, TRAINED, news)


def table(results: dict[str, Any], name: str) -> list[list[str]]:
    """One row per method, one column per number of MLPs; the cross-entropy follows an accuracy in brackets."""
    rows, metric = results[name], headline(name)
    original = rows["original"]

    def cell(row: dict[str, Any]) -> str:
        if not row:
            return ""
        beside = f" ({row['cross_entropy']:.3f})" if "cross_entropy" in row else ""
        return figure(row, metric) + beside

    columns = {count: found for count, found in rows.items() if count != "original"}
    names = dict.fromkeys(method for found in columns.values() for method in found)
    sizes = [next(iter(reversed(found.values())))["non_embedding_parameters"] for found in columns.values()]
    whole = original["non_embedding_parameters"]
    return [
        [
            f"{title(name, original['parameters'])}: {metric.replace('_', ' ')}; original {cell(original)}",
            *(f"{count} of {original['depth']} MLPs" for count in columns),
        ],
        ["block parameters", *(f"{size / whole:.0%}" for size in sizes)],
        *([method, *(cell(found.get(method, {})) for found in columns.values())] for method in names),
    ]


def tables(results: dict[str, Any]) -> list[list[list[str]]]:
    """One table per checkpoint."""
    return [table(results, name) for name in results]


def main() -> None:
    parser = common.command_line(__doc__, COUNTS)
    parser.add_argument("--train", action="store_true", help="retrain the models instead of measuring them untrained")
    parser.add_argument("--counts", nargs="*", type=int, help="numbers of linear MLPs to retrain; default: all")
    parser.add_argument("--methods", nargs="*", help="methods to retrain: dropped, fitted, homotopy; default: all")
    options = common.parsed(parser)
    for name in options.jobs or COUNTS:
        if options.train:
            train(name, options.counts or TRAINED_COUNTS[name], options.methods)
        else:
            run(name)
    for rows in [*tables(common.load(RESULT)), *retraining.tables(common.load(TRAINED))]:
        print("\n" + text_table(rows))


if __name__ == "__main__":
    main()
