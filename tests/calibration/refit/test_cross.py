"""Cross-attention blocks: their aims, their repair, and the states that they need."""

import pytest
import torch
from families import LAYERS, family_batches, family_model, family_table
from helpers import slow_except

from hf_layerfuse import Drop, Fuse, Plan, UnsupportedModelError, apply, fuse, refit
from hf_layerfuse.calibration.layer_hooks import HookPoint
from hf_layerfuse.calibration.layerwise import LayerwiseForward
from hf_layerfuse.calibration.refit.transformer import _target
from hf_layerfuse.calibration.samples import Sample
from hf_layerfuse.plan import DECODER

CASES = ("gpt2, cross-attention", "bert, cross-attention", "mbart, decoder")


@pytest.mark.parametrize(
    ("edits", "aims"),
    [
        ((Fuse("layer", (0, 1), keep=0),), [(0, "attention"), (0, "cross"), (1, "mlp")]),
        ((Fuse("cross", (0, 1), keep=1), Drop("mlp", 1)), [(0, "attention"), (0, "cross"), (0, "mlp")]),
        ((Drop("cross", 0),), [(0, "cross"), None, (0, "mlp")]),
        ((Drop("mlp", 0), Drop("layer", 1)), [(0, "attention"), (1, "mlp"), None]),
        ((Drop("mlp", 0), Drop("cross", 0)), [(0, "mlp"), None, None]),
    ],
)
def test_a_block_aims_at_the_stream_in_front_of_the_next_one(edits, aims):
    """Blocks without a next one in their layer aim at the end of the layers that they stand for."""
    slot = Plan("t5", 4, edits, kinds=DECODER, stack="decoder").layout().slots[0]
    for kind, aim in zip(DECODER, aims, strict=True):
        if aim is not None:
            assert _target(slot, kind) == (aim[0], HookPoint(aim[1], "sum"))


@pytest.mark.parametrize("name", slow_except(CASES[1:], CASES))
def test_sums_are_what_the_next_block_reads(name):
    """The stream behind attention is that in front of cross-attention, and the one behind that is in front of the
    MLP; with norms behind the sums, up to the norm."""
    model = family_model(name)
    table = family_table(name, model)
    layerwise = LayerwiseForward(model, Sample.of(family_batches(name, model, 1)), table)
    places = [HookPoint(kind, place) for kind in DECODER for place in ("sum", "residual")]
    ((_, seen),) = layerwise.look(*places)
    for before, after in (("attention", "cross"), ("cross", "mlp")):
        reached = seen[HookPoint(before, "sum")]
        if table.post_norm:
            with torch.no_grad():
                reached = layerwise.layers[0].get_submodule(table.table(before)["norm"])(reached)
        torch.testing.assert_close(reached, seen[HookPoint(after, "residual")])


@pytest.mark.parametrize("name", slow_except(CASES[2:], CASES))
def test_a_damaged_block_is_repaired(name):
    """The refit undoes a change of the queries and the outputs of a cross-attention block, and leaves its keys and
    values as they are, because these do not read the stream."""
    model = family_model(name)
    table, batches = family_table(name, model), family_batches(name, model)
    plan = table.plan(LAYERS, (Drop("attention", LAYERS - 1),))
    student = apply(model, plan)
    layer = table.layer_list(student)[LAYERS - 1]
    parts = {role: layer.get_submodule(path) for role, path in table.cross.items()}
    parts["out"].weight.data *= 0.2
    kept = {role: parts[role].weight.clone() for role in ("k", "v", "kv") if role in parts}
    broken = parts["out"].weight.clone()
    report = refit(student, model, plan, batches)
    assert report.kept
    assert report.after < 0.9 * report.before
    assert {"read", "out"} <= {row["map"] for row in report.blocks if row["kind"] == "cross"}
    assert all(torch.equal(parts[role].weight, weight) for role, weight in kept.items())
    assert parts["out"].weight.norm() > 2 * broken.norm()


def test_batches_without_the_states_of_an_encoder_are_refused():
    """Cross-attention that does not run on the batches cannot be compared or repaired."""
    model = family_model(CASES[0])
    batches = [{"input_ids": torch.randint(60, (4, 12))}]
    with pytest.raises(UnsupportedModelError, match="the cross-attention does not run on the calibration batches"):
        fuse(model, keep_layers=3, batches=batches, effort="low")
