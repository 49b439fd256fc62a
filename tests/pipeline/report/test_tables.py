"""Tables and sentences about a run: every kind of edit has a description, and every metric a name."""

import dataclasses
from typing import get_args

import pytest
from runs import PLAN, REPORT, RESULTS, SMALLER, STAGE, healed_by, recipe, results

from hf_layerfuse import Blend, Drop, Fuse, Linearize, MergeConvs, Plan
from hf_layerfuse.pipeline.report.change import change_of
from hf_layerfuse.pipeline.report.closing import closing
from hf_layerfuse.pipeline.report.tables import in_short, limitations_of, rows
from hf_layerfuse.pipeline.report.verdict import in_bytes, verdict
from hf_layerfuse.pipeline.results import RetrainedOriginal
from hf_layerfuse.plan import CONV_GRAPH_KINDS
from hf_layerfuse.plan.edit import Kind, Mode
from hf_layerfuse.plan.words import describe, in_brief


@pytest.mark.parametrize("kind", get_args(Kind))
@pytest.mark.parametrize("mode", get_args(Mode))
def test_every_edit_has_words(kind, mode):
    """A description names the layers, their change, and the rank if there is one."""
    kinds = {"conv": ("conv",), "cross": ("attention", "cross", "mlp")}.get(kind, ("attention", "mlp"))
    rank = 0 if mode == "depth" else 8
    plan = Plan("gpt2", 12, (Fuse(kind, (2, 3), mode, rank=rank), Drop(kind, 7)), kinds=kinds)
    fused, dropped = describe(plan)
    assert "layers 2, 3: " in fused
    assert ("8" in fused) == (rank > 0)
    assert "7: dropped" in dropped


def test_linear_and_merged_parts_have_words():
    """Each description names the source blocks; folded batch norms are left out."""
    lines = describe(Plan("bert", 12, (Linearize(1), Linearize(2, rank=4), Linearize(3, fold=True), Blend(4))))
    assert "layer 1: becomes one linear map" in lines[0]
    assert "rank 4" in lines[1]
    assert "includes the residual sum" in lines[2]
    assert "becomes a line in training" in lines[3]
    edits = MergeConvs(-1, 0, (0,)), MergeConvs(0, 2, (2,)), MergeConvs(2, 3, ()), MergeConvs(3, 5, (4,), merged=False)
    lines = describe(Plan("resnet", 6, edits, kinds=CONV_GRAPH_KINDS))
    assert lines == [
        "convolutions 1, 2: become one, made of 2",
        "convolution 3: removed",
        "convolutions 4, 5: become one, made of 4, not merged yet",
    ]


def test_a_shared_block_without_residuals_has_none():
    (line,) = describe(Plan("gpt2", 12, (Fuse("layer", (2, 3), "share"),)))
    assert "residuals" not in line


def test_what_was_healed_before_is_not_called_fused():
    """With rounds, the last fusion starts from a healed model, and its column says so."""
    assert rows(results())[0] == ["", "before", "fused", "healed"]
    twice = results(rounds=healed_by(REPORT, REPORT))
    assert rows(twice)[0] == ["", "before", "fused in the last round", "healed"]


def test_a_change_has_its_interval():
    """Perplexities change by a share, accuracies by points. An interval with 0 inside is no clear change."""

    def change(metric, before, after, interval=None):
        metrics = {metric: after} | ({f"{metric}_change_interval": interval} if interval else {})
        return change_of(metric, *(dataclasses.replace(STAGE, metrics=each) for each in ({metric: before}, metrics)))

    worse = change("token_perplexity", 20.0, 21.5, [0.06, 0.09])
    assert (str(worse), worse.bounds, worse.verdict) == ("+7.5%", "+6.0 to +9.0%", "worse")
    better = change("accuracy", 0.8, 0.85, [0.01, 0.09])
    assert (str(better), better.bounds, better.verdict) == ("+5.0 points", "+1.0 to +9.0", "better")
    assert change("accuracy", 0.8, 0.79, [-0.03, 0.0]).verdict == "no clear change"
    assert change("accuracy", 0.8, 0.79).verdict == ""
    assert str(change("accuracy", 0.8, 0.79999)) == "0.0 points"
    assert str(change("token_perplexity", 20.0, 2000.0)) == "+9,900%"
    assert change("cosine", 1.0, 0.9) is None
    assert change("token_perplexity", float("inf"), 20.0) is None


def test_a_change_has_a_row():
    """The row of a change follows its metric, and the original has none. Results of 0.1.0 have no intervals."""
    after = dataclasses.replace(SMALLER, metrics={"accuracy": 0.875, "accuracy_change_interval": [-0.04, -0.01]})
    both = rows(dataclasses.replace(RESULTS, fused=after))
    assert both[-2:] == [["  change", "", "-2.5 points"], ["  95% interval of the change", "", "-4.0 to -1.0"]]
    assert rows(RESULTS)[-1] == ["  change", "", "-2.5 points"]


def test_healing_that_found_nothing_is_marked():
    """The columns of the healed model and of the retrained original say so."""
    kept = dataclasses.replace(REPORT, best_step=0)
    table = rows(results(rounds=healed_by(kept), retrained=RetrainedOriginal(STAGE, kept)))
    assert table[0][-2:] == ["healed (nothing better found)", "original, retrained (nothing better found)"]
    assert len({len(row) for row in table}) == 1
    found = verdict(Plan("bert", 12, (Drop("layer", 3),)), results(rounds=healed_by(kept)))
    assert found[-1].details == ("1 block dropped", "healing found nothing better")


def test_the_verdict_is_fair():
    """A speed-up within the spread of its times is none, and a larger file is called so."""
    plan = Plan("bert", 12, (Linearize(1), Linearize(2)))
    size, speed, quality, done = verdict(plan, results())
    assert (size.value, size.tone) == ("same size", "neutral")
    assert (speed.value, speed.tone) == ("1.50\u00d7 as fast", "good")
    assert "1.47 to 1.53 between the quartiles" in speed.details
    assert (quality.value, quality.tone) == ("-2.5 points", "neutral"), "without an interval nothing is called worse"
    assert done.value == "2 MLPs made linear"
    noisy = {8: dataclasses.replace(SMALLER.latency[8], median_ms=29.9, speedup=30 / 29.9)}
    larger = dataclasses.replace(SMALLER, bytes=4400).with_latency(noisy)
    size, speed, *_ = verdict(plan, results(healed=larger))
    assert (size.value, size.tone) == ("10% larger", "bad")
    assert (speed.value, speed.tone) == ("same speed", "neutral")
    untimed = dataclasses.replace(STAGE, latency=None, latency_ms=None)
    assert [each.label for each in verdict(plan, results(before=untimed))] == ["Size", "Accuracy", "What was done"]
    assert [in_bytes(count) for count in (12, 45_439_980, 1_234_567_890)] == ["12 bytes", "45.4 MB", "1.23 GB"]


def test_a_plan_in_brief():
    edits = (Linearize(1), Drop("attention", 2), Drop("layer", 3), Fuse("layer", (4, 5)))
    assert in_brief(Plan("gpt2", 6, edits)) == [
        "6 to 4 layers",
        "1 MLP made linear",
        "2 blocks dropped",
        "1 group of layers fused",
    ]
    assert in_brief(Plan("gpt2", 6, (Fuse("mlp", (0, 3), "share"),))) == ["1 group of MLPs shares its weights"]
    merged = (MergeConvs(-1, 0, (0,)), MergeConvs(0, 2, (2,)), MergeConvs(2, 3, ()))
    expected = ["6 to 4 convolutions", "1 run of convolutions merged", "1 convolution removed"]
    assert in_brief(Plan("resnet", 6, merged, kinds=CONV_GRAPH_KINDS)) == expected
    assert in_brief(Plan("gpt2", 6, ())) == ["nothing changed"]


def test_the_result_in_short():
    """The sentence has the size, the speed at the largest batch, and the quality with its interval if there is one."""
    short = "75% of the parameters, 1.50 times as fast at batch 8, accuracy 0.875 ({}before: 0.9)"
    assert in_short(results()) == short.format("")
    metrics = {"accuracy": 0.875, "accuracy_interval": [0.85, 0.9]}
    healed = dataclasses.replace(SMALLER, metrics=metrics)
    assert in_short(results(healed=healed)) == short.format("95% interval 0.85 to 0.9; ")


@pytest.mark.parametrize(
    ("plan", "changes", "line"),
    [
        (Plan("bert", 12, (Fuse("layer", (2, 3)),)), {}, 'from_pretrained("a b")'),
        (PLAN, {}, 'from_pretrained("a b"), after import hf_layerfuse'),
        (PLAN, {"with_code": True}, 'from_pretrained("a b", trust_remote_code=True)'),
    ],
)
def test_the_last_lines_name_the_next_commands(plan, changes, line):
    """The terminal says how to load the result, by its kind, and how to write its report."""
    short, where, load, report = closing(recipe(output_dir="a b", **changes), plan, results()).splitlines()
    assert short == f"In short: {in_short(results())}."
    assert where == "Written:  a b"
    assert load == f"Load it:  AutoModelForSequenceClassification.{line}"
    assert report == "Report:   hf-layerfuse report 'a b'"


def test_a_healed_model_names_its_fair_comparison():
    """Where the original was not retrained, a reader learns that a healed model has had more training."""
    plan, fair = Plan("bert", 12, (Drop("layer", 3),)), "an original after the same training"

    def said(given):
        return any(fair in limit for limit in limitations_of(plan, given))

    assert said(results())
    assert not said(results(retrained=RetrainedOriginal(STAGE, REPORT)))
    assert not said(RESULTS), "nothing was trained"
    kept = dataclasses.replace(REPORT, best_step=0)
    assert not said(results(rounds=healed_by(kept)))
