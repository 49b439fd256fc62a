"""Linear MLPs: exact if possible, fitted otherwise, and chosen by their cost."""

import pytest
import torch
from helpers import GATED, LAYERS, TINY, in_turn, predicted, some_batches, tiny_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_layerfuse import (
    Blend,
    CollapseRecipe,
    Drop,
    Fuse,
    Linearize,
    Plan,
    PlanError,
    RecipeError,
    UnsupportedModelError,
    apply,
    collapse,
    expand,
    refit,
    search_collapse,
    verify,
)
from hf_layerfuse.calibration.refit.linear import fit_linear
from hf_layerfuse.calibration.samples import Sample
from hf_layerfuse.evaluation.divergence import calibration_loss, prediction
from hf_layerfuse.evaluation.dummy_inputs import dummy_inputs
from hf_layerfuse.math.lowrank import low_rank
from hf_layerfuse.math.ridge import Moments
from hf_layerfuse.models.architectures import ARCHITECTURES, UnitGate, architecture_for
from hf_layerfuse.models.modules.conv import Parts
from hf_layerfuse.models.modules.shared_linear import out_in, theta_of
from hf_layerfuse.models.surgery.linear_mlp import Collapsed
from hf_layerfuse.models.surgery.size import planned_size

PLAIN = sorted(set(TINY) - set(GATED))
WIDTH = 32


def plan_of(model, *edits) -> Plan:
    return Plan(model.config.model_type, LAYERS, edits)


def without_activation(model_type, layers=range(LAYERS), **changes):
    """A model in which the MLPs of some layers are already linear; gates are open."""
    model = tiny_model(model_type, **changes)
    architecture = architecture_for(model)
    for index in layers:
        layer = architecture.layer_list(model)[index]
        layer.set_submodule(architecture.activation, UnitGate() if model_type in GATED else nn.Identity())
    return model


@pytest.mark.parametrize("model_type", PLAIN)
def test_an_mlp_without_activation_collapses_exactly(model_type):
    """W2 W1 equals the two maps in every layer, for Conv1D and Linear, with norms before and after."""
    model = without_activation(model_type)
    small = apply(model, plan_of(model, *map(Linearize, range(LAYERS))))
    expected = predicted(model)
    torch.testing.assert_close(predicted(small), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    double = apply(model.double(), plan_of(model, *map(Linearize, range(LAYERS))))
    ours, theirs = predicted(double), predicted(model)
    assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()


@pytest.mark.parametrize("model_type", ["bert", "vit"])
def test_maps_without_biases_collapse_exactly(model_type):
    """An MLP without biases collapses exactly too."""
    model = without_activation(model_type)
    architecture = architecture_for(model)
    for layer in architecture.layer_list(model):
        for role in ("in", "out"):
            layer.get_submodule(architecture.mlp[role]).bias = None
    kept = architecture.layer_list(model)[2]
    weights = [kept.get_submodule(architecture.mlp[role]).weight for role in ("in", "out")]
    for layer in architecture.layer_list(
        model
    ):  # `apply` builds a stock model, which has biases where nothing collapses
        assert all(layer.get_submodule(architecture.mlp[role]).bias is None for role in ("in", "out"))
    small = apply(model, plan_of(model, *map(Linearize, range(LAYERS))))
    found = architecture.layer_list(small)[2].get_submodule(architecture.mlp["out"])
    torch.testing.assert_close(found.weight, weights[1] @ weights[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(predicted(small), predicted(model), rtol=1e-4, atol=1e-4)


def test_a_linear_mlp_is_found_by_the_fit(model_type):
    """An MLP that computes a linear map, such as a gated one with an open gate, is recovered from its inputs and
    outputs."""
    model = without_activation(model_type, [1, 4])
    batches = some_batches(model, 12)
    plan = plan_of(model, Linearize(1), Linearize(4))
    small = apply(model, plan)
    architecture = architecture_for(model)
    for index in (1, 4):  # far from it at first
        nn.init.normal_(architecture.layer_list(small)[index].get_submodule(architecture.mlp["out"]).weight)
    report = refit(small, model, plan, batches, "maps")
    assert report.kept
    assert report.after < 1e-3 * report.before
    rows = [row for row in report.blocks if row["map"] == "linear map"]
    assert [row["layer"] for row in rows] == [1, 4]
    assert all(row["r2"] > 0.99 for row in rows)


@pytest.mark.parametrize(("model_type", "method"), in_turn(["maps", "full"]))
def test_a_fit_never_makes_things_worse(model_type, method):
    """On held-out calibration sequences, the fitted model is no further from the original. It saves and reloads."""
    model = tiny_model(model_type)
    plan = plan_of(model, Linearize(0), Linearize(3, rank=8), Linearize(5))
    small = apply(model, plan)
    before = small.state_dict()
    before = {name: tensor.clone() for name, tensor in before.items()}
    report = refit(small, model, plan, some_batches(model), method)
    assert report.after <= report.before
    if method == "maps":
        architecture = architecture_for(model)
        inside = [architecture.layers_path(small) + f".{i}." for i in (0, 3, 5)]
        for name, tensor in small.state_dict().items():
            if not name.startswith(tuple(inside)):
                assert torch.equal(tensor, before[name]), f"{name} is no map that an MLP has become"
    # in float32, weights fitted to a few random tokens amplify the rounding of cached decoding
    assert verify(small.double())["reload"] == 0


@pytest.mark.parametrize("model_type", ["bert", pytest.param("roberta", marks=pytest.mark.slow)])
def test_a_residual_sum_is_folded_exactly(model_type):
    """With a norm after the sum, one map I + A replaces MLP and sum, from weights and fitted. It saves and reloads."""
    model, batches = tiny_model(model_type).double(), some_batches(tiny_model(model_type), 24)
    plain, folded = (plan_of(model, Linearize(1, fold=fold), Linearize(4, fold=fold)) for fold in (False, True))
    small, whole = apply(model, plain), apply(model, folded)
    torch.testing.assert_close(predicted(whole), predicted(small), rtol=1e-10, atol=1e-10)
    reports = [refit(student, model, plan, batches) for plan, student in ((plain, small), (folded, whole))]
    assert reports[1].kept
    assert reports[1].after == pytest.approx(reports[0].after, rel=0.1)
    # moments are of float32 rows, and nearly singular: what a norm gives lies in a plane
    torch.testing.assert_close(predicted(whole), predicted(small), rtol=0, atol=1e-3)
    assert verify(whole)["reload"] == 0
    assert Plan.from_dict(folded.to_dict()) == folded
    found = collapse(model, count=2, fold=True, order="deepest", batches=batches)
    assert sum(isinstance(module, Parts) for module in found.modules()) == 2


@pytest.mark.parametrize(
    ("model_type", "changes", "error", "reason"),
    [
        ("gpt2", {}, UnsupportedModelError, "no norm follows"),
        ("distilbert", {}, UnsupportedModelError, "it has no module of its own"),
        ("bert", {"intermediate_size": 6}, PlanError, "become a product of two maps"),
    ],
)
def test_sums_that_cannot_be_folded_are_refused(model_type, changes, error, reason):
    """Folding is refused if later blocks read the sum, if the sum is in a `forward`, and with two maps, which cannot
    add."""
    model = tiny_model(model_type, **changes)
    with pytest.raises(error, match=reason):
        apply(model, plan_of(model, Linearize(1, fold=True)))
    with pytest.raises(PlanError, match="with fold the map contains the identity"):
        Linearize(1, rank=2, fold=True)
    with pytest.raises(RecipeError, match="only one full map can include the residual sum"):
        CollapseRecipe(count=1, rank=2, fold=True)


def test_a_rank_gives_two_maps():
    """With a rank, the MLP becomes a product of two maps. An MLP of few units already is one, and stays exact."""
    model = tiny_model("gpt2")
    small = apply(model, plan_of(model, Linearize(1, rank=8), Linearize(2)))
    layers = architecture_for(model).layer_list(small)
    assert layers[1].mlp.c_fc.weight.shape == (8, WIDTH)
    assert layers[1].mlp.c_fc.bias is None
    assert layers[1].mlp.c_proj.weight.shape == (WIDTH, 8)
    assert type(layers[2].mlp.c_fc) is nn.Identity
    assert layers[2].mlp.c_proj.weight.shape == (WIDTH, WIDTH)
    assert isinstance(layers[0].mlp.c_proj, Conv1D)
    narrow = without_activation("gpt2", [2], n_inner=6)
    small = apply(narrow, plan_of(narrow, Linearize(2)))
    assert architecture_for(narrow).layer_list(small)[2].mlp.c_fc.weight.shape == (6, WIDTH)
    torch.testing.assert_close(predicted(small), predicted(narrow), rtol=1e-4, atol=1e-4)


def test_a_product_is_fitted_in_what_comes_out():
    """The product is closest to the free fit on the actual inputs, not on all possible inputs."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(0, -2, 12, dtype=torch.float64)
    x = torch.randn(400, 12, generator=generator, dtype=torch.float64) * scale + 1
    full = torch.randn(12, 12, generator=generator, dtype=torch.float64) / scale.sqrt()
    y = x @ full + 3
    parts = [Moments.empty(12, 12) for _ in range(2)]
    parts[0].add(x[:300], y[:300])
    parts[1].add(x[300:], y[300:])
    maps = [nn.Linear(12, 4, bias=False).double(), nn.Linear(4, 12).double()]
    found = fit_linear(maps, *parts)
    assert found.strength is not None
    error = (maps[1](maps[0](x)) - y).square().sum()
    left, right = low_rank(full.T, 4)
    plain = x @ (left @ right).T
    plain = (plain - plain.mean(0) - (y - y.mean(0))).square().sum()
    assert error < 0.9 * plain


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (Linearize(1, rank=16), "use 15 or less"),
        (Linearize(1, rank=40), "use 15 or less"),
    ],
)
def test_ranks_that_save_nothing_are_refused(edit, reason):
    with pytest.raises(PlanError, match=reason):
        apply(tiny_model("bert"), Plan("bert", LAYERS, (edit,)))


@pytest.mark.parametrize("values", [{"rank": 0}, {"rank": 2.0}, {"layer": "1"}])
def test_edits_that_mean_nothing_are_refused(values):
    with pytest.raises(PlanError, match=r"Linearize\.(rank|layer)"):
        Linearize(**{"layer": 1, **values})


def test_blocks_are_claimed_once():
    """A linear MLP cannot be part of a fused or dropped layer."""
    for other in (Fuse("layer", (1, 2)), Drop("mlp", 1), Linearize(1, rank=2)):
        with pytest.raises(PlanError, match="both claim the mlp block of layer 1"):
            Plan("bert", LAYERS, (Linearize(1), other))


def test_a_plan_survives_json():
    plan = Plan("bert", LAYERS, (Linearize(1), Linearize(2, rank=4), Fuse("attention", (1, 2))))
    assert Plan.from_dict(plan.to_dict()) == plan
    assert plan.to_dict()["edits"][:2] == [
        {"edit": "linearize", "layer": 1},
        {"edit": "linearize", "layer": 2, "rank": 4},
    ]


def test_what_cannot_become_linear_is_refused(monkeypatch):
    """An architecture without the path of the activation, and a stock class for a linear MLP, are refused."""
    model = tiny_model("bert")
    small = apply(model, Plan("bert", LAYERS, (Linearize(1), Linearize(4))))
    with pytest.raises(UnsupportedModelError, match="MLPs of layers 1, 4 are linear, or becoming linear"):
        expand(small)
    monkeypatch.setattr(type(ARCHITECTURES["bert"]), "activation", None)
    with pytest.raises(UnsupportedModelError, match="name the maps"):
        apply(model, Plan("bert", LAYERS, (Linearize(1),)))


@pytest.mark.parametrize("model_type", ["llama", pytest.param("bert", marks=pytest.mark.slow)])
def test_mlps_are_taken_in_the_order_of_what_they_cost(model_type):
    """The losses in the notes are those of models with one linear MLP, and the cheapest MLPs are chosen."""
    model = tiny_model(model_type)
    batches = some_batches(model)
    found = search_collapse(model, CollapseRecipe(count=3), batches)
    losses = {row.edit.layer: row.loss for row in found.plan.notes.losses}
    assert [edit.layer for edit in found.plan.edits] == sorted(sorted(losses, key=losses.get)[:3])
    held_out = Sample.of(batches).held_out_batches
    for layer in (0, 4):
        plan = plan_of(model, Linearize(layer))
        alone = apply(model, plan)
        refit(alone, model, plan, batches, "maps")
        assert losses[layer] == pytest.approx(calibration_loss(alone, model, held_out), rel=1e-3)
    assert found.report.after == pytest.approx(calibration_loss(found.model, model, held_out), rel=1e-3)
    deepest = search_collapse(model, CollapseRecipe(count=2, order="deepest"), batches)
    assert [edit.layer for edit in deepest.plan.edits] == [4, 5]


@pytest.mark.slow
def test_a_target_decides_how_many():
    """A size is met with as few MLPs as possible; a limit on the loss allows as many as possible."""
    model = tiny_model("gpt2")
    batches = some_batches(model)
    one = search_collapse(model, CollapseRecipe(count=1), batches)
    whole, least = model.num_parameters(), one.model.num_parameters()
    for recipe, count in (
        ({"max_parameters": least}, 1),
        ({"max_parameters": least - 1}, 2),
        ({"max_bytes": 4 * least}, 1),
        ({"ratio": 1e-6}, 1),
        ({"ratio": 1.01 * (whole - least) / sum(p.numel() for p in model.transformer.h.parameters())}, 2),
        ({"count": 6}, 6),
    ):
        found = search_collapse(model, CollapseRecipe(**recipe), batches)
        assert len(found.plan.edits) == count
        assert found.model.num_parameters() == planned_size(model, found.plan)["parameters"]
    losses = [
        search_collapse(model, CollapseRecipe(count=count), batches).report.after for count in range(1, LAYERS + 1)
    ]
    limit = losses[2] * 1.0001
    found = search_collapse(model, CollapseRecipe(max_loss=limit), batches)
    first_above = next((i for i, loss in enumerate(losses) if loss > limit), LAYERS)
    assert len(found.plan.edits) == first_above
    assert found.report.after <= limit


def test_targets_out_of_reach_are_refused():
    model = tiny_model("bert")
    batches = some_batches(model)
    for values, reason in (
        ({"count": 7}, "count=7 of the model's 6 MLPs: use 1 to 6"),
        ({"ratio": 0.9}, r"ratio=0\.9 is out of reach: .* with all 6 MLPs linear"),
        ({"max_parameters": 10}, "is out of reach"),
        ({"max_bytes": 1e12}, "changes nothing"),
        ({"max_loss": 1e-12}, "allows no linear MLP"),
    ):
        with pytest.raises(RecipeError, match=reason):
            collapse(model, **values, order="deepest", batches=batches)
    with pytest.raises(RecipeError, match=r"order='measured' .* pass batches="):
        collapse(model, count=1)
    with pytest.raises(RecipeError, match=r"order='deepest' with max_loss=1 .* pass batches="):
        collapse(model, max_loss=1.0, order="deepest")
    with pytest.raises(RecipeError, match="pass a CollapseRecipe"):
        collapse(model, {"count": 1})
    for values in ({}, {"count": 1, "ratio": 0.5}, {"count": 0}, {"ratio": 1.0}, {"max_loss": 0.0}, {"rank": 0}):
        with pytest.raises(RecipeError):
            CollapseRecipe(**values)


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_a_gated_mlp_wants_a_fit(model_type):
    """A gated MLP is bilinear without its activation: without batches, or without a fit, it is refused with this
    reason."""
    model = tiny_model(model_type)
    for options in ({"order": "deepest"}, {"refit": "none", "batches": some_batches(model)}):
        with pytest.raises(UnsupportedModelError, match="stay bilinear"):
            collapse(model, count=1, **options)
    small = collapse(model, count=2, batches=some_batches(model))
    maps = [module for module in small.modules() if isinstance(module, Collapsed)]
    assert len(maps) == 2
    assert all(module.weight.any() for module in maps)


def test_without_batches_nothing_is_fitted(caplog):
    """Without batches, the last layers become W2 (W1 x + b1) + b2, and there is a warning."""
    model = tiny_model("vit")
    small = collapse(model, count=1, order="deepest")
    assert "nothing is fitted" in caplog.text
    mlp = architecture_for(model).layer_list(model)[5].mlp
    mine = architecture_for(model).layer_list(small)[5].mlp
    expected = out_in(mlp.fc2, mlp.fc2.weight) @ mlp.fc1.weight
    torch.testing.assert_close(theta_of(mine.fc2)[:-1].T.float(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def test_linear_mlps_are_exported(model_type):
    """torch.export accepts models with linear MLPs, and the exported program computes the same."""
    model = tiny_model(model_type)
    bent = () if model_type in GATED else (Blend(5),)
    small = apply(model, plan_of(model, Linearize(1), Linearize(3, rank=8), *bent)).eval()
    small.config.use_cache = False  # a cache in the output is not a tensor
    inputs = dict(dummy_inputs(small))
    exported = torch.export.export(small, (), inputs, strict=False).module()
    torch.testing.assert_close(prediction(exported(**inputs)), predicted(small))
