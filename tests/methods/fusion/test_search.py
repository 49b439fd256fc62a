"""Candidates compete on calibration loss: which candidates are tried, which one wins, and that it is the best."""

import itertools
import random
import warnings
from dataclasses import asdict

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import batches_of, few_pairs, in_turn, slow_except, slow_unless, state_of, whole

from hf_layerfuse import (
    AutoFusedModel,
    Fuse,
    FusionRecipe,
    Plan,
    PlanError,
    RecipeError,
    fuse,
    plan_fusion,
    search,
    verify,
)
from hf_layerfuse.calibration.layerwise import LayerwiseForward
from hf_layerfuse.calibration.samples import Sample, read
from hf_layerfuse.calibration.teacher_states import TeacherStates
from hf_layerfuse.evaluation.divergence import calibration_loss, prediction
from hf_layerfuse.math.cluster import partition
from hf_layerfuse.methods.fusion.grouping import even, groups_of, unexplained
from hf_layerfuse.methods.fusion.planner import _CLUSTERS, layer_importances, operator_candidates
from hf_layerfuse.methods.fusion.search import _Table
from hf_layerfuse.methods.trials import Trials
from hf_layerfuse.models.apply import apply
from hf_layerfuse.models.architectures import architecture_for
from hf_layerfuse.models.surgery.size import planned_size

LAYERS = 4


def loss(fused, model, batches):
    return calibration_loss(fused, model, Sample.of(batches).held_out_batches)


def depth_of(model):
    return len(architecture_for(model).layer_list(model))


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def edits_of(found):
    """Edits of the candidates in the notes."""
    return [candidate.edits for candidate in found.plan.notes.competition]


@pytest.mark.parametrize("model_type", slow_except(["gpt2", "llama"]))
def test_more_effort_is_never_worse(model_type):
    """For every layout of blocks, more effort tries at least as many candidates, keeps the best, and is not worse. The
    winner and its loss are in the notes, which are JSON. The input is unchanged."""
    model = whole(model_type)
    batches, before = batches_of(model, 24), state_of(model)
    tried, losses = [], []
    for effort in ("low", "medium", "high") if model_type == "gpt2" else ("low", "medium"):
        found = search(model, FusionRecipe(keep_layers=3, effort=effort), batches)
        assert depth_of(found.model) == 3
        assert type(found.model) is type(model)
        notes = Plan.from_json(found.plan.to_json()).notes
        assert notes == found.plan.notes
        competition = notes.competition
        assert found.report.after == min(row.loss for row in competition) == notes.refit.after
        assert found.plan.edits == edits_of(found)[[row.loss for row in competition].index(found.report.after)]
        assert all(row.loss <= row.loss_before_refit for row in competition)
        assert found.report.after == loss(found.model, model, batches)
        assert notes.recipe["effort"] == effort
        assert notes.calibration == "24 sequences"
        assert bool(notes.operators) == (effort != "low")
        tried.append(set(edits_of(found)))
        losses.append(found.report.after)
    assert len(tried[0]) == 1
    assert all(less <= more for less, more in itertools.pairwise(tried))
    assert losses == sorted(losses, reverse=True)
    assert same(state_of(model), before)


def test_fuse_returns_what_the_search_found():
    """`fuse` runs the search and then `verify`; the default effort is medium."""
    model = whole("bert")
    batches = batches_of(model)
    found = search(model, FusionRecipe(keep_layers=3), batches)
    assert same(state_of(fuse(model, keep_layers=3, batches=iter(batches))), state_of(found.model))
    assert len(found.plan.notes.operators) > 1


def test_climbing_tries_neighbours(monkeypatch):
    """With effort `high`, borders of groups move by one while this helps: at the end, every plan next to the winner has
    been tried."""
    model = whole("vit", 6)
    monkeypatch.setattr(Trials, "loss", lambda self, edit: 0.0)  # the table prefers no group
    recipe = FusionRecipe(keep_layers=3, effort="high", operator="freeze", refit="none")
    found = search(model, recipe, batches_of(model, 8))
    tried = [borders(edits) for edits in edits_of(found)]
    for i, cuts in enumerate(tried[2:], 2):
        assert any(len(cuts ^ other) == 2 for other in tried[:i]), "not next to any plan that was tried before"
    winner = borders(found.plan.edits)
    near = [(winner - {cut}) | {cut + step} for cut in winner for step in (-1, 1)]
    near = [cuts for cuts in near if len(cuts) == len(winner) and cuts <= {1, 2, 3, 4, 5}]
    assert len(near) > 1
    assert all(cuts in tried for cuts in near)


def borders(edits):
    """Borders between the groups, for partitions of 6 layers into runs."""
    return {1, 2, 3, 4, 5} - {layer for edit in edits for layer in edit.layers[1:]}


@pytest.mark.parametrize(("model_type", "mode"), in_turn(["depth", "share"]))
def test_without_batches_it_is_from_the_weights_alone(model_type, mode):
    """Without calibration data, the result equals the plan from the weights to the bit, and a warning says so."""
    model = whole(model_type)
    recipe = FusionRecipe(keep_layers=3, mode=mode)
    found = search(model, recipe)
    plan = plan_fusion(model, recipe)
    assert found.plan.edits == plan.edits
    if mode == "depth":
        assert same(state_of(found.model), state_of(apply(model, plan)))
        assert {(edit.operator, edit.keep) for edit in plan.edits} == {("freeze", None)}
    assert found.report is None
    notes = Plan.from_json(found.plan.to_json()).notes
    assert notes.calibration == "none: from the weights alone"
    assert not notes.competition
    assert notes.distances


MODES = {
    "share": {"mode": "share"},
    "residual": {"mode": "share", "rank": 3},
    "basis": {"mode": "basis", "rank": 12},
}


KINDS = ["layer", "attention", "mlp", "separate"]


_FEW = few_pairs(KINDS, ["depth", *MODES])


@pytest.mark.parametrize(
    ("model_type", "asked"),
    slow_unless(
        lambda kind, asked: kind != "gpt2" or asked in _FEW,
        in_turn(itertools.product(KINDS, ["depth", *MODES]), rest=["bert"]),
    ),
)
def test_every_mode_and_kind_of_block(model_type, asked):
    """For every mode and kind of block, the requested number of distinct blocks remains, and the result is repaired and
    saves."""
    blocks, mode = asked
    model = whole(model_type)
    recipe = FusionRecipe(keep_layers=3, blocks=blocks, effort="low", **MODES.get(mode, {}))
    found = search(model, recipe, batches_of(model))
    for kind in ("attention", "mlp") if blocks == "separate" else (blocks,):
        assert len(groups_of(found.plan, kind)) == 3
    assert {edit.kind for edit in found.plan.edits} == ({"attention", "mlp"} if blocks == "separate" else {blocks})
    assert {edit.mode for edit in found.plan.edits} == {recipe.mode}
    assert found.report.kept
    assert found.report.after < found.report.before
    assert found.model.num_parameters() < model.num_parameters()
    if model_type == "gpt2":
        verify(found.model)


@pytest.mark.parametrize("effort", ["low", pytest.param("medium", marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", ["share", "basis"])
def test_rank_auto_is_searched_as_its_number(mode, effort):
    """`rank="auto"` gives the same result as the rank that it resolves to, and the notes name this rank."""
    model = whole("gpt2")
    auto = search(model, FusionRecipe(ratio=0.5, mode=mode, rank="auto", effort=effort), batches_of(model))
    (edit,) = auto.plan.edits
    assert edit.layers == tuple(range(LAYERS))
    asked = FusionRecipe(keep_layers=1, mode=mode, rank=edit.rank, effort=effort)
    assert auto.plan.notes.recipe == asdict(asked)
    number = search(model, asked, batches_of(model))
    assert same(state_of(auto.model), state_of(number.model))
    verify(auto.model)


@pytest.mark.parametrize("mode", ["share", "basis", pytest.param("residual", marks=pytest.mark.slow)])
def test_sharing_competes_too(mode):
    """Groups and operators also compete for shared blocks."""
    model = whole("vit")
    batches = batches_of(model, 16)
    recipes = [FusionRecipe(keep_layers=3, effort=effort, **MODES[mode]) for effort in ("low", "medium")]
    low, medium = (search(model, recipe, batches) for recipe in recipes)
    assert medium.report.after <= low.report.after
    assert len({row.layers for row in medium.plan.notes.operators}) == 3, "all pairs of neighbours"
    assert set(edits_of(low)) <= set(edits_of(medium))


@pytest.mark.parametrize("operator", ["freeze", "mean", "weighted", "mix", "telescope", "select"])
def test_an_operator_that_was_asked_for_is_the_only_one(operator):
    """A requested operator has no competitors; `weighted` uses the influence of the layers as weights."""
    model = whole("mistral")
    batches = batches_of(model)
    found = search(model, FusionRecipe(keep_layers=3, operator=operator), batches)
    assert {edit.operator for edits in edits_of(found) for edit in edits} == {operator}
    assert found.report.after <= found.report.before
    if operator == "weighted":
        (edit,) = found.plan.edits
        shares = layer_importances(model, Sample.of(batches, 0.25))
        total = sum(shares[layer] for layer in edit.layers)
        assert edit.weights == pytest.approx([shares[layer] / total for layer in edit.layers])
        with pytest.raises(RecipeError, match="pass batches="):
            search(model, FusionRecipe(keep_layers=3, operator="weighted"))


@pytest.mark.parametrize("align", ["none", "permutation", "activation", "transport", "rotation"])
def test_alignment_is_part_of_the_plan(align):
    """The requested alignment is applied before weights are averaged."""
    if align == "transport":
        pytest.importorskip("ot")
    model = whole("qwen3")
    found = search(model, FusionRecipe(keep_layers=3, operator="mean", align=align, effort="low"), batches_of(model))
    assert {edit.align for edit in found.plan.edits} == {align}
    assert found.report.after < found.report.before


@pytest.mark.parametrize("refit", ["full", "linear", "none"])
def test_the_method_of_repair(refit):
    """The search uses the requested refit, or none."""
    model = whole("gpt2")
    found = search(model, FusionRecipe(keep_layers=3, refit=refit, operator="freeze"), batches_of(model))
    maps = {"full": {"read", "out"}, "linear": {"linear"}, "none": set()}
    assert {row["map"] for row in found.report.blocks} == maps[refit]
    assert (found.report.after < found.report.before) == (refit != "none")
    assert found.report.after == loss(found.model, model, batches_of(model))


@pytest.mark.parametrize(("mode", "blocks"), [(mode, "layer") for mode in ["depth", *MODES]] + [("depth", "separate")])
def test_sizes_are_kept_to(mode, blocks):
    """The final model of the search meets the size limit."""
    model = whole("gpt2")
    recipe = {"blocks": blocks, "effort": "high" if blocks == "layer" else "low", "refit": "none"}
    sizes = {kind: planned_size(model, plan(kind, (1, 2))) for kind in ("attention", "mlp")}
    most = sum(size["parameters"] for size in sizes.values()) - planned_size(model, plan("mlp"))["parameters"] + 999
    found = search(model, FusionRecipe(max_parameters=most, **recipe, **MODES.get(mode, {})), batches_of(model, 8))
    assert found.model.num_parameters() <= most


def plan(kind, *groups, **changes):
    return Plan("gpt2", LAYERS, tuple(Fuse(kind, group, **changes) for group in groups))


def test_groups_that_are_too_large_are_passed_over(monkeypatch):
    """With a shared basis, one group of three layers and a single layer are larger than two groups of two. If only the
    latter meet the limit, only they are tried, even if others have a lower loss."""
    model = whole("gpt2")
    small, large = ((0, 1), (2, 3)), ((1, 2, 3),)
    basis = {"mode": "basis", "rank": 8}
    sizes = [planned_size(model, plan("layer", *groups, **basis)) for groups in (small, large)]
    assert sizes[0]["parameters"] < sizes[1]["parameters"]
    monkeypatch.setitem(_CLUSTERS, "auto", lambda matrix, keep: even(LAYERS, keep))
    monkeypatch.setattr(Trials, "loss", lambda self, edit: float(edit.layers != (1, 2, 3)))
    for target, unit in (("max_parameters", "parameters"), ("max_bytes", "bytes")):
        for size, expected in zip(sizes, ([small], [small, large]), strict=True):
            recipe = FusionRecipe(**{target: size[unit]}, **basis, refit="none")
            tried = edits_of(search(model, recipe, batches_of(model, 8)))
            assert [tuple(edit.layers for edit in edits) for edits in tried] == expected


@pytest.fixture(scope="module")
def table():
    """A table of eight layers, for tests with their own losses."""
    model = whole("llama", 8)
    return _Table(model, FusionRecipe(keep_layers=3), batches_of(model, 8), None)


def runs(layers, groups):
    """All partitions of this number of layers into runs."""
    for cuts in itertools.combinations(range(1, layers), groups - 1):
        yield [tuple(range(a, b)) for a, b in itertools.pairwise((0, *cuts, layers))]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7])
def test_groups_are_the_best_partition(monkeypatch, table, count):
    """The groups have the lowest sum of losses of all partitions into runs. Single layers cost nothing, no run exceeds
    the even length by more than two, and longer runs are skipped if shorter ones already lose more."""
    longest, every, measured = -(-8 // count) + 2, 0, 0
    for seed in range(5):
        draw = random.Random(seed)
        costs = {(a, b): draw.random() for a in range(8) for b in range(a + 2, 9)}
        for a, b in sorted(costs, key=lambda run: run[1] - run[0]):  # no less than the runs inside
            costs[a, b] += max(costs.get((a + 1, b), 0), costs.get((a, b - 1), 0))
        asked = []

        def cost(table, edit, costs=costs, asked=asked):
            asked.append(edit.layers)
            return costs[edit.layers[0], edit.layers[-1] + 1]

        def total(groups, costs=costs):
            return sum(costs[group[0], group[-1] + 1] for group in groups if len(group) > 1)

        monkeypatch.setattr(Trials, "loss", cost)
        found = table.groups("layer", count)
        allowed = [groups for groups in runs(8, count) if max(map(len, groups)) <= longest]
        assert total(found) == pytest.approx(min(map(total, allowed)))
        assert list(found) in allowed
        assert len(asked) == len(set(asked)), "a run was measured twice"
        every += sum(8 - size + 1 for size in range(2, min(longest, 8 - count + 1) + 1))
        measured += len(asked)
    assert measured < every or count in (1, 7)


def test_runs_that_cannot_be_fused_are_avoided(monkeypatch, table):
    """A run with infinite loss is in no partition if another partition exists."""
    monkeypatch.setattr(Trials, "loss", lambda self, edit: float("inf") if {3, 4} <= set(edit.layers) else 1.0)
    for count in (2, 3, 5):
        assert not any({3, 4} <= set(group) for group in table.groups("layer", count))


def test_operators_are_those_of_least_loss(monkeypatch, table):
    """Each group takes the candidate with the lowest loss, and the scores have all candidates."""
    plan = Plan("llama", 8, (Fuse("layer", (0, 1)), Fuse("layer", (3, 4, 5))))
    draw = random.Random(0)
    costs = {}
    monkeypatch.setattr(Trials, "_measure", lambda self, edits: costs.setdefault(edits, draw.random()))
    monkeypatch.setattr(table.trials, "losses", {})
    chosen = table.operators(plan)
    for edit, best in zip(plan.edits, chosen.edits, strict=True):
        options = operator_candidates(edit, table.recipe)
        assert len(options) > 2
        assert best == min(options, key=lambda edit: costs[(edit,)])
        assert best.layers == edit.layers
    scores = table.scores()
    assert list(dict.fromkeys(row.layers for row in scores)) == [(0, 1), (3, 4, 5)]
    assert sorted(row.loss for row in scores) == sorted(costs.values())


def test_the_table_measures_the_model_with_one_group_fused():
    """Without a refit, the loss in the table equals the calibration loss of the model with only that group fused."""
    model = whole("qwen2")
    batches = batches_of(model, 8)
    table = _Table(model, FusionRecipe(keep_layers=3, refit="none"), batches, None)
    for edit in (Fuse("layer", (1, 2)), Fuse("mlp", (0, 1, 2)), Fuse("layer", (0, 1), "share", "mean")):
        fused = apply(model, Plan("qwen2", LAYERS, (edit,)))
        assert table.trials.loss(edit) == pytest.approx(
            calibration_loss(fused, model, table.trials.teacher_states.layerwise.sample.held_out_batches), rel=1e-4
        )
    repaired = _Table(model, FusionRecipe(keep_layers=3), batches, None)
    assert repaired.trials.loss(Fuse("layer", (1, 2))) < table.trials.loss(Fuse("layer", (1, 2)))
    assert table.trials.loss(Fuse("layer", (2, 3), operator="mean")) == float("inf"), (
        "layers of two types were averaged"
    )


@pytest.mark.parametrize("model_type", ["gpt2", "vit", "llama"])
def test_runs_that_are_linear_come_first(model_type):
    """Fusing linear layers costs nothing. Otherwise, the nonlinear part counts once for each removed layer."""
    model = whole(model_type)
    architecture = architecture_for(model)
    for layer in architecture.layer_list(model)[1:3]:  # the second and the third add nothing
        for kind in (architecture.attention, architecture.mlp):
            for parameter in layer.get_submodule(kind["out"]).parameters():
                parameter.data.zero_()
    teacher_states = TeacherStates(LayerwiseForward(model, Sample.of(batches_of(model, 32))))
    cost = unexplained(teacher_states, LAYERS)
    assert cost.shape == (LAYERS + 1, LAYERS + 1)
    assert all(cost[i, i + 1] == 0 for i in range(LAYERS))
    assert np.isinf(cost[np.tril_indices(LAYERS + 1)]).all()
    assert cost[1, 3] < 1e-3 < min(cost[0, 2], cost[2, 4])
    assert cost[0, 3] == pytest.approx(2 * cost[0, 2], rel=1e-3)
    assert partition(cost, LAYERS - 1) == [(0,), (1, 2), (3,)]
    assert np.isinf(unexplained(teacher_states, 2)[0, 3])
    plan = search(model, FusionRecipe(keep_layers=3, effort="low"), batches_of(model, 32)).plan
    assert [edit.layers for edit in plan.edits] == [(1, 2)]


@pytest.mark.parametrize("layers", [2, 5, 6, 12])
def test_even_spreads_layers(layers):
    """Runs have equal length, or the middle ones have one layer more."""
    for groups in range(1, layers + 1):
        found = even(layers, groups)
        assert sum(found, ()) == tuple(range(layers))
        sizes = [len(group) for group in found]
        assert len(sizes) == groups
        assert max(sizes) - min(sizes) <= 1
        longer = [i for i, size in enumerate(sizes) if size > min(sizes)]
        if longer:
            assert longer == list(range(longer[0], longer[-1] + 1))
            assert abs(longer[0] - (groups - 1 - longer[-1])) <= 1
    assert even(6, 3) == [(0, 1), (2, 3), (4, 5)]
    assert even(6, 4) == [(0,), (1, 2), (3, 4), (5,)]


@pytest.mark.parametrize("mode", ["depth", pytest.param("residual", marks=pytest.mark.slow)])
def test_the_same_again(mode):
    """Two searches give the same plan and the same model, to the bit."""
    model = whole("roberta")
    recipe = FusionRecipe(keep_layers=3, **MODES.get(mode, {}))
    one, other = (search(model, recipe, batches_of(model)) for _ in range(2))
    assert one.plan == other.plan
    assert one.plan.notes == other.plan.notes
    assert same(state_of(one.model), state_of(other.model))


def test_data_sets_are_batches():
    """A tokenised data set with rows of different lengths gives the same result as its batches."""
    model = whole("roberta")
    rows = [[2 + (7 * i + 3 * j) % 60 for j in range(5 + i % 7)] for i in range(40)]
    data = Dataset.from_dict({"input_ids": rows, "text": ["x"] * 40, "label": [0] * 40})
    fused = fuse(model, keep_layers=3, batches=data, effort="low")
    batches = read(data, model)
    assert [len(batch["input_ids"]) for batch in batches] == [16, 16, 8]
    assert same(state_of(fused), state_of(fuse(model, keep_layers=3, batches=batches, effort="low")))
    assert loss(fused, model, batches) < loss(fuse(model, keep_layers=3), model, batches)


def test_fused_at_load(tmp_path):
    """Fusing while loading equals fusing the loaded model; batches may be a generator."""
    model = whole("llama")
    model.save_pretrained(tmp_path)
    batches = batches_of(model)
    recipe = FusionRecipe(keep_layers=3, effort="low")
    loaded = AutoFusedModel.from_pretrained(tmp_path, recipe=recipe, batches=(batch for batch in batches))
    assert same(state_of(loaded), state_of(fuse(model, recipe, batches=batches)))


def test_modes_and_grads_come_back():
    """The result has the training mode of the model, and the model keeps it; both can be trained."""
    model = whole("bert").train()
    batches = batches_of(model)
    fused = fuse(model, keep_layers=3, batches=batches, effort="low", check=False)
    reference = fuse(model.eval(), keep_layers=3, batches=batches, effort="low", check=False)
    assert same(state_of(fused), state_of(reference)), "dropout was on while calibrating"
    assert all(module.training for module in fused.modules())
    assert not any(module.training for module in reference.modules())
    for which in (model, fused):
        prediction(which(**batches[0])).square().sum().backward()
        assert all(p.requires_grad and p.grad is not None for n, p in which.named_parameters() if "pooler" not in n)


def test_weighted_does_not_depend_on_dropout():
    """The influence of layers is measured without dropout, even if the model is in training mode."""
    model = whole("bert")
    sample = Sample.of(batches_of(model))
    assert layer_importances(model.train(), sample) == layer_importances(model.eval(), sample)


@pytest.mark.parametrize("keep", [1, 3])
def test_mixed_layer_types(keep):
    """The search handles layers of different types: it does not choose an average of them."""
    model = whole("qwen2")
    assert len(set(model.config.layer_types)) == 2
    found = search(model, FusionRecipe(keep_layers=keep), batches_of(model))
    assert depth_of(found.model) == keep
    if keep == 1:
        with pytest.raises(PlanError, match=r"differ in config.layer_types"):
            search(model, FusionRecipe(keep_layers=1, operator="mean"), batches_of(model))


def test_half_precision():
    """Fusing a model in half precision gives a model in half precision."""
    model = whole("llama").to(torch.bfloat16)
    found = search(model, FusionRecipe(keep_layers=3), batches_of(model))
    assert found.model.dtype == torch.bfloat16
    assert found.report.after < found.report.before


def test_nothing_is_said_on_the_way(capfd):
    """A normal search raises no warning."""
    model = whole("gpt2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fuse(model, keep_layers=3, batches=batches_of(model))
    assert "Warning" not in capfd.readouterr().err
