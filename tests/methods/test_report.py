"""Every result has a report, which survives saving and loading."""

import copy
import json
from pathlib import Path

import pytest
from helpers import network, some_batches, tiny_model
from transformers import AutoModelForCausalLM

from hf_layerfuse import AutoFusedModel, CheckpointError, FusionReport, collapse, fuse, linearize_mlps, merge

MAKERS = {
    "depth": lambda model: fuse(model, keep_layers=4, effort="low", batches=some_batches(model)),
    "weights alone": lambda model: fuse(model, keep_layers=4),
    "share": lambda model: fuse(model, keep_layers=4, mode="share", effort="low", batches=some_batches(model)),
    "collapse": lambda model: collapse(model, count=2, batches=some_batches(model)),
}


@pytest.mark.parametrize("name", MAKERS)
def test_report_of_a_result(tmp_path: Path, name: str) -> None:
    """It has the plan and both sizes, prints at most ten lines, and comes back with the checkpoint, fused or stock."""
    model = tiny_model("gpt2", "GPT2LMHeadModel")
    small = MAKERS[name](model)
    report = small.fusion_report
    assert report.parameters == (model.num_parameters(), small.num_parameters())
    assert report.bytes == tuple(4 * count for count in report.parameters)
    assert report.plan.edits
    assert (report.plan.notes.refit is None) == (name == "weights alone")
    shown = str(report).splitlines()
    assert len(shown) <= 10
    assert any(f"{small.num_parameters():,}" in line for line in shown)
    small.save_pretrained(tmp_path)
    assert not hasattr(AutoFusedModel.from_pretrained(tmp_path), "fusion_report")
    assert report.save(tmp_path) == tmp_path / "fusion_report.json"
    again = AutoFusedModel.from_pretrained(tmp_path).fusion_report
    assert again == report
    assert again.plan.notes == report.plan.notes
    assert FusionReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    assert copy.deepcopy(small).fusion_report == report
    if name == "depth":
        assert AutoModelForCausalLM.from_pretrained(tmp_path).num_parameters() == small.num_parameters()


@pytest.mark.usefixtures("steady")
def test_report_of_merged_convolutions() -> None:
    model = network("cifar")
    report = merge(model, latency_budget=0.7, batches=some_batches(model)).fusion_report
    assert report.method == "merge"
    assert "convolutions" in str(report)


def test_report_after_the_last_step() -> None:
    """A model that `linearize_mlps` finishes has the report of the trained model, with its own plan and size."""
    model = tiny_model("gpt2", "GPT2LMHeadModel")
    trained = collapse(model, count=2, method="homotopy", batches=some_batches(model))
    for module in trained.modules():
        if hasattr(module, "a"):
            module.a.data.fill_(1.0)
    small, plan = linearize_mlps(trained)
    report = small.fusion_report
    assert report.plan == plan
    assert report.parameters == (model.num_parameters(), small.num_parameters())
    assert trained.fusion_report.parameters[1] > report.parameters[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "is not JSON"), ("[]", "not a readable report"), ('{"format_version": 9}', "format version 9")],
)
def test_damaged_reports_are_refused(tmp_path: Path, content: str, message: str) -> None:
    tiny_model("gpt2").save_pretrained(tmp_path)
    (tmp_path / "fusion_report.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        AutoFusedModel.from_pretrained(tmp_path)
