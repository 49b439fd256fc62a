"""Notes of plans round-trip as JSON; those of 0.1.0 and of users are read, and those of later releases refused."""

import dataclasses
import json
from pathlib import Path

import pytest

from hf_layerfuse import CollapseRecipe, Drop, Fuse, Linearize, Plan, PlanError
from hf_layerfuse.pipeline.report.candidates import sections
from hf_layerfuse.pipeline.report.plots import draw
from hf_layerfuse.pipeline.report.run_card import _timed
from hf_layerfuse.plan import (
    CandidatePlan,
    EditLoss,
    FrontierPoint,
    LinearActivation,
    OperatorLoss,
    PlanLatency,
    PlanNotes,
    RefitReport,
    SegmentLoss,
)

PLANS = Path(__file__).parents[1] / "corpus" / "0.1.0" / "plans"

NOTES = PlanNotes(
    recipe=dataclasses.asdict(CollapseRecipe(count=1)),
    calibration="8 sequences",
    distances={"layer": [[0.0, None], [None, 0.0]]},
    operators=(OperatorLoss("layer", (0, 1), "select", 0.5, keep=0), OperatorLoss("mlp", (0, 1), "mean", 0.25)),
    losses=(
        EditLoss(Fuse("layer", (0, 1), operator="weighted", weights=(0.25, 0.75)), 0.5),
        EditLoss(Drop("mlp", 1), 0),
    ),
    competition=(CandidatePlan((Drop("mlp", 1), Linearize(0, rank=2)), 0.5, 0.75, 0.625, 2.5), CandidatePlan((), 0.0)),
    frontier=(FrontierPoint(0.6, 0.5), FrontierPoint(0.8, 0.0)),
    latency_ms=PlanLatency(4.0, 2.0, 2.5, 1.0, {"input_ids": [1, 8]}),
    refit=RefitReport(
        0.75, 0.5, kept=True, blocks=({"layer": 0, "kind": "mlp", "map": "in", "before": 2, "after": 1},)
    ),
    homotopy=(LinearActivation(0, 0.99, 0.01), LinearActivation(1, 0.98)),
    rounds=(Plan("gpt2", 4, (Drop("layer", 3),), PlanNotes(calibration="8 sequences")), Plan("gpt2", 3)),
    extra={"norms": [1.0, 2.0]},
)
SEGMENTS = PlanNotes(losses=(SegmentLoss(0, 6, 7, False, 0.5), SegmentLoss(8, 10, 3, True, 0.25)))


def old(name):
    """JSON of the notes in a plan of the corpus, and the notes that are read from it."""
    tree = json.loads((PLANS / f"{name}.json").read_text(encoding="utf-8"))["notes"]
    return tree, Plan.load(PLANS / f"{name}.json").notes


@pytest.mark.parametrize("notes", [NOTES, SEGMENTS, PlanNotes()], ids=["all", "segments", "empty"])
def test_round_trip(notes):
    """Every kind of note survives JSON, in a plan too; empty fields are not written."""
    tree = json.loads(json.dumps(notes.to_dict()))
    assert PlanNotes.from_dict(tree) == notes
    assert Plan.from_json(Plan("gpt2", 4, notes=notes).to_json()).notes == notes
    filled = {each.name for each in dataclasses.fields(notes) if getattr(notes, each.name)}
    assert tree.keys() == {"format_version", *filled}


def test_every_field_is_in_a_round_trip():
    """A new field of the notes gets a value above."""
    assert all(getattr(NOTES, each.name) for each in dataclasses.fields(NOTES))


def test_rounds_keep_their_notes():
    """Equality of plans ignores notes, so the notes of rounds are compared on their own."""
    again = PlanNotes.from_dict(NOTES.to_dict())
    assert [plan.notes for plan in again.rounds] == [plan.notes for plan in NOTES.rounds]


def test_plans_are_equal_whatever_their_notes():
    """Two plans that do the same are equal and have one hash; a config carries no notes."""
    one, other = Plan("gpt2", 4, notes=NOTES), Plan("gpt2", 4)
    assert one == other
    assert hash(one) == hash(other)
    assert "notes" not in one.to_dict(notes=False)


def test_a_mapping_becomes_notes():
    """A plan converts a mapping; code that reads notes by keys fails instead of finding nothing."""
    plan = Plan("gpt2", 4, notes={"losses": {"3": 0.5}, "norms": [1.0]})
    assert plan.notes == PlanNotes(losses=(EditLoss(Linearize(3), 0.5),), extra={"norms": [1.0]})
    with pytest.raises(TypeError, match="'PlanNotes' object is not subscriptable"):
        plan.notes["losses"]


def test_keys_of_users_are_kept():
    """Unknown keys, in notes with and without a version, are in `extra` and in what is written."""
    mine = {"norms": [1.0], "latency": "low", "extra": 1}
    for tree in (mine, {"format_version": 1, "norms": [1.0], "extra": {"latency": "low", "extra": 1}}):
        notes = PlanNotes.from_dict(tree)
        assert notes.extra == mine
        assert PlanNotes.from_dict(json.loads(json.dumps(notes.to_dict()))) == notes


def test_newer_notes_are_refused():
    """The message names both versions and the next step; a version that never was is refused too."""
    with pytest.raises(PlanError, match=r"the notes of the plan have format version 2; .* up to 1: upgrade with `pip"):
        Plan.from_dict({**Plan("gpt2", 4).to_dict(), "notes": {"format_version": 2}})
    with pytest.raises(PlanError, match="format_version='1' is not a known version"):
        PlanNotes.from_dict({"format_version": "1"})


@pytest.mark.parametrize(
    ("tree", "what"),
    [
        (["loss"], "'list' object has no attribute 'get'"),
        ({"competition": [{"loss": 1}]}, "'edits' is missing"),
        ({"losses": {"first": 0.5}}, "invalid literal for int"),
        ({"format_version": 1, "frontier": [{"share": 0.5}]}, "missing 1 required positional argument: 'loss'"),
    ],
)
def test_damaged_notes_are_refused(tree, what):
    """The error says what is wrong, and what to do."""
    with pytest.raises(PlanError, match=rf"the notes of the plan cannot be read: .*{what}.* or remove `notes`"):
        Plan("gpt2", 4, notes=tree)


def test_linear_mlps_of_0_1():
    """Layers become `Linearize` edits with the rank and the fold of the recipe."""
    tree, notes = old("collapse-fitted")
    assert notes.losses == tuple(EditLoss(Linearize(layer), tree["losses"][str(layer)]) for layer in range(4))
    assert notes.losses[3].loss == 0.0008549645362168248
    assert notes.competition == (CandidatePlan((Linearize(2), Linearize(3)), 0.0030067742527155683),)
    assert notes.calibration == "12 sequences"
    _, notes = old("collapse-rank")
    assert notes.losses[0] == EditLoss(Linearize(0, rank=4), 0.028754808409206713)
    assert notes.competition[0].edits == (Linearize(3, rank=4),)
    _, notes = old("straighten")
    assert notes.homotopy[0] == LinearActivation(2, 0.9966695308685303, 0.0008326967038182926)


def test_segments_of_0_1():
    """Keys of segments and shares in percent become numbers."""
    tree, notes = old("merge-fitted")
    assert notes.losses == (SegmentLoss(0, 6, 7, False, 0.03721005005716885),)
    assert notes.frontier[:2] == (FrontierPoint(0.40, 0.4029293240832599), FrontierPoint(0.44, 0.05957682396985402))
    assert len(notes.frontier) == len(tree["frontier"])
    assert notes.latency_ms == PlanLatency(**tree["latency_ms"])
    assert notes.latency_ms.measured == 0.7452271567127009
    assert notes.refit.blocks[0]["segment"] == [0, 6]
    assert old("merge-mobilenet")[1].losses[0] == SegmentLoss(14, 18, 1, False, 0.0003271395874876598)


def test_fused_blocks_of_0_1():
    """Operators that were named in words, and candidates with their latency, become records."""
    tree, notes = old("fuse-medium")
    assert notes.operators[0] == OperatorLoss("layer", (0, 1), "select", 0.01910897384665436, keep=0)
    assert len(notes.operators) == sum(len(group["losses"]) for group in tree["operators"])
    assert {row.align for row in notes.operators} == {"none", "rotation"}
    assert notes.competition[0].loss_before_refit == 0.1571808877398233
    assert notes.distances == tree["distances"]
    assert notes.refit.after == 0.01605381106723861
    _, notes = old("fuse-latency")
    assert notes.losses[0] == EditLoss(Linearize(0), 0.27626037276540394)
    edit = Fuse("layer", (1, 2, 3), operator="select", keep=1)
    loss = 0.11753115800140077
    assert notes.competition[0] == CandidatePlan((edit,), loss, 0.17072675628605222, loss, 2.193484910255921)
    assert list(notes.latency_ms.inputs) == ["input_ids"]
    _, notes = old("composed-rounds")
    assert [plan.num_layers for plan in notes.rounds] == [4, 3]
    assert notes.rounds[0].notes.competition[0].loss == 0.0012193719033148217


QUICK = ("composed-rounds", "straighten")
PATHS = [
    pytest.param(path, id=path.stem, marks=() if path.stem in QUICK or index % 3 == 0 else pytest.mark.slow)
    for index, path in enumerate(sorted(PLANS.glob("*.json")))
]


@pytest.mark.parametrize("path", PATHS)
def test_notes_of_0_1_are_shown(path, tmp_path):
    """Page, card and pictures have all that the notes of 0.1.0 hold, before and after saving."""
    plan = Plan.load(path)
    assert not plan.notes.extra
    again = Plan.from_json(plan.to_json())
    assert again.notes == plan.notes
    tree = json.loads(path.read_text(encoding="utf-8"))["notes"]
    shown = sections(plan)
    assert shown == sections(again)
    words = " ".join(word for part in shown for word in (part.words, *(cell for row, _ in part.rows for cell in row)))
    for name in ("competition", "losses", "frontier"):
        rows = tree.get(name, {})
        losses = rows.values() if isinstance(rows, dict) else [row["loss"] for row in rows]
        assert all(f"{loss:.4g}" in words for loss in losses), name
    assert bool(_timed(plan)) is ("latency_ms" in tree)
    drawn = draw(plan, None, tmp_path).keys()
    # where distances hardly differ, losses say more
    assert "distances" not in tree or drawn & {"distances.png", "candidates.png"}


def test_words_of_0_1():
    """A page names the candidates of 0.1.0 in words: MLPs by layers, segments by convolutions."""
    tables = {
        name: {part.title: [row for row, _ in part.rows] for part in sections(Plan.load(PLANS / f"{name}.json"))}
        for name in ("collapse-fitted", "merge-fitted", "fuse-latency")
    }
    single = tables["collapse-fitted"]["Single edits"]
    assert single[:2] == [["edit", "calibration loss"], ["the MLP of layer 2", "0.001669"]]
    assert tables["merge-fitted"]["Single edits"][1] == ["convolutions 1, 2, 3, 4, 5, 6, kernel 7", "0.03721"]
    assert tables["merge-fitted"]["Other latency budgets"][1] == ["40%", "0.4029"]
    single = tables["fuse-latency"]["Single edits"]
    assert single[1] == ["layers 1, 2, 3 (select, layer 1)", "0.1175"]
    assert single[2][0] == "the MLP of layer 3 made linear"
