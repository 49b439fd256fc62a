"""A fused block consists of the heads and hidden units of its group with the lowest loss."""

import itertools
import math

import pytest
import torch
from helpers import LAYOUTS, tiny_model

from hf_layerfuse import Fuse, Plan, apply
from hf_layerfuse.calibration.layer_hooks import HookPoint
from hf_layerfuse.calibration.layerwise import LayerwiseForward
from hf_layerfuse.calibration.refit.refit import refit
from hf_layerfuse.calibration.refit.selection import Selection, alike
from hf_layerfuse.calibration.samples import Sample
from hf_layerfuse.calibration.teacher_states import TeacherStates
from hf_layerfuse.evaluation.dummy_inputs import dummy_inputs
from hf_layerfuse.models.architectures import architecture_for, linear_maps
from hf_layerfuse.models.architectures.block_weights import rows_of, write_rows
from hf_layerfuse.plan import Source

LAYERS = 4
PRE_NORM = [kind for kind in LAYOUTS if kind not in ("bert", "roberta", "distilbert")]
BODIES = {"gpt2": "GPT2Model", "vit": "ViTModel", "deit": "DeiTModel"}

every_model = pytest.mark.parametrize("model_type", LAYOUTS)
every_kind = pytest.mark.parametrize("kind", ["attention", "mlp"])


def body(model_type, **changes):
    return tiny_model(model_type, BODIES.get(model_type), 0, num_hidden_layers=LAYERS, **changes)


def batches_of(model, count=40):
    return [dummy_inputs(model, 8, 12, seed=seed) for seed in range(count // 8)]


def block_of(model, layer, kind):
    return next(b for b in architecture_for(model).blocks(model) if (b.layer, b.kind) == (layer, kind))


def at(model, layer, kind, *depths):
    """A selection for a block of a model that is its own original, and the target of that block in the stream."""
    sample = Sample.of(batches_of(model))
    teacher_states, layerwise = TeacherStates(LayerwiseForward(model, sample)), LayerwiseForward(model, sample)
    while layerwise.depth < layer:
        layerwise.advance()
    seen = teacher_states.see(
        [(depth, HookPoint(kind, place)) for depth in (layer, *depths) for place in ("read", "sum")]
    )
    originals = {depth: seen[depth, HookPoint(kind, "read")] for depth in depths}
    return Selection(layerwise, block_of(model, layer, kind), teacher_states.layers, originals), seen[
        layer, HookPoint(kind, "sum")
    ]


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@every_kind
@every_model
def test_rows_are_the_maps(model_type, kind):
    """Reading a block by heads and writing it back changes nothing, for any orientation, parts and biases."""
    model = body(model_type)
    block, before = block_of(model, 1, kind), state_of(model)
    rows = rows_of(model, block)
    assert rows.keys() == linear_maps(model, block).keys()
    for values in rows.values():
        values += 1
    with torch.no_grad():
        write_rows(model, block, rows)
        assert any(not torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
        write_rows(model, block, {role: values - 1 for role, values in rows.items()})
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=1e-6)


@every_kind
@every_model
def test_a_block_is_made_of_itself(model_type, kind):
    """From its own layer alone, all units are taken in their order, and the outputs stay the same."""
    model = body(model_type)
    before = state_of(model)
    selection, target = at(model, 1, kind, 1)
    assert selection.missed(target) < 1e-10
    selection.choose(target)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@every_kind
@every_model
def test_units_are_taken_from_the_layer_that_has_them(model_type, kind):
    """If all units of one layer are dead, the units of the other are taken in their order."""
    model = body(model_type)
    dead = model.get_submodule(block_of(model, 2, kind).modules["out"])
    for parameter in dead.parameters():
        parameter.data.zero_()
    selection, target = at(model, 1, kind, 2, 1)  # the dead ones in front
    found = block_of(model, 1, kind)
    rows = rows_of(model, found)
    for parameter in model.get_submodule(found.modules["out"]).parameters():
        parameter.data.zero_()
    selection.choose(target)
    chosen = rows_of(model, found)
    for role, values in rows.items():
        torch.testing.assert_close(chosen[role], values, rtol=0, atol=1e-5)


@pytest.mark.parametrize("model_type", PRE_NORM)
def test_heads_of_a_later_layer_are_used(model_type):
    """If two layers have MLPs that add nothing, and the attention of the first adds nothing, the attention of the
    second replaces it exactly. Norms inside the heads prevent mixing heads of different layers."""
    model = body(model_type)
    for layer, kinds in ((1, ("attention", "mlp")), (2, ("mlp",))):
        for kind in kinds:
            for parameter in model.get_submodule(block_of(model, layer, kind).modules["out"]).parameters():
                parameter.data.zero_()
    plan = Plan(model.config.model_type, LAYERS, (Fuse("layer", (1, 2), operator="select", keep=1),))
    report = refit(apply(model, plan), model, plan, batches_of(model))
    assert report.before > 1e-4
    if model_type == "qwen3":
        assert report.after < report.before
    else:
        assert report.after < 1e-3 * report.before


@pytest.mark.parametrize("model_type", ["gpt2", "bert", "vit", "llama", "qwen3"])
def test_many_layers(model_type, monkeypatch):
    """In a group of many layers, units that add little are left out beforehand, and the repair is as good."""
    model, found = body(model_type), []
    original = Selection._able

    def able(self, *args):
        found.append((self.block.kind, len(self.variants), len(original(self, *args))))
        return original(self, *args)

    monkeypatch.setattr(Selection, "_able", able)
    plan = Plan(model.config.model_type, LAYERS, (Fuse("layer", tuple(range(LAYERS)), operator="select", keep=0),))
    report = refit(apply(model, plan), model, plan, batches_of(model))
    assert report.kept
    assert report.after < report.before
    width = model.config.intermediate_size if hasattr(model.config, "intermediate_size") else 4 * model.config.n_embd
    assert ("mlp", LAYERS, 2 * width) in found


@pytest.mark.parametrize("model_type", ["gpt2", "bert", "llama"])
def test_attention_is_led_to_where_the_mlps_can_make_more_of_it(model_type, monkeypatch):
    """Heads come from the whole group or from the kept layer, whichever leaves the smaller error to the MLPs."""
    model = body(model_type)
    edit = Fuse("layer", (1, 2), operator="select", keep=1)
    plan = Plan(model.config.model_type, LAYERS, (edit,))
    frozen = Plan(model.config.model_type, LAYERS, (Fuse("layer", (1, 2), keep=1),))

    def attention(plan):
        student = apply(model, plan)
        report = refit(student, model, plan, batches_of(model))
        assert report.kept
        return student.get_submodule(block_of(student, 1, "attention").modules["out"]).weight.clone()

    def answers(*values):
        told = itertools.cycle(values)
        monkeypatch.setattr(Selection, "missed", lambda *args: next(told))

    answers(2.0, 1.0)  # with heads of the kept layer, of the whole group
    whole = attention(plan)
    answers(1.0, 2.0)
    assert torch.equal(attention(plan), attention(frozen))
    assert not torch.equal(attention(plan), whole)


def test_heads_that_can_stand_side_by_side():
    """Heads can be mixed if their layers see the same tokens, and never if a norm spans all heads of a layer."""
    types = ["full_attention", "sliding_attention", "full_attention", "full_attention"]
    model = body("qwen2", layer_types=types, use_sliding_window=True, sliding_window=6)
    assert alike(model, architecture_for(model), Source((0, 1, 2), "select", 0), "attention") == [0, 2]
    assert alike(model, architecture_for(model), Source((0, 1, 2), "select", 1), "attention") == [1]
    assert alike(body("gpt2"), architecture_for(body("gpt2")), Source((0, 1, 2), "select", 1), "attention") == [0, 1, 2]
    assert alike(body("qwen3"), architecture_for(body("qwen3")), Source((0, 1, 2), "select", 1), "attention") == [1]


@pytest.mark.parametrize("tokens", [1, 90, math.inf])
def test_few_tokens_are_evenly_spread(tokens):
    """The batches that hold the requested number of tokens are spread over all data."""
    model = body("gpt2")
    layerwise = LayerwiseForward(model, Sample.of([dummy_inputs(model, 1, 12, seed=seed) for seed in range(32)]))
    found = [index for index, _ in layerwise.look(HookPoint("mlp", "read"), tokens=tokens)]
    held = sum(len(layerwise.rows(index, layerwise.states[index])) for index in range(32))
    assert len(found) == max(1, math.ceil(32 * min(1.0, tokens / held)))
    assert max(later - one for one, later in itertools.pairwise([*found, 32])) <= math.ceil(32 / len(found))


def test_the_report_says_which_heads():
    """A row compares the remaining error of the group's MLPs with the heads of the kept layer and with the chosen
    heads."""
    model = body("gpt2")
    plan = Plan("gpt2", LAYERS, (Fuse("layer", (1, 2), operator="select", keep=1),))
    report = refit(apply(model, plan), model, plan, batches_of(model))
    row = next(row for row in report.blocks if row["map"] == "heads")
    assert (row["layer"], row["kind"]) == (1, "attention")
    assert 0 < row["after"] <= row["before"]
