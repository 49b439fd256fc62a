"""Tables and sentences about a run: every kind of edit has a description, and every metric a name."""

import dataclasses
from typing import get_args

import pytest
from runs import PLAN, REPORT, SMALLER, healed_by, recipe, results

from hf_layerfuse import Blend, Drop, Fuse, Linearize, MergeConvs, Plan
from hf_layerfuse.pipeline.report.closing import closing
from hf_layerfuse.pipeline.report.tables import in_short, rows
from hf_layerfuse.plan import CONV_GRAPH_KINDS
from hf_layerfuse.plan.edit import Kind, Mode
from hf_layerfuse.plan.words import describe


@pytest.mark.parametrize("kind", get_args(Kind))
@pytest.mark.parametrize("mode", get_args(Mode))
def test_every_edit_has_words(kind, mode):
    """A description names the layers, their change, and the rank if there is one."""
    kinds = ("conv",) if kind == "conv" else ("attention", "mlp")
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
