"""Convolutional layers: the residual networks of `benchmarks/cifar_resnet.py`, registered from outside the package."""

import importlib.util
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import cifar_resnet
from torch.utils.data import DataLoader

from hf_layerfuse import (
    AutoFusedModel,
    Drop,
    Fuse,
    FusionRecipe,
    HealRecipe,
    Plan,
    PlanError,
    RecipeError,
    UnsupportedModelError,
    align,
    apply,
    expand,
    fuse,
    heal,
    heal_scope,
    plan_fusion,
    refit,
    search,
)
from hf_layerfuse.evaluation.divergence import calibration_loss
from hf_layerfuse.math.cluster import partition_within
from hf_layerfuse.math.ridge import Moments
from hf_layerfuse.pipeline.results import Goal
from hf_layerfuse.pipeline.rounds import rounds_of, target_of
from hf_layerfuse.recipe import DataRecipe, Recipe
from hf_layerfuse.training.schedule import compose

CONVFIT = importlib.import_module("hf_layerfuse.calibration.refit.conv")
MODULE = cifar_resnet()

WIDTHS = [4, 4, 4, 8, 8, 8, 8, 8]
LAYERS = len(WIDTHS)
ALIKE = [(0, 1, 2), (4, 5, 6, 7)]
"""Layers of one shape; the one between them reads fewer channels."""


def tiny(seed: int = 0):
    """A random model whose norms have statistics of images, so that their outputs have size one."""
    torch.manual_seed(seed)
    config = MODULE.CifarResNetConfig(num_hidden_layers=LAYERS, widths=WIDTHS, num_labels=3)
    model = MODULE.CifarResNetForImageClassification(config)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
            module.weight.data.uniform_(0.5, 1)
            module.bias.data.normal_(0, 0.3)
    with torch.no_grad():
        for batch in images(seed + 1):
            model(**batch)
    return model.eval()


def images(seed: int = 5, batches: int = 3):
    torch.manual_seed(seed)
    return [{"pixel_values": torch.randn(16, 3, 8, 8)} for _ in range(batches)]


def plan_of(*edits) -> Plan:
    return Plan("cifar_resnet", LAYERS, edits, kinds=("conv",))


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


PLANS = {
    "share": [Fuse("conv", group, mode="share", operator="mean") for group in ALIKE],
    "residual": [Fuse("conv", group, mode="share", operator="mean", rank=2) for group in ALIKE],
    "share apart": [Fuse("conv", (4, 6), mode="share", operator="freeze"), Fuse("layer", (5, 7), "share", "mean")],
    "depth": [Fuse("conv", (0, 1)), Fuse("conv", (4, 5, 6), operator="mean")],
    "drop": [Drop("conv", 2), Drop("layer", 6)],
}


def test_nothing_to_do_is_bit_equal():
    model, batch = tiny(), images()[0]
    fused = apply(model, plan_of())
    assert type(fused) is type(model)
    assert torch.equal(logits(fused, batch), logits(model, batch))


@pytest.mark.parametrize("name", PLANS)
def test_reload_is_bit_equal(name, tmp_path):
    """A fused model reloads to the bit, with the size of its plan; the expanded model computes the same."""
    model, batch = tiny(), images()[0]
    fused = apply(model, plan_of(*PLANS[name]))
    fused.save_pretrained(tmp_path / "fused")
    expand(fused).save_pretrained(tmp_path / "expanded")
    again = AutoFusedModel.from_pretrained(tmp_path / "fused")
    assert torch.equal(logits(again, batch), logits(fused, batch))
    assert type(again) is type(fused)
    stock = AutoFusedModel.from_pretrained(tmp_path / "expanded")
    assert type(stock) is type(model)
    if name == "residual":  # multiplied out, so equal only up to rounding
        torch.testing.assert_close(logits(stock, batch), logits(fused, batch), rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(logits(stock, batch), logits(fused, batch))
    assert sum(p.numel() for p in again.parameters()) < sum(p.numel() for p in model.parameters())
    layers = again.layers
    if name in ("share", "residual"):
        assert layers[4].conv1.weight is layers[7].conv1.weight
        assert layers[4].bn1.weight is not layers[7].bn1.weight


def test_sharing_equal_kernels_changes_nothing():
    model, batch = tiny(), images()[0]
    for group in ALIKE:
        for layer in group[1:]:
            for name in ("conv1", "conv2"):
                model.layers[layer].get_submodule(name).load_state_dict(
                    model.layers[group[0]].get_submodule(name).state_dict()
                )
    before = logits(model, batch)
    for operator in ("mean", "freeze", "telescope"):
        plan = plan_of(*(Fuse("conv", group, "share", operator) for group in ALIKE))
        torch.testing.assert_close(logits(apply(model, plan), batch), before, rtol=1e-5, atol=1e-5)


def test_residuals_of_full_rank_change_nothing():
    """Residuals of full rank restore everything that sharing loses, also after a refit."""
    model, batches = tiny(), images(batches=6)
    plan = plan_of(Fuse("conv", ALIKE[0], "share", "mean", rank=4), Fuse("conv", ALIKE[1], "share", "mean", rank=8))
    fused = apply(model, plan)
    kernel = fused.layers[5].conv1
    assert kernel.weight is fused.layers[4].conv1.weight
    assert kernel.residual_in.shape == (8, 8 * 9)
    torch.testing.assert_close(kernel.merged_weight().float(), model.layers[5].conv1.weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(fused, batches[0]), logits(model, batches[0]), rtol=1e-4, atol=1e-4)
    refit(fused, model, plan, batches)
    torch.testing.assert_close(logits(fused, batches[0]), logits(model, batches[0]), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("how", ["permutation", "activation", "transport", "rotation"])
def test_a_shuffled_copy_is_recovered(how):
    """Alignment does not change the outputs of a model. A layer that is a copy with shuffled channels gets the order of
    its original."""
    if how == "transport":
        pytest.importorskip("ot")
    model, batches = tiny(), images()
    one, other = model.layers[5], model.layers[6]
    other.load_state_dict(one.state_dict())
    order = torch.randperm(8)
    with torch.no_grad():
        other.conv1.weight.copy_(one.conv1.weight[order])
        other.conv2.weight.copy_(one.conv2.weight[:, order])
        for name, tensor in other.bn1.state_dict().items():
            if tensor.ndim:
                tensor.copy_(one.bn1.state_dict()[name][order])
        if how == "activation":  # each layer computes at its own depth, so layer 5 must add nothing
            one.bn2.weight.zero_()
            one.bn2.bias.zero_()
    before = logits(model, batches[0])
    aligned = align(model, plan_of(Fuse("conv", (5, 6), operator="telescope", align=how)), batches)
    torch.testing.assert_close(logits(aligned, batches[0]), before, rtol=1e-5, atol=1e-5)
    for part in ("conv1", "bn1", "conv2"):
        torch.testing.assert_close(
            aligned.layers[6].get_submodule(part).state_dict(), one.get_submodule(part).state_dict(), rtol=0, atol=0
        )


@pytest.mark.parametrize("method", ["full", "linear"])
@pytest.mark.parametrize("name", PLANS)
def test_refit_repairs(name, method):
    """The refit never raises the calibration loss, and the full refit is much better on other images."""
    model, batches, others = tiny(), images(batches=6), images(99)
    plan = plan_of(*PLANS[name])
    student = apply(model, plan)
    before = calibration_loss(student, model, others)
    report = refit(student, model, plan, batches, method)
    assert report.after <= report.before
    if method == "full":
        assert report.kept
        assert calibration_loss(student, model, others) < 0.8 * before
    for row in report.blocks:
        assert row["after"] <= row["before"] * (1 + 1e-9)


def test_what_is_stored_is_what_was_fitted():
    """Kernel, gain, bias and statistics of the norm together compute the fitted map, in eval and in training mode, and
    the kernel keeps its size."""
    torch.manual_seed(0)
    conv, norm = torch.nn.Conv2d(3, 5, 3, stride=2, padding=1), torch.nn.BatchNorm2d(5)
    x, theta = torch.randn(6, 3, 9, 9), torch.randn(28, 5, dtype=torch.float64)
    patches, size = CONVFIT._patches(conv, x), conv.weight.norm().item()
    every = Moments.empty(27, 0)
    every.add(patches.flatten(0, 1), patches.flatten(0, 1)[:, :0])
    wanted = (patches.double() @ theta[:-1] + theta[-1]).transpose(1, 2).float()
    with torch.no_grad():
        CONVFIT._store(conv, norm, theta, every)
        for training in (False, True):
            torch.testing.assert_close(norm.train(training)(conv(x)).flatten(2), wanted, rtol=1e-3, atol=1e-3)
    assert conv.weight.norm().item() == pytest.approx(size, rel=1e-5)
    torch.testing.assert_close(CONVFIT._theta(conv, norm), theta, rtol=1e-2, atol=0.2)


@pytest.mark.parametrize(
    ("mode", "rank", "effort"),
    [
        ("depth", 0, "medium"),
        ("share", 0, "medium"),
        ("depth", 0, "low"),
        ("share", 0, "low"),
        ("share", 1, "low"),
        ("share", "auto", "low"),
    ],
)
def test_search_meets_a_ratio(mode, rank, effort):
    """The ratio of block parameters is removed, and no more than necessary; no group has layers of different shapes."""
    model, batches = tiny(), images()
    ratio = 0.3 if rank else 0.5  # for kernels this small, rank 1 is already large
    found = search(model, FusionRecipe(ratio=ratio, mode=mode, rank=rank, effort=effort), batches)
    total, left = (sum(p.numel() for p in m.layers.parameters()) for m in (model, found.model))
    assert left <= (1 - ratio) * total
    assert left > (1 - ratio) / 2 * total
    for edit in found.plan.edits:
        assert edit.kind == "conv"
        assert any(set(edit.layers) <= set(group) for group in ALIKE)
    assert found.report.after <= found.report.before


def test_the_front_door(tmp_path):
    """`fuse` accepts a convolutional model, verifies the result, and the result reloads."""
    model, batches = tiny(), images()
    for options in ({"ratio": 0.5, "mode": "share"}, {"keep_layers": 6}):
        fused = fuse(model, effort="low", batches=batches, **options)
        fused.save_pretrained(tmp_path / options.get("mode", "depth"))
        again = AutoFusedModel.from_pretrained(tmp_path / options.get("mode", "depth"))
        assert torch.equal(logits(again, batches[0]), logits(fused, batches[0]))
    assert len(again.layers) == 6


def test_global_groups_hold_one_shape():
    model = tiny()
    for cluster in ("global", "agglomerative"):
        recipe = FusionRecipe(ratio=0.4, mode="share", cluster=cluster, operator="mean")
        plan = plan_fusion(model, recipe)
        assert all(any(set(edit.layers) <= set(group) for group in ALIKE) for edit in plan.edits)
        left = sum(p.numel() for p in apply(model, plan).layers.parameters())
        assert left <= 0.6 * sum(p.numel() for p in model.layers.parameters())
        Plan.from_json(plan.to_json())


def test_partition_within_is_exact():
    """The program finds the lowest cost of all partitions that are small enough."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        n = 7
        cost = np.triu(rng.random((n + 1, n + 1)), 1)
        cost[range(n), range(1, n + 1)] = 0
        cost[rng.random(cost.shape) < 0.2] += math.inf
        cost[range(n), range(1, n + 1)] = 0
        sizes = rng.integers(1, 5, (n + 1, n + 1))
        most = 0.6 * sum(sizes[i, i + 1] for i in range(n))
        every = []
        for cuts in itertools.product([False, True], repeat=n - 1):
            edges = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), n]
            if sum(sizes[a, b] for a, b in itertools.pairwise(edges)) <= most:
                every.append(sum(cost[a, b] for a, b in itertools.pairwise(edges)))
        runs = partition_within(cost, sizes, most)
        best = min(every, default=math.inf)
        if not math.isfinite(best):
            assert runs is None
            continue
        assert sum(cost[run[0], run[-1] + 1] for run in runs) == pytest.approx(best)
        assert [layer for run in runs for layer in run] == list(range(n))
        assert sum(sizes[run[0], run[-1] + 1] for run in runs) <= most


def test_what_cannot_be_done_is_refused():
    model, batches = tiny(), images()
    grouped = tiny()
    grouped.layers[1].conv2 = torch.nn.Conv2d(4, 4, 3, padding=1, groups=2)
    with pytest.raises(UnsupportedModelError, match="of one group"):
        plan_fusion(grouped, FusionRecipe(keep_layers=6))
    with pytest.raises(PlanError, match="different shapes"):
        apply(model, plan_of(Fuse("conv", (2, 3))))
    with pytest.raises(PlanError, match="attention"):
        plan_of(Fuse("attention", (0, 1)))
    with pytest.raises(PlanError, match="conv"):
        apply(model, Plan("cifar_resnet", LAYERS, (Fuse("layer", (0, 1)),)))
    with pytest.raises(RecipeError, match="'layer'"):
        plan_fusion(model, FusionRecipe(keep_layers=6, blocks="mlp"))
    with pytest.raises(RecipeError, match="Keep more"):
        plan_fusion(model, FusionRecipe(keep_layers=2))
    with pytest.raises(RecipeError, match="out of reach"):
        plan_fusion(model, FusionRecipe(ratio=0.95, mode="share"))
    with pytest.raises(RecipeError, match="compares states"):
        plan_fusion(model, FusionRecipe(keep_layers=6, similarity="cka"), batches)
    with pytest.raises(UnsupportedModelError, match="rank 0"):
        apply(model, plan_of(Fuse("conv", (0, 1), mode="basis", rank=2)))


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("mode", ["share", "depth"])
def test_rounds_of_fusing_and_healing(mode):
    """A fused model is healed, expanded, fused further and healed again. Kernels stay shared, all parameters learn,
    each round removes its part of the original, and one plan describes all rounds."""
    model, batches = tiny(), images(batches=4)
    whole = sum(p.numel() for p in model.layers.parameters())
    rows = [
        {"pixel_values": x, "labels": y}
        for batch in batches
        for x, y in zip(batch["pixel_values"], logits(model, batch).argmax(-1), strict=True)
    ]
    common = {"model": "m", "task": "image-classification", "output_dir": "o", "data": DataRecipe(train="t")}
    fusion = FusionRecipe(ratio=0.5, mode=mode, effort="low")
    asked = Recipe(**common, fusion=fusion, heal=HealRecipe(steps=6, schedule="uniform", rounds=2))
    rounds = rounds_of(asked, model, None)
    assert rounds == [(Goal(ratio=0.25), 3), (Goal(ratio=0.5), 3)]
    source, plan = model, None
    for goal, steps in rounds:
        step = search(source, replace(fusion, **target_of(goal, source, model)), batches)
        fused, plan = step.model, compose(plan, step.plan) if plan else step.plan
        before = {name: tensor.clone() for name, tensor in fused.named_parameters()}
        recipe = HealRecipe(steps=steps, learning_rate=1e-2, kl_weight=1.0, hidden_weight=1.0, warmup_ratio=0.0)
        scope = heal_scope(fused, model, plan, recipe)
        heal(fused, DataLoader(rows, 16, shuffle=True), recipe, teacher=model, scope=scope)
        assert all(not torch.equal(tensor, before[name]) for name, tensor in fused.named_parameters())
        left = sum(p.numel() for p in {p for layer in fused.layers for p in layer.parameters()})
        assert (1 - goal.ratio) * whole - 2000 < left <= (1 - goal.ratio) * whole
        assert len({id(layer.conv1.weight) for layer in fused.layers}) < LAYERS
        source = expand(fused)
    assert plan.num_layers == LAYERS
    assert plan.kinds == ("conv",)
    assert len(plan.notes.rounds) == 2
