"""Fusing a checkpoint layer by layer gives what fusing the loaded model gives, and resumes at any layer."""

import hashlib
import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from families import family_batches, family_inputs, family_model
from helpers import slow_except

from hf_layerfuse import (
    AutoFusedModel,
    CheckpointError,
    DataError,
    FusionReport,
    LayerFuseWarning,
    RecipeError,
    UnsupportedModelError,
    fuse,
    fuse_checkpoint,
)
from hf_layerfuse.calibration.teacher_states import TeacherStates
from hf_layerfuse.evaluation.divergence import prediction
from hf_layerfuse.methods.fusion import layer_by_layer
from hf_layerfuse.pipeline import fuse_checkpoint as module

LOW = {"keep_layers": 4, "effort": "low"}


def saved(path: Path, name="llama", dtype=torch.float32):
    """A checkpoint and calibration batches for it."""
    model = family_model(name).to(dtype)
    model.save_pretrained(path)
    return model, family_batches(name, model)


def digests(path: Path) -> dict[str, str]:
    """Digest of each file but the report, which holds times."""
    files = [file for file in path.iterdir() if file.name != "fusion_report.json"]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.parametrize("refit", slow_except(("linear",), ("full", "linear", "none")))
@pytest.mark.parametrize(
    "name", slow_except(("llama",), ("llama", "gpt2", "bert", "gemma3_text", "gpt_neox", "vit", "t5"))
)
def test_equals_fuse(name, refit, tmp_path):
    """Groups, losses and outputs are those of `fuse`, whether weights stay in memory or not."""
    model, batches = saved(tmp_path / "model", name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LayerFuseWarning)  # random models without a repair are useless
        expected = fuse(model, **LOW, refit=refit, batches=batches, check=False)
    report = fuse_checkpoint(tmp_path / "model", tmp_path / "out", **LOW, refit=refit, batches=batches, memory=0)
    theirs = expected.fusion_report
    assert report.plan.edits == theirs.plan.edits
    assert report.parameters == theirs.parameters
    ours, other = report.plan.notes.refit, theirs.plan.notes.refit
    assert ours.kept == other.kept
    assert (ours.before, ours.after) == pytest.approx((other.before, other.after), rel=1e-3)
    maps = [[(row["layer"], row["kind"], row["map"]) for row in each.blocks] for each in (ours, other)]
    assert maps[0] == maps[1]
    found = AutoFusedModel.from_pretrained(tmp_path / "out")
    assert type(found) is type(expected)
    inputs = family_inputs(name, model)
    with torch.inference_mode():
        ours, other = prediction(found.eval()(**inputs)), prediction(expected.eval()(**inputs))
    torch.testing.assert_close(ours, other, rtol=1e-2, atol=1e-2 * other.abs().max().item())
    assert found.fusion_report.to_dict() == report.to_dict()


def test_half_precision_stays(tmp_path):
    """A bfloat16 checkpoint gives a bfloat16 one, and its size is that of its files."""
    model, batches = saved(tmp_path / "model", dtype=torch.bfloat16)
    model.generation_config.temperature = 0.7
    (tmp_path / "model" / "generation_config.json").write_text('{"temperature": 0.7}')  # not valid, and common
    report = fuse_checkpoint(tmp_path / "model", tmp_path / "out", **LOW, batches=batches)
    found = AutoFusedModel.from_pretrained(tmp_path / "out")
    assert found.dtype == torch.bfloat16
    assert found.config.num_hidden_layers == 4
    assert found.generation_config.temperature == 0.7
    assert report.parameters == (model.num_parameters(), found.num_parameters())
    assert report.bytes[1] == sum(p.nbytes for p in found.parameters())
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert {*index["weight_map"].values()} == {file.name for file in (tmp_path / "out").glob("*.safetensors")}


@pytest.mark.parametrize("layer", slow_except((2,), (0, 2, 3)))
def test_resumes_at_any_layer(layer, tmp_path, monkeypatch):
    """An interrupted call leaves no output. The next one makes only the layers that are missing, and ends with the
    files of an undisturbed call, to the bit."""
    _, batches = saved(tmp_path / "model", dtype=torch.bfloat16)
    fuse_checkpoint(tmp_path / "model", tmp_path / "whole", **LOW, batches=batches)
    write, made = module._Layers.write, []

    def interrupted(self, index, finished):
        if index == layer and index not in made:
            raise KeyboardInterrupt
        made.append(index)
        write(self, index, finished)

    monkeypatch.setattr(module._Layers, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fuse_checkpoint(tmp_path / "model", tmp_path / "out", **LOW, batches=batches)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(module._Layers, "write", lambda self, *layer: (made.append(layer[0]), write(self, *layer)))
    fuse_checkpoint(tmp_path / "model", tmp_path / "out", **LOW, batches=batches)
    assert made == [0, 1, 2, 3]
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "whole"]


@pytest.mark.slow
def test_an_interrupted_undo_resumes(tmp_path, monkeypatch):
    """A call that stops while it writes layers without their repair ends as an undisturbed one, to the bit."""
    _, batches = saved(tmp_path / "model")
    recipe = {**LOW, "operator": "freeze", "batches": batches}
    monkeypatch.setattr(module, "_verified", lambda *_: None)
    loss = TeacherStates.loss
    monkeypatch.setattr(TeacherStates, "loss", lambda self, student: next(left, None) or loss(self, student))
    left = iter([1.0, 2.0, 2.0])
    fuse_checkpoint(tmp_path / "model", tmp_path / "whole", **recipe)
    undo = module._Layers.undo

    def interrupted(self, index, layer):
        if index == 2:
            raise KeyboardInterrupt
        undo(self, index, layer)

    monkeypatch.setattr(module._Layers, "undo", interrupted)
    left = iter([1.0, 2.0, 2.0])
    with pytest.raises(KeyboardInterrupt):
        fuse_checkpoint(tmp_path / "model", tmp_path / "out", **recipe)
    monkeypatch.setattr(module._Layers, "undo", undo)
    seen = []
    monkeypatch.setattr(module._Layers, "write", lambda self, index, made: seen.append(index))
    left = iter([1.0, 2.0, 2.0])
    fuse_checkpoint(tmp_path / "model", tmp_path / "out", **recipe)
    assert not seen, "a repaired layer was lost"
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


@pytest.mark.slow
def test_other_data_do_not_resume(tmp_path, monkeypatch):
    """Work that another recipe or other calibration data left is not used."""
    _, batches = saved(tmp_path / "model")
    monkeypatch.setattr(module, "_save_weights", lambda *_: (_ for _ in ()).throw(OSError("No space left on device")))
    with pytest.raises(OSError, match="No space"):
        fuse_checkpoint(tmp_path / "model", tmp_path / "out", **LOW, batches=batches)
    with pytest.raises(OSError, match="No space"):
        fuse_checkpoint(tmp_path / "model", tmp_path / "out", **LOW, batches=batches[1:])
    assert not (tmp_path / "out").exists()
    assert len([path for path in tmp_path.iterdir() if path.name.endswith(".unfinished")]) == 2


@pytest.mark.parametrize("best", slow_except((1,), (0, 1, 2)))
def test_a_repair_that_makes_it_worse_is_undone(best, tmp_path, monkeypatch):
    """No repair, the repair up to the last edit, and that of all layers compete: the lowest loss wins."""
    model, batches = saved(tmp_path / "model")
    recipe = {**LOW, "keep_layers": 5, "operator": "freeze", "batches": batches}
    monkeypatch.setattr(module, "_verified", lambda *_: None)
    cost = np.ones((7, 7))
    cost[2, 4] = cost[range(6), range(1, 7)] = 0  # layers 2 and 3 become one
    monkeypatch.setattr(layer_by_layer, "unexplained", lambda *_, **__: cost)
    monkeypatch.setattr(TeacherStates, "loss", lambda self, student: next(left))
    left = iter([2.0, 2.0, 1.0])
    fuse_checkpoint(tmp_path / "model", tmp_path / "whole", **recipe)
    repaired = AutoFusedModel.from_pretrained(tmp_path / "whole").model.layers

    left = iter(([1.0, 2.0, math.nan], [2.0, 1.0, 3.0], [3.0, 2.0, 1.0])[best])
    report = fuse_checkpoint(tmp_path / "model", tmp_path / "out", **recipe)
    found = AutoFusedModel.from_pretrained(tmp_path / "out").model.layers
    slots = report.plan.layout().slots
    assert [len(slot.layers) for slot in slots] == [1, 1, 2, 1, 1]
    end = (0, 3, 5)[best]
    assert report.plan.notes.refit.kept == (best > 0)
    for index, slot in enumerate(slots):
        expected = repaired[index] if index < end else model.model.layers[slot.whole.kept]
        for ours, theirs in zip(found[index].parameters(), expected.parameters(), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"effort": "medium"}, "effort='medium' needs the whole model"),
        ({"mode": "share"}, "mode='share' needs the whole model"),
        ({"blocks": "mlp"}, "blocks='mlp' needs the whole model"),
        ({"operator": "mean"}, "operator='mean' needs the whole model"),
        ({"keep_layers": None, "latency_budget": 0.5}, "latency target needs the whole model"),
        ({"keep_layers": 6}, "fuses nothing"),
    ],
)
def test_settings_that_need_the_whole_model_are_refused(settings, match, tmp_path):
    """Each such setting is named before any work."""
    _, batches = saved(tmp_path / "model")
    with pytest.raises(RecipeError, match=match):
        fuse_checkpoint(tmp_path / "model", tmp_path / "out", **{**LOW, **settings}, batches=batches)
    assert not (tmp_path / "out").exists()


def test_bad_input_is_refused(tmp_path):
    """Missing data, tokens that the model does not know, an output that exists, and a missing checkpoint are named."""
    model, batches = saved(tmp_path / "model")
    with pytest.raises(RecipeError, match="calibration data"):
        fuse_checkpoint(tmp_path / "model", tmp_path / "out", **LOW, batches=[])
    with pytest.raises(DataError, match="token"):
        fuse_checkpoint(tmp_path / "model", tmp_path / "out", **LOW, batches=[{"input_ids": torch.full((2, 8), 9999)}])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    with pytest.raises(CheckpointError, match="not empty"):
        fuse_checkpoint(tmp_path / "model", tmp_path / "full", **LOW, batches=batches)
    with pytest.raises(CheckpointError, match="no directory"):
        fuse_checkpoint(tmp_path / "nothing", tmp_path / "out", **LOW, batches=batches)
    with pytest.raises(CheckpointError, match="in memory already"):
        fuse_checkpoint(model, tmp_path / "out", **LOW, batches=batches)
    fuse(model, keep_layers=3, mode="share").save_pretrained(tmp_path / "fused")
    with pytest.raises(UnsupportedModelError, match="already fused"):
        fuse_checkpoint(tmp_path / "fused", tmp_path / "out", **LOW, batches=batches)


@pytest.mark.slow
def test_replaces_an_earlier_result(tmp_path):
    """With `overwrite`, an earlier result gives way to the new one."""
    _, batches = saved(tmp_path / "model")
    for keep in (4, 3):
        report = fuse_checkpoint(
            tmp_path / "model", tmp_path / "out", **{**LOW, "keep_layers": keep}, batches=batches, overwrite=True
        )
    assert FusionReport.load(tmp_path / "out").plan == report.plan
    assert AutoFusedModel.from_pretrained(tmp_path / "out").config.num_hidden_layers == 3
