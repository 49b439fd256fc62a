"""Results of a run are the same in memory and in `results.json`, and those of release 0.1.0 still load."""

import json
from dataclasses import replace

import pytest
from helpers import ROOT
from runs import REPORT, RESULTS, SMALLER, STAGE, healed_by, results

from hf_layerfuse import CheckpointError
from hf_layerfuse.pipeline.results import FORMAT_VERSION, Goal, HealRound, Latency, RetrainedOriginal, RunResults

RUNS = sorted((ROOT / "tests" / "corpus" / "0.1.0" / "runs").glob("*/results.json"))
LATENCY = Latency(
    median_ms=5.0,
    spread_ms=0.5,
    repeats=2,
    warmup=3,
    threads=1,
    device="cpu",
    dtype="float32",
    input_shape=[1, 16],
    speedup=1.0,
)
BENT = replace(REPORT, homotopy=[(0, {"a": 1.0})])
ROUNDS = HealRound(Goal(keep_layers=3), REPORT), HealRound(Goal(ratio=0.5), BENT)


@pytest.mark.parametrize(
    "made",
    [
        RESULTS,
        results(),
        results(rounds=ROUNDS, recipe={"model": "m", "seed": 0}),
        results(retrained=RetrainedOriginal(STAGE, BENT)),
        results(before=replace(STAGE, latency={1: LATENCY}), healed=replace(SMALLER, latency_ms=None)),
    ],
    ids=["not healed", "healed", "rounds", "retrained original", "latencies"],
)
def test_results_are_read_as_they_were_written(made):
    """Every field survives JSON, with its types."""
    assert RunResults.from_dict(json.loads(json.dumps(made.to_dict()))) == made


def test_keys_are_those_of_0_1():
    """Tools that read `results.json` find each key in its place; only the format version is new."""
    assert list(RESULTS.to_dict()) == [
        *("format_version", "before", "fused", "metrics_on", "recipe", "command", "environment")
    ]
    assert results().to_dict()["heal"]["steps"] == 2
    assert "rounds" not in results().to_dict()
    tree = results(rounds=ROUNDS).to_dict()
    assert [row.get("keep_layers") for row in tree["rounds"]] == [3, None]
    assert tree["heal"] == tree["rounds"][-1]
    assert tree["before"]["latency_ms"] == {"1": 5.0, "8": 30.0}


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.parent.name)
def test_results_of_0_1_are_written_as_they_were_read(path):
    """Rewriting a file of release 0.1.0 keeps each key and value, except the keys of other tools."""
    tree = json.loads(path.read_text(encoding="utf-8"))
    assert "format_version" not in tree
    written = json.loads(json.dumps(RunResults.from_dict(tree).to_dict()))
    assert written == {"format_version": FORMAT_VERSION, **tree}


def test_there_are_results_of_0_1():
    """The test above cannot pass only because its files were moved."""
    assert len(RUNS) == 4


def test_a_newer_format_is_refused(tmp_path):
    """The message names both versions and the upgrade, and does not call the file damaged."""
    tree = {**results().to_dict(), "format_version": FORMAT_VERSION + 1, "before": "in another form"}
    (tmp_path / "results.json").write_text(json.dumps(tree))
    with pytest.raises(CheckpointError, match="pip install -U hf-layerfuse") as caught:
        RunResults.load(tmp_path)
    assert f"format version {FORMAT_VERSION + 1}" in str(caught.value)
    assert f"up to {FORMAT_VERSION}" in str(caught.value)
    assert "not the result of a run" not in str(caught.value)


def test_unknown_keys_are_ignored():
    """Other tools may add keys, as the benchmarks do, at the top and inside a measurement."""
    tree = {**results().to_dict(), "original_healed": {}}
    tree["before"] = {**tree["before"], "energy": 3}
    assert RunResults.from_dict(tree) == results()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"before": None}, "not the result of a run"),
        ({"before": {}}, "'latency_ms' is missing"),
        ({"heal": {"train_loss": 5}}, "'steps' is missing"),
        ({"recipe": 5}, "not the result of a run"),
        ({"format_version": 0}, "format_version=0 is not a known version"),
        ({"format_version": "1"}, "format_version='1' is not a known version"),
    ],
)
def test_damaged_results_are_refused(tmp_path, changes, said):
    """The message names the folder and the problem."""
    (tmp_path / "results.json").write_text(json.dumps({**results().to_dict(), **changes}))
    with pytest.raises(CheckpointError, match="Name a folder that") as caught:
        RunResults.load(tmp_path)
    assert said in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_stages_and_reports():
    """The last measurement is that of the written model; the last report is that of the last round."""
    assert list(RESULTS.stages) == ["before", "fused"]
    assert RESULTS.last is RESULTS.fused
    assert RESULTS.heal is None
    healed = results(rounds=healed_by(REPORT, replace(REPORT, steps=7)))
    assert list(healed.stages) == ["before", "fused", "healed"]
    assert healed.last is healed.healed
    assert healed.heal.steps == 7
