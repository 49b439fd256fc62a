"""Merged convolutions: measured, chosen exactly, fitted, and cached in files."""

import copy
import itertools
import json
import math
import random

import pytest
import torch
from helpers import CONV_GRAPHS, cifar_resnet, network, some_batches, tiny_model
from torch import nn

from hf_layerfuse import (
    ConvGraphArchitecture,
    LayerFuseError,
    MergeConvs,
    MergeRecipe,
    RecipeError,
    UnsupportedModelError,
    apply,
    architecture_for,
    merge,
    merge_convs,
    refit,
    search_merge,
    verify,
)
from hf_layerfuse.calibration.samples import Sample
from hf_layerfuse.evaluation.divergence import calibration_loss
from hf_layerfuse.evaluation.timing import Timed
from hf_layerfuse.methods.merge.candidates import (
    LossImportance,
    Segment,
    cheapest,
    folded_plan,
    segment_candidates,
)
from hf_layerfuse.methods.merge.finetune import tune
from hf_layerfuse.methods.merge.search import choose, frontier
from hf_layerfuse.methods.merge.segment_latency import SegmentLatencies
from hf_layerfuse.models.architectures.segments import ConvGraph, ConvNode

CIFAR = cifar_resnet()


def images(model, count: int = 10) -> list[dict[str, torch.Tensor]]:
    return [{name: tensor.to(model.dtype) for name, tensor in batch.items()} for batch in some_batches(model, count)]


@pytest.fixture(scope="module")
def cifar():
    return copy.deepcopy(network("cifar")).float()


class Known:
    """A table of known milliseconds or losses of entries."""

    rest, original = 0.0, 100.0

    def __init__(self, values):
        self.values = values

    def of(self, candidate):
        return self.values[candidate]


@pytest.mark.parametrize("seed", range(5))
def test_the_best_choice_of_all(seed):
    """The sum of losses is the lowest of all choices of segments within the budget."""
    chance = random.Random(seed)
    nodes = [ConvNode(3, 1, 4, 4, norm=chance.random()) for _ in range(7)]
    graph = ConvGraph(nodes, skips=[(0, 2), (2, 4)])
    candidates = [Segment.of(*row) for row in graph.table()]
    cost = Known({candidate: float(chance.randrange(1, 9)) for candidate in candidates})
    loss = Known({candidate: chance.random() for candidate in candidates})
    every = []
    for count in range(graph.length):
        for cuts in itertools.combinations(range(1, graph.length), count):
            parts = list(itertools.pairwise((0, *cuts, graph.length)))
            ways = [
                [candidate for candidate in candidates if (candidate.start, candidate.end) == part] for part in parts
            ]
            every += itertools.product(*ways)
    for limit in (12.0, 18.0, 30.0):
        found = choose(candidates, cost, loss, limit, graph.length)
        fitting = [way for way in every if sum(map(cost.of, way)) <= limit]
        assert sum(map(cost.of, found)) <= limit
        assert sum(map(loss.of, found)) == pytest.approx(min(sum(map(loss.of, way)) for way in fitting))
    assert [sum(map(cost.of, path)) for path in frontier(candidates, cost, loss, 30.0, graph.length)] == sorted(
        sum(map(cost.of, path)) for path in frontier(candidates, cost, loss, 30.0, graph.length)
    )
    for chosen in frontier(candidates, cost, loss, 30.0, graph.length):
        assert chosen == choose(candidates, cost, loss, sum(map(cost.of, chosen)) + 1e-9, graph.length)
    best = choose(candidates, cost, loss, 20.0, graph.length, published=True)
    fitting = [way for way in every if sum(map(cost.of, way)) <= 20]
    worth = max(sum(math.exp(-loss.of(candidate)) for candidate in way) for way in fitting)
    assert sum(math.exp(-loss.of(candidate)) for candidate in best) == pytest.approx(worth)
    least = min(sum(map(cost.of, way)) for way in every)
    with pytest.raises(RecipeError, match=f"the fastest available plan takes {least:.3g} ms, {least:.0f}% of"):
        choose(candidates, cost, loss, least - 1, graph.length)


@pytest.mark.parametrize("name", ["cifar", "basic", "bottleneck", "mobilenet"])
def test_a_merged_model_is_fitted(name):
    """The fit brings the output of each segment closer to the original's on unseen images, and never raises the
    loss."""
    model = network(name)
    candidates = [candidate for candidate in segment_candidates(model, 3) if candidate.end - candidate.start == 2]
    edits = [candidate.edit for candidate in candidates[:1] + candidates[-1:]]
    if edits[0] == edits[1] or edits[0].end > edits[1].start:
        edits = edits[:1]
    plan = folded_plan(model, edits)
    small = apply(model, plan)
    batches = images(model)
    report = refit(small, model, plan, batches)
    assert report.after <= report.before
    assert report.after == pytest.approx(calibration_loss(small, model, Sample.of(batches).held_out_batches))
    assert all(row["after"] <= row["before"] for row in report.blocks)
    assert [row["segment"] for row in report.blocks] == [[edit.start, edit.end] for edit in edits]
    assert verify(small)["reload"] == 0


def test_what_one_convolution_can_compute_is_found():
    """A block without its inner activation, whose first convolution is the identity, becomes one convolution
    exactly."""
    model = copy.deepcopy(network("cifar"))
    block = model.layers[1]
    block.act1, block.bn1 = nn.Identity(), nn.BatchNorm2d(4).double().eval()
    nn.init.dirac_(block.conv1.weight)
    plan = folded_plan(model, [MergeConvs(2, 4, (4,))])
    small = apply(model, plan)
    nn.init.normal_(small.layers[1].conv1.weight)
    report = refit(small, model, plan, images(model, 24))
    assert report.kept
    assert report.after < 1e-4 * report.before


def test_folding_all_batch_norms_changes_nothing():
    for name in ("cifar", "mobilenet", "bottleneck"):
        model = network(name)
        small = apply(model, folded_plan(model))
        batch = images(model, 1)[0]
        with torch.inference_mode():
            torch.testing.assert_close(small(**batch).logits, model(**batch).logits, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("steady")
def test_a_budget_is_kept(cifar, tmp_path):
    """The predicted latency meets the budget, tables serve other budgets, and a smaller budget has no lower loss."""
    batches, losses = images(cifar), []
    for budget in (0.9, 0.7):
        recipe = MergeRecipe(latency_budget=budget, latency_batch_size=4, latency_repeats=5, tables=str(tmp_path))
        found = search_merge(cifar, recipe, batches)
        times = found.plan.notes.latency_ms
        assert times.predicted <= budget * times.original * (1 + 1e-9)
        losses.append(sum(row.loss for row in found.plan.notes.losses))
        assert found.report.after <= found.report.before
    assert losses[0] <= losses[1]
    least = times.rest + 1
    with pytest.raises(RecipeError, match="the fastest available plan takes"):
        search_merge(
            cifar, MergeRecipe(latency_ms=least, latency_batch_size=4, latency_repeats=5, tables=str(tmp_path)), batches
        )
    found = search_merge(
        cifar,
        MergeRecipe(latency_budget=0.8, latency_batch_size=4, latency_repeats=5, method="open", tables=str(tmp_path)),
        batches,
    )
    assert not any(edit.merged for edit in found.plan.edits)
    closed, plan = merge_convs(found.model)
    assert len(plan.edits) == len(found.plan.edits)
    assert closed.num_parameters() < cifar.num_parameters()


def test_tables_are_measured_once_and_for_one_thing(cifar, tmp_path, monkeypatch):
    """Cached measurements are not repeated, also after an interruption. Caches of other models are refused."""
    sample = Sample.of(images(cifar))
    candidates = [candidate for candidate in segment_candidates(cifar, 3) if candidate.end <= 4]
    losses = LossImportance(cifar, sample, tmp_path / "losses.json")
    measured = []

    def stop(*args):
        measured.append(args)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return 0.5

    monkeypatch.setattr("hf_layerfuse.methods.merge.candidates.calibration_loss", stop)
    with pytest.raises(KeyboardInterrupt):
        losses.measure(candidates)
    assert len(json.loads((tmp_path / "losses.json").read_text())["values"]) == 2
    LossImportance(cifar, sample, tmp_path / "losses.json").measure(candidates)
    assert len(measured) == 1 + sum(candidate.end - candidate.start > 1 for candidate in candidates)
    other = copy.deepcopy(cifar)
    other.classifier.bias.data += 1
    with pytest.raises(LayerFuseError, match=r"measured under other conditions: weights was"):
        LossImportance(other, sample, tmp_path / "losses.json")
    with pytest.raises(LayerFuseError, match=r"measured under other conditions: images was"):
        LossImportance(cifar, Sample.of(images(cifar, 8)), tmp_path / "losses.json")
    path = tmp_path / "latency.json"
    latencies = SegmentLatencies(cifar, torch.randn(2, 3, 32, 32), path, repeats=2, warmup=1)
    candidates = segment_candidates(cifar, 3)
    latencies.measure(candidates)
    shapes = [name for name in latencies.cache.values if name not in ("original", "folded")]
    assert len(shapes) < len(candidates)
    again = SegmentLatencies(cifar, torch.randn(2, 3, 32, 32), path, repeats=2, warmup=1)
    again.measure(candidates)
    assert again.cache.values == latencies.cache.values
    with pytest.raises(LayerFuseError, match="inputs was"):
        SegmentLatencies(cifar, torch.randn(4, 3, 32, 32), path)
    monkeypatch.setattr("hf_layerfuse.evaluation.timing.device_name", lambda device: "another one")
    with pytest.raises(LayerFuseError, match="device was"):
        SegmentLatencies(cifar, torch.randn(2, 3, 32, 32), path)
    path.write_text("{")
    with pytest.raises(LayerFuseError, match="is not a valid measurement cache"):
        SegmentLatencies(cifar, torch.randn(2, 3, 32, 32), path)


def test_activations_alone_are_removed(cifar, tmp_path, monkeypatch):
    """If latency does not depend on the kernel size, all convolutions stay and kernels grow."""
    monkeypatch.setattr(
        "hf_layerfuse.evaluation.timing.interleaved", lambda runs, device, **_: dict.fromkeys(runs, Timed(9, 0))
    )
    recipe = MergeRecipe(
        latency_budget=0.8, choose="activations", latency_batch_size=4, latency_repeats=2, tables=str(tmp_path)
    )
    found = search_merge(cifar, recipe, images(cifar))
    merged = [edit for edit in found.plan.edits if len(edit.layers) > 1]
    assert merged
    assert all(edit.keep == edit.layers for edit in merged)
    known = json.loads((tmp_path / "losses.json").read_text())["values"]
    kernels = [tuple(map(int, key.split(",")))[:3] for key in known]
    assert kernels
    assert all(kernel == 1 + 2 * (end - start) for start, end, kernel in kernels)


@pytest.mark.usefixtures("steady")
def test_it_is_chosen_from_what_was_asked_for(cifar, tmp_path):
    """Kernels respect the limit; `convolutions` merges none; `none` measures without a fit."""
    every = {candidate.key for candidate in segment_candidates(cifar, 7)}
    assert {candidate.key for candidate in segment_candidates(cifar, 3)} < every
    assert all(int(key.split(",")[2]) <= 7 for key in every)
    recipe = MergeRecipe(latency_budget=0.7, choose="convolutions", latency_batch_size=4, latency_repeats=2)
    found = search_merge(cifar, recipe, images(cifar))
    changed = [edit for edit in found.plan.edits if not edit.keep]
    assert changed
    assert all(len(edit.layers) == 1 for edit in found.plan.edits)
    assert found.model.num_parameters() < cifar.num_parameters()
    recipe = MergeRecipe(
        latency_budget=0.8, refit="none", latency_batch_size=4, latency_repeats=2, tables=str(tmp_path)
    )
    plain = search_merge(cifar, recipe, images(cifar))
    known = json.loads((tmp_path / "losses-unfitted.json").read_text())["values"]
    assert not plain.report.kept
    row = plain.plan.notes.losses[0]
    assert known[f"{row.start},{row.end},{row.kernel},{int(row.depthwise)}"] == row.loss


@pytest.mark.usefixtures("steady")
def test_what_is_small_goes_first(cifar, tmp_path):
    """`magnitude` removes the convolutions with the smallest weights and measures only latency. The notes have the
    results of all budgets."""
    model = copy.deepcopy(cifar)
    for conv in (model.layers[2].conv1, model.layers[1].conv2):
        nn.init.normal_(conv.weight, std=1e-6)
    recipe = MergeRecipe(
        latency_budget=0.8, choose="magnitude", latency_batch_size=4, latency_repeats=2, tables=str(tmp_path)
    )
    found = search_merge(model, recipe, images(model))
    gone = [edit.end for edit in found.plan.edits if not edit.keep]
    units = [unit.conv for unit in architecture_for(model, ConvGraphArchitecture).convolutions(model).units]
    assert set(gone) <= {units.index("layers.2.conv1"), units.index("layers.1.conv2")}
    assert gone
    assert not (tmp_path / "losses.json").exists()
    frontier = found.plan.notes.frontier
    losses = [point.loss for point in frontier]
    assert losses == sorted(losses, reverse=True)
    assert {1.0, 0.91} & {point.share for point in frontier}


@pytest.mark.usefixtures("steady")
def test_segments_are_trained_before_they_are_judged(cifar, tmp_path):
    """A few steps bring every segment closer to the original on unseen images. Another number of steps has another
    table, and zero steps use the earlier table."""
    batches, sample = images(cifar, 24), Sample.of(images(cifar, 24))
    candidates = [candidate for candidate in segment_candidates(cifar, 3) if candidate.end <= 4]
    plain, tuned = (LossImportance(cifar, sample, tuned=steps) for steps in (0, 10))
    for losses in (plain, tuned):
        losses.measure(candidates)
    changed = [candidate for candidate in candidates if candidate.changes]
    assert sum(map(tuned.of, changed)) < sum(map(plain.of, changed))
    recipe = MergeRecipe(
        latency_budget=0.85, max_kernel=3, latency_batch_size=4, latency_repeats=2, tune_steps=2, tables=str(tmp_path)
    )
    search_merge(cifar, recipe, batches)
    assert json.loads((tmp_path / "losses-2.json").read_text())["about"]["tuned"] == 2
    student = copy.deepcopy(cifar)
    tune(student, cifar, sample, 0)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), cifar.parameters(), strict=True))
    tune(student, cifar, sample, 3)
    assert all(torch.equal(a, b) for a, b in zip(student.buffers(), cifar.buffers(), strict=True))


@pytest.mark.parametrize("name", CONV_GRAPHS)
def test_every_entry_is_timed_at_its_shape(name):
    """Each part is timed with images of the size that its segment reads, and returns the size that the next one
    reads."""
    model = network(name)
    latencies = SegmentLatencies(model, torch.randn(1, 3, 41, 47, dtype=torch.float64), repeats=1, warmup=0)
    for candidate in segment_candidates(model, 5):
        given = latencies._part(candidate)()
        if candidate.end + 1 < len(latencies.shapes):
            assert given.shape == latencies.shapes[candidate.end + 1]


def test_what_lies_between_parts_is_counted(cifar, steady, monkeypatch):
    """If a model runs its parts at another speed and takes time between them, the prediction is exact for each
    chain."""
    candidates = segment_candidates(cifar, 5)
    latencies = SegmentLatencies(cifar, torch.randn(2, 3, 32, 32), repeats=1, warmup=0)
    latencies.measure(candidates)
    alone = latencies._alone
    ones = [candidate for candidate in candidates if not candidate.changes]
    fastest = cheapest(len(ones), candidates, alone)
    for rest, pace in ((300.0, 0.5), (0.0, 0.75), (10.0, 1.5)):
        latencies.cache.put({"folded": {"ms": rest + pace * sum(map(alone, ones))}})
        monkeypatch.setattr(latencies, "model_of", lambda plan, a=rest, b=pace: a + b * sum(map(alone, fastest)))
        latencies.measure(candidates)
        assert (latencies.rest, latencies.pace) == pytest.approx((rest, pace))
        assert latencies.rest + sum(map(latencies.of, ones)) == pytest.approx(latencies.cache.values["folded"]["ms"])
    # a model that gains more than its parts do: no less than nothing is beside them
    monkeypatch.setattr(latencies, "model_of", lambda plan: 0.0)
    latencies.measure(candidates)
    assert latencies.rest >= 0


def test_bad_input_is_refused(cifar):
    with pytest.raises(RecipeError, match="pass batches="):
        merge(cifar, latency_budget=0.5)
    with pytest.raises(RecipeError, match="must be between 0 and 1"):  # an earlier name replaces the target too
        merge(cifar, MergeRecipe(latency_ms=3.0), budget=1.5, batches=[])
    for values, reason in (
        ({}, "exactly one target"),
        ({"latency_budget": 0.5, "latency_ms": 3.0}, "exactly one target"),
        ({"latency_budget": 1.5}, "must be between 0 and 1"),
        ({"latency_ms": 0.0}, "above 0"),
        ({"latency_budget": 0.5, "max_kernel": 0}, "whole number of 1 or more"),
        ({"latency_budget": 0.5, "tune_steps": -1}, "whole number of 0 or more"),
        ({"latency_budget": 0.5, "choose": "magnitude", "tune_steps": 5}, "measures no loss"),
    ):
        with pytest.raises(RecipeError, match=reason):
            MergeRecipe(**values)
    with pytest.raises(UnsupportedModelError, match="no convolutions to merge"):
        merge(tiny_model("bert"), latency_budget=0.5, batches=[])
    config = CIFAR.CifarResNetConfig(num_hidden_layers=2, widths=[4, 8], strides=[1, 2], num_labels=3)
    lone = CIFAR.CifarResNetForImageClassification(config).eval()
    for layer in lone.layers:
        layer.conv1.stride = layer.conv2.stride = (1, 1)
    narrow = MergeRecipe(latency_budget=0.5, max_kernel=1)
    with pytest.raises(UnsupportedModelError, match="no two convolutions"):
        search_merge(lone, narrow, images(lone))
