"""Edits of each block within a latency budget: chosen exactly, judged again in combination, and cached in files."""

import copy
import itertools
import json
import random

import pytest
import torch
from helpers import TINY, batches_of, network, state_of, whole

from hf_layerfuse import (
    Drop,
    Fuse,
    FusionRecipe,
    LayerFuseError,
    Linearize,
    Plan,
    RecipeError,
    UnsupportedModelError,
    apply,
    fuse,
    plan_fusion,
    search,
    verify,
)
from hf_layerfuse.calibration.layerwise import LayerwiseForward
from hf_layerfuse.calibration.refit.base import RefitReport
from hf_layerfuse.calibration.refit.refit import refit
from hf_layerfuse.calibration.samples import Sample
from hf_layerfuse.calibration.teacher_states import TeacherStates
from hf_layerfuse.evaluation.cache import MeasurementCache
from hf_layerfuse.evaluation.divergence import calibration_loss
from hf_layerfuse.evaluation.timing import Timed
from hf_layerfuse.methods.candidates import Candidate
from hf_layerfuse.methods.fusion.block_latency import BlockLatencies
from hf_layerfuse.methods.fusion.candidates import BlockImportance, block_candidates
from hf_layerfuse.methods.fusion.latency_search import _Budget, batch_of
from hf_layerfuse.methods.latency_budget import within
from hf_layerfuse.methods.trials import Trials
from hf_layerfuse.models.architectures import architecture_for

pytestmark = pytest.mark.usefixtures("steady")


def weight(edit):
    """A loss for each edit, larger for edits that do more."""
    draw = random.Random(repr((edit.edit, edit.kind, edit.layers)))
    if isinstance(edit, Fuse):  # a run loses more than those inside of it
        return sum(weight(Linearize(layer)) for layer in edit.layers) * 1.1
    return draw.random() + {("linearize", "mlp"): 0, ("drop", "mlp"): 1, ("drop", "attention"): 0.3}.get(
        (edit.edit, edit.kind), 2.5
    )


@pytest.mark.parametrize(
    "model_type",
    [pytest.param(name, marks=() if name == "llama" else pytest.mark.slow) for name in TINY],
)
def test_a_budget_is_kept(model_type):
    """For every architecture, the result meets the budget, is the best candidate, and has the loss of the notes, which
    are JSON. It saves and reloads, and the input is unchanged."""
    model = whole(model_type)
    batches, before = batches_of(model, 24), state_of(model)
    found = search(model, FusionRecipe(latency_budget=0.7), batches)
    notes = Plan.from_json(found.plan.to_json()).notes
    assert notes == found.plan.notes
    times = notes.latency_ms
    assert times.measured <= 0.7 * times.original
    assert times.predicted == pytest.approx(times.measured, rel=0.01)
    assert times.original == pytest.approx(1e-3 * sum(p.numel() for p in model.parameters()))
    assert times.measured == pytest.approx(1e-3 * sum(p.numel() for p in found.model.parameters()), rel=0.05)
    assert found.report.after == min(row.loss for row in notes.competition)
    assert found.report.after == pytest.approx(
        calibration_loss(found.model, model, Sample.of(batches).held_out_batches)
    )
    assert verify(found.model)["reload"] == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in state_of(model).items())


def test_fuse_keeps_a_budget():
    """`fuse` accepts a budget, also in milliseconds, and verifies the result."""
    model = whole("gpt2")
    batches = batches_of(model, 16)
    size = sum(p.numel() for p in model.parameters())
    for target in ({"latency_budget": 0.6}, {"latency_ms": 6e-4 * size}):
        small = fuse(model, **target, batches=iter(batches), effort="low")
        assert sum(p.numel() for p in small.parameters()) <= 0.6 * size


@pytest.mark.parametrize(("choose", "share"), [("all", 0.45), ("all", 0.8), ("runs", 0.45), ("runs", 0.8)])
def test_the_best_choice_of_all(monkeypatch, share, choose):
    """If losses add up, the result has the lowest sum of all combinations within the budget, although few options are
    measured. This sum is the predicted loss."""
    model = whole("gpt2")
    measured = []
    monkeypatch.setattr(Trials, "_measure", lambda self, edits: measured.append(edits) or sum(map(weight, edits)))
    recipe = FusionRecipe(latency_budget=share, effort="low", operator="freeze", choose=choose)
    with torch.no_grad():
        job = _Budget(model, architecture_for(model), recipe, batches_of(model, 8))
    length = 2 * job.depth
    paths = {0: [[]]}
    for end in range(1, length + 1):
        paths[end] = [
            [*path, candidate]
            for candidate in job.candidates
            if candidate.end == end
            for path in paths[candidate.start]
        ]
    every = paths[length]
    fitting = [path for path in every if sum(map(job.latencies.of, path)) <= job.limit]
    least = min(sum(weight(candidate.edit) for candidate in path if candidate.edit) for path in fitting)
    found = job.run()
    assert sum(map(weight, found.plan.edits)) == pytest.approx(least)
    [row] = found.plan.notes.competition
    assert row.expected_loss == pytest.approx(least)
    assert len(measured) < len(job.candidates) or choose == "runs"


def test_there_is_always_something_left():
    """The cheapest combination is possible. A smaller budget is refused with the smallest one that works."""
    model = whole("bert")
    batches = batches_of(model, 8)
    with pytest.raises(RecipeError, match=r"the fastest available plan takes (.*) ms, (.*)% of") as refused:
        search(model, FusionRecipe(latency_budget=0.01), batches)
    least = float(str(refused.value).split("available plan takes ")[1].split(" ms")[0])
    found = search(model, FusionRecipe(latency_ms=least * 1.01, effort="low"), batches)
    assert found.plan.notes.latency_ms.measured <= least * 1.02
    assert verify(found.model)["reload"] == 0


def test_what_misleads_is_judged_again(monkeypatch):
    """Two options are harmless alone and harmful together. Effort `low` trusts their sum. Effort `medium` finds a
    better combination."""
    model = whole("gpt2")
    bad = {Linearize(1), Linearize(2)}

    def true_loss(edits):
        return sum(map(loss_of, edits)) + 50 * (bad <= set(edits))

    def loss_of(edit):
        return 0.0 if edit in bad else weight(edit)

    monkeypatch.setattr(Trials, "_measure", lambda self, edits: true_loss(edits))
    monkeypatch.setattr(
        _Budget,
        "_carried_out",
        lambda self, plan: (
            apply(self.model, plan),
            RefitReport(true_loss(plan.edits), true_loss(plan.edits), kept=False),
        ),
    )
    found = {}
    for effort in ("low", "medium"):
        recipe = FusionRecipe(latency_budget=0.6, effort=effort, operator="freeze")
        found[effort] = search(model, recipe, batches_of(model, 8))
    assert bad <= set(found["low"].plan.edits)
    assert not bad <= set(found["medium"].plan.edits)
    assert found["medium"].report.after < found["low"].report.after


def test_what_is_believed_until_it_is_measured():
    """An unmeasured option is assumed to lose at least as much as the options that it includes, which are measured
    first. On top of others, its loss alone is scaled by the ratio of their losses there and alone."""

    class Halved:
        """Losses that add up, and are halved on top of other edits."""

        def __init__(self, base):
            self.base = base

        def loss(self, *edits):
            return (0.5 if self.base else 1.0) * sum(map(weight, edits))

    drop, linear = Candidate(3, 4, Drop("mlp", 1)), Candidate(3, 4, Linearize(1))
    run, other = Candidate(4, 8, Fuse("layer", (2, 3))), Candidate(1, 2, Linearize(0))
    candidates = [Candidate(0, 1, None), drop, linear, run, other]
    recipe = FusionRecipe(latency_budget=0.5)
    alone = BlockImportance(candidates, Halved(()), MeasurementCache(None, {}), recipe)
    assert alone.of(Candidate(0, 1, None)) == alone.of(drop) == 0.0
    assert alone.first(drop) == [linear]
    alone.measure(linear)
    assert alone.of(drop) == weight(linear.edit)
    assert alone.first(drop) == [drop]
    for candidate in (drop, run, other):
        alone.measure(candidate)
    above = BlockImportance(candidates, Halved((run,)), MeasurementCache(None, {}), recipe, [run], alone)
    assert above.of(run) == pytest.approx(0.5 * weight(run.edit))
    assert not above.knows(drop)
    assert above.of(drop) == pytest.approx(0.5 * weight(drop.edit))
    assert above.total([run, drop]) == pytest.approx(0.5 * (weight(run.edit) + weight(drop.edit)))


@pytest.mark.parametrize("model_type", ["gpt2", "bert", "llama"])
def test_candidates_on_top_of_others(model_type):
    """A trial on top of a refitted student equals that student with one edit more or less, exactly so without a
    refit."""
    model = whole(model_type)
    batches = batches_of(model, 16)
    architecture = architecture_for(model)
    sample = Sample.of(batches)

    def plan(*edits):
        return Plan(architecture.model_type, 4, edits)

    base = plan(Drop("attention", 1), Linearize(2))
    student = apply(model, base)
    refit(student, model, base, batches)
    trials = Trials(model, "none", batches, TeacherStates(LayerwiseForward(model, sample)), (student, base))
    assert trials.loss(*base.edits) == pytest.approx(
        calibration_loss(student, model, sample.held_out_batches), rel=1e-4
    )
    for edits in ((Drop("attention", 1),), (*base.edits, Drop("mlp", 3)), (Drop("layer", 1), Linearize(2))):
        made = apply(model, plan(*edits))
        for slot, layer in zip(plan(*edits).layout().slots, architecture.layer_list(made), strict=True):
            same = [index for index, other in enumerate(base.layout().slots) if other == slot]
            if same:
                layer.load_state_dict(architecture.layer_list(student)[same[0]].state_dict())
        loss = calibration_loss(made, model, sample.held_out_batches)
        assert trials.loss(*edits) == pytest.approx(loss, rel=1e-4)
    fitted = Trials(model, "full", batches, TeacherStates(LayerwiseForward(model, sample)), (student, base))
    assert fitted.loss(*base.edits, Drop("mlp", 3)) < trials.loss(*base.edits, Drop("mlp", 3))


def test_tables_are_kept(monkeypatch, tmp_path):
    """Another budget, and the same one again, measure nothing twice. An interrupted search resumes. Caches of other
    weights, data or devices are refused."""
    model, recipe = whole("gpt2"), FusionRecipe(latency_budget=0.7, tables=str(tmp_path))
    batches = batches_of(model, 16)
    measure, count = Trials._measure, itertools.count(1)

    def interrupted(self, edits):
        if next(count) == 6:
            raise KeyboardInterrupt
        return measure(self, edits)

    monkeypatch.setattr(Trials, "_measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        search(model, recipe, batches)
    assert len(json.loads((tmp_path / "losses.json").read_text())["values"]) == 5
    found = search(model, recipe, batches)
    monkeypatch.setattr(Trials, "_measure", lambda self, edits: pytest.fail("measured twice"))
    monkeypatch.setattr("hf_layerfuse.evaluation.timing.interleaved", lambda *_, **__: pytest.fail("timed twice"))
    again = search(model, recipe, batches)
    assert again.plan.edits == found.plan.edits
    assert all(torch.equal(tensor, state_of(again.model)[name]) for name, tensor in state_of(found.model).items())
    with pytest.raises(LayerFuseError, match="measured under other conditions: batches was"):
        search(model, recipe, batches_of(model, 17))
    other = whole("gpt2", seed=1)
    with pytest.raises(LayerFuseError, match="measured under other conditions: weights was"):
        search(other, recipe, batches)
    with pytest.raises(LayerFuseError, match="measured under other conditions: inputs was"):
        search(model, FusionRecipe(latency_budget=0.7, latency_batch_size=3, tables=str(tmp_path)), batches)


def test_blocks_take_shares_of_the_whole():
    """The latencies of the blocks and the rest add up to the model's. Layers of another type are timed separately."""
    model = whole("qwen2", layers=6)
    architecture, batches = architecture_for(model), batches_of(model, 4)
    types = {}

    def by_type(runs, device, **_):
        """Latency that doubles for a layer with a window."""
        found = {}
        for name, run in runs.items():
            layers = architecture.layer_list(run.func)
            kinds = run.func.config.layer_types
            per_layer = [
                sum(p.numel() for p in layer.parameters()) * (2 if kind.startswith("sliding") else 1)
                for layer, kind in zip(layers, kinds, strict=True)
            ]
            types[name] = kinds
            found[name] = Timed(100.0 + sum(per_layer), 0.0)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_layerfuse.evaluation.timing.interleaved", by_type)
        times = BlockLatencies(model, batch_of(Sample.of(batches), 2))
    kinds = model.config.layer_types
    assert len(set(kinds)) == 2
    assert times.rest + sum(times.layer(layer) for layer in range(6)) == pytest.approx(times.original)
    for layer, kind in enumerate(kinds):
        assert times.layer(layer) == pytest.approx(times.layer(0) * (1 if kind == kinds[0] else 2))
        assert sum(times.block(layer, kind) for kind in architecture.kinds) == pytest.approx(times.layer(layer))
        assert 0 < times.linear(layer) < times.block(layer, "mlp")


@pytest.mark.slow
def test_what_takes_longer_together(monkeypatch, caplog):
    """If models are slower than the sum of their blocks, the budget of the program shrinks until the result meets the
    real one. If that is impossible, there is a warning."""
    model = whole("gpt2")
    batches = batches_of(model, 8)

    def together(runs, device, **_):
        """Latency that is a fifth higher for all models but the original and the four models that time blocks."""
        slower = 1.0 if len(runs) == 5 else 1.2
        sizes = {name: sum(p.numel() for p in run.func.parameters()) for name, run in runs.items()}
        return {name: Timed(size * (1.0 if name == "original" else slower), 0.0) for name, size in sizes.items()}

    monkeypatch.setattr("hf_layerfuse.evaluation.timing.interleaved", together)
    times = search(model, FusionRecipe(latency_budget=0.7, effort="low"), batches).plan.notes.latency_ms
    assert times.measured == pytest.approx(1.2 * times.predicted, rel=0.01)
    assert times.measured <= 1.02 * 0.7 * times.original
    assert not caplog.text
    monkeypatch.setattr("hf_layerfuse.methods.latency_budget.TRIES", 0)
    times = search(model, FusionRecipe(latency_budget=0.7, effort="low"), batches).plan.notes.latency_ms
    assert times.measured > 1.02 * 0.7 * times.original
    assert "its parts are slower together than alone" in caplog.text


def test_a_smaller_limit_where_the_whole_takes_longer(caplog):
    """The limit is nearly the largest one whose choice is measured within the budget; if there is none, it is the
    smallest."""

    def choose(limit):
        if limit < 5:
            raise RecipeError("out of reach")
        return limit

    for slower, expected in ((1.0, 10), (1.25, 8)):
        chosen, limit = within(choose, lambda chosen, slower=slower: slower * chosen, 10.0, 10.0)
        assert chosen == limit == pytest.approx(expected, rel=0.02)
    assert not caplog.text
    assert within(choose, lambda chosen: 1.25 * chosen + 4, 10.0, 10.0)[0] >= 5
    assert "above the budget of 10 ms" in caplog.text


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_what_keeps_the_budget_wins(monkeypatch, order):
    """A combination that is too slow is not the result, however low its loss and whatever the order."""
    model = whole("gpt2")
    monkeypatch.setattr(Trials, "_measure", lambda self, edits: sum(map(weight, edits)))
    monkeypatch.setattr(
        _Budget,
        "_carried_out",
        lambda self, plan: (apply(self.model, plan), RefitReport(1.0, 0.2 * len(plan.edits), kept=True)),
    )
    with torch.no_grad():
        job = _Budget(
            model, architecture_for(model), FusionRecipe(latency_budget=0.6, effort="low"), batches_of(model, 8)
        )
    monkeypatch.setattr(job.latencies, "model_of", lambda plan: job.allowed * (1.0 if len(plan.edits) == 2 else 1.1))
    slow, fast = ([Candidate(2 * n + 1, 2 * n + 2, Linearize(n)) for n in layers] for layers in ((1,), (1, 2)))
    for place in order:
        job._try(job._importance(), (slow, fast)[place])
    assert job.best[0] == fast


def test_the_candidates_of_a_model():
    """Options are blocks kept, each removed, both removed, linear MLPs, and every run; the first layer stays."""
    model = whole("llama")
    architecture = architecture_for(model)
    candidates = block_candidates(model, architecture, lambda run: Fuse("layer", run), runs_only=False)
    edits = [candidate.edit for candidate in candidates]
    assert edits.count(None) == 8
    assert {edit.layers for edit in edits if isinstance(edit, Fuse)} == {
        tuple(range(i, j)) for i in range(4) for j in range(i + 2, 5)
    }
    assert {(edit.kind, edit.layer) for edit in edits if isinstance(edit, Drop)} == set(
        itertools.product(("attention", "mlp", "layer"), (1, 2, 3))
    )
    assert [edit.layer for edit in edits if isinstance(edit, Linearize)] == [0, 1, 2, 3]
    for candidate in candidates:
        if candidate.edit is not None:
            places = {2 * layer + at for layer in candidate.edit.layers for at in (0, 1)}
            assert {*range(candidate.start, candidate.end)} <= places
    assert Candidate(2, 4, Drop("layer", 1)).includes(Candidate(3, 4, Linearize(1)))
    assert not Candidate(3, 4, Linearize(1)).includes(Candidate(3, 4, Drop("mlp", 1)))
    assert not Candidate(2, 6, Fuse("layer", (1, 2))).includes(Candidate(2, 4, Drop("layer", 1)))


def test_a_batch_of_middle_length():
    batches = [{"input_ids": torch.arange(3 * n).view(3, n)} for n in (4, 9, 7)]
    batch = batch_of(Sample.of(batches), 5)
    assert batch["input_ids"].shape == (5, 7)
    assert batch["input_ids"][3].equal(batch["input_ids"][0])


def test_what_cannot_be():
    """Errors: no batches, convolutions, a plan from weights alone, and fields that do not apply to a latency target."""
    model = whole("gpt2")
    with pytest.raises(RecipeError, match="pass batches="):
        fuse(model, latency_budget=0.5)
    with pytest.raises(RecipeError, match="needs measurements: use search"):
        plan_fusion(model, FusionRecipe(latency_budget=0.5))
    with pytest.raises(RecipeError, match="is met already"):
        fuse(model, latency_ms=1e9, batches=batches_of(model, 8))
    gated, recipe = whole("llama"), FusionRecipe(latency_budget=0.7, refit="none", effort="low")
    assert not any(isinstance(edit, Linearize) for edit in search(gated, recipe, batches_of(gated, 8)).plan.edits)
    with pytest.raises(UnsupportedModelError, match="use merge"):
        search(copy.deepcopy(network("cifar")).float(), FusionRecipe(latency_budget=0.5), None)
    for wrong, match in (
        ({"latency_budget": 1.5}, "between 0 and 1"),
        ({"latency_ms": 0.0}, "above 0"),
        ({"latency_budget": 0.5, "ratio": 0.5}, "exactly one target"),
        ({"latency_budget": 0.5, "mode": "share"}, "does not make the model faster"),
        ({"latency_budget": 0.5, "blocks": "mlp"}, "blocks='mlp'"),
        ({"latency_budget": 0.5, "cluster": "adjacent"}, "cluster='adjacent'"),
        ({"latency_budget": 0.5, "refit": "linear"}, "cannot fit linear MLPs"),
        ({"latency_budget": 0.5, "latency_repeats": 0}, "1 or more"),
        ({"ratio": 0.5, "choose": "runs"}, "choose='runs' needs a latency target"),
        ({"ratio": 0.5, "tables": "x"}, "tables='x' needs a latency target"),
    ):
        with pytest.raises(RecipeError, match=match):
            FusionRecipe(**wrong)
