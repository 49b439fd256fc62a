"""Closed-form repair: it is never worse, it is exact where an exact repair exists, and it changes only the student."""

import copy
import json
import math
from dataclasses import asdict

import pytest
import torch
from helpers import GATED, LAYOUTS, TINY, in_turn, tiny_model

from hf_layerfuse import AutoFusedModel, Drop, Fuse, Plan, apply, expand, verify
from hf_layerfuse.calibration.layer_hooks import HookPoint
from hf_layerfuse.calibration.layerwise import LayerwiseForward
from hf_layerfuse.calibration.refit import refit as refit_module
from hf_layerfuse.calibration.refit import transformer
from hf_layerfuse.calibration.refit.linear import store
from hf_layerfuse.calibration.refit.refit import refit
from hf_layerfuse.calibration.refit.transformer import selecting
from hf_layerfuse.calibration.samples import Sample
from hf_layerfuse.calibration.teacher_states import TeacherStates
from hf_layerfuse.errors import DataError
from hf_layerfuse.evaluation.divergence import calibration_loss, prediction
from hf_layerfuse.evaluation.dummy_inputs import dummy_inputs
from hf_layerfuse.math.ridge import fit
from hf_layerfuse.models.architectures import architecture_for
from hf_layerfuse.models.modules.shared_linear import theta_of
from hf_layerfuse.plan import TRANSFORMER

LAYERS = 4

PLANS = {
    "depth": (Fuse("layer", (1, 2), operator="mean"),),
    "first": (Fuse("layer", (0, 1), keep=0),),
    "last": (Fuse("layer", (1, 2, 3), keep=1),),
    "select": (Fuse("layer", (1, 2), operator="select", keep=1),),
    "drop": (Drop("layer", 0), Drop("layer", 2)),
    "blocks": (Drop("attention", 1), Drop("mlp", 2), Drop("mlp", 3)),
    "attention": (Fuse("attention", (0, 1, 2), keep=2),),
    "mlp": (Fuse("mlp", (0, 1, 2, 3), keep=2),),
    "share": (Fuse("layer", (0, 2), "share", "mean"),),
    "residual": (Fuse("layer", (1, 3), "share", "mean", rank=4),),
    "basis": (Fuse("layer", (0, 1, 2), "basis", rank=12),),
    "mixed": (Fuse("attention", (0, 3), "share"), Fuse("mlp", (1, 2)), Drop("attention", 1)),
}
SHARING = ("share", "residual", "basis", "mixed")
HEADS = {
    "gpt2": ["GPT2LMHeadModel", "GPT2DoubleHeadsModel", "GPT2ForSequenceClassification"],
    "bert": [
        "BertForMaskedLM",
        "BertForSequenceClassification",
        "BertForTokenClassification",
        "BertForQuestionAnswering",
        "BertForMultipleChoice",
    ],
    "vit": ["ViTForImageClassification", "ViTForMaskedImageModeling"],
    "llama": ["LlamaForCausalLM"],
}
PRE_NORM = [kind for kind in LAYOUTS if kind not in ("bert", "roberta", "distilbert")]

MODES = ("depth", "drop", "share", "residual", "basis")
CASES = in_turn(PLANS, ["bert"], ()) + in_turn(MODES, (), [kind for kind in TINY if kind != "bert"])

pre_norm = pytest.mark.parametrize("model_type", PRE_NORM)


def small(model_type, head=None, seed=0, **changes):
    return tiny_model(model_type, head, seed, num_hidden_layers=LAYERS, **changes)


WHOLE = {"gpt2": "GPT2LMHeadModel", "vit": "ViTModel", "deit": "DeiTModel"}


def whole(model_type):
    """A model with an output of many dimensions, whose loss is reliable with few sequences."""
    return small(model_type, WHOLE.get(model_type))


def batches_of(model, *sizes, tokens=12, seed=0):
    """Calibration batches of these sizes, every third sequence of tokens padded on the right."""
    found = []
    for i, size in enumerate(sizes or (18, 8)):
        batch = dummy_inputs(model, size, tokens, seed=seed + i)
        if "input_ids" in batch:
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
            batch["attention_mask"][::3, ..., 9:] = 0
        found.append(batch)
    return found


def plan_for(model, *edits):
    return Plan(model.config.model_type, LAYERS, edits)


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def layers_of(model):
    return architecture_for(model).layer_list(model)


def outs_of(model, layer):
    """The output projections of a layer."""
    architecture = architecture_for(model)
    return [layers_of(model)[layer].get_submodule(getattr(architecture, kind)["out"]) for kind in ("attention", "mlp")]


def ties_of(model):
    """Groups of parameter names that share one tensor."""
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(parameter.data_ptr(), set()).add(name)
    return sorted(map(sorted, found.values()))


def loss(student, teacher, batches):
    return calibration_loss(student, teacher, Sample.of(batches).held_out_batches)


def refitted(teacher, plan, batches, method="full"):
    """A student, its report, and its weights and loss before the repair."""
    student = apply(teacher, plan)
    given, before, ties = state_of(student), loss(student, teacher, batches), ties_of(student)
    report = refit(student, teacher, plan, batches, method)
    assert ties_of(student) == ties
    return student, report, given, before


def check(student, teacher, batches, report, given, before):
    """Check the properties of every repair."""
    assert report.before == before
    assert report.after == pytest.approx(loss(student, teacher, batches), rel=1e-5)
    assert report.after <= before
    assert all(tensor.isfinite().all() for tensor in student.state_dict().values())
    assert report.kept or same(state_of(student), given)
    json.dumps(asdict(report))


@pytest.mark.parametrize(("model_type", "name"), CASES)
def test_never_worse_and_mostly_better(model_type, name):
    """For every architecture and plan, the loss falls to a fraction and equals the one in the report. The teacher keeps
    every bit, and the student keeps its ties."""
    teacher = whole(model_type)
    batches = batches_of(teacher)
    plan = plan_for(teacher, *PLANS[name])
    original = state_of(teacher)
    student, report, given, before = refitted(teacher, plan, batches)
    check(student, teacher, batches, report, given, before)
    assert same(state_of(teacher), original)
    # a third above the measured value; gated units with random weights are harder to repair
    assert report.after < (0.97 if teacher.config.model_type in GATED else 0.6) * before


@pytest.mark.parametrize(
    ("model_type", "name"), in_turn(["depth", "last", "drop", "blocks", "basis"], rest=["bert", "llama"])
)
def test_linear_is_never_worse(model_type, name):
    """`linear` fits one map per run of removed layers. It never raises the loss, and lowers it if layers were
    removed."""
    teacher = whole(model_type)
    batches = batches_of(teacher)
    plan = plan_for(teacher, *PLANS[name])
    student, report, given, before = refitted(teacher, plan, batches, "linear")
    check(student, teacher, batches, report, given, before)
    removes = [slot for slot in plan.layout().slots if len(slot.layers) > 1]
    assert [row["map"] for row in report.blocks] == ["linear"] * len(removes)
    assert (report.after < before) == bool(removes)


def test_none_changes_nothing():
    """Method `none` only measures the loss."""
    teacher = whole("gpt2")
    student, report, given, before = refitted(teacher, plan_for(teacher, *PLANS["depth"]), batches_of(teacher), "none")
    assert same(state_of(student), given)
    assert (report.before, report.after, report.kept, report.blocks) == (before, before, False, ())


@pytest.mark.parametrize("method", ["full", "linear"])
def test_nothing_to_repair(model_type, method):
    """A model without edits keeps every bit."""
    teacher = whole(model_type)
    student, report, given, _ = refitted(teacher, plan_for(teacher), batches_of(teacher, 8), method)
    assert same(state_of(student), given)
    assert report.kept
    assert report.before == report.after < 1e-12
    assert not report.blocks


def test_layers_in_front_of_the_first_edit_are_left_alone(model_type):
    """Layers before the first edit keep every bit, because their inputs are unchanged. All other layers are
    refitted."""
    teacher = whole(model_type)
    student, report, _, _ = refitted(teacher, plan_for(teacher, Fuse("layer", (2, 3), keep=2)), batches_of(teacher))
    for one, other in zip(layers_of(student)[:2], layers_of(teacher)[:2], strict=True):
        assert same(state_of(one), state_of(other))
    assert not same(state_of(layers_of(student)[2]), state_of(layers_of(teacher)[2]))
    assert {row["layer"] for row in report.blocks} == {2}


@pytest.mark.parametrize(("model_type", "rank"), [*((kind, 0) for kind in LAYOUTS), ("gpt2", 3), ("llama", 3)])
def test_shared_equal_layers_stay_exact(model_type, rank):
    """Sharing equal layers loses nothing, and refitting them changes no output."""
    teacher = whole(model_type)
    for layer in layers_of(teacher)[1:]:
        layer.load_state_dict(layers_of(teacher)[0].state_dict())
    batches = batches_of(teacher)
    plan = plan_for(teacher, Fuse("layer", (0, 2, 3), "share", "mean", rank=rank))
    student, _, _, _ = refitted(teacher, plan, batches)
    with torch.inference_mode():
        for batch in batches:
            kept = batch["attention_mask"].bool() if "attention_mask" in batch else ...
            found, expected = (prediction(model(**batch))[kept] for model in (student, teacher))
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def silence(model, *layers):
    """Make layers of a pre-norm model add nothing."""
    for layer in layers:
        for module in outs_of(model, layer):
            for parameter in module.parameters():
                parameter.data.zero_()


@pre_norm
@pytest.mark.parametrize("operator", ["freeze", "select"])
def test_removing_layers_that_add_nothing_stays_exact(model_type, operator):
    """A layer fused with layers that add nothing computes the same outputs."""
    teacher = whole(model_type)
    silence(teacher, 2, 3)
    plan = plan_for(teacher, Fuse("layer", (1, 2, 3), operator=operator, keep=1))
    _, report, _, _ = refitted(teacher, plan, batches_of(teacher))
    assert report.before < 1e-9
    assert report.after <= report.before


UNDO = {
    "out": ["gpt2", "bert", "llama"],
    "norm": LAYOUTS,
    "bias": ["gpt2", "bert", "vit"],
}


@pytest.mark.parametrize(("part", "model_type"), [(part, kind) for part, kinds in UNDO.items() for kind in kinds])
def test_what_can_be_undone_is_undone(model_type, part):
    """An exact repair is found if it exists: an output projection inverts an invertible map, readers absorb gains of
    the norm before them, a norm after shared weights restores its own gain, and biases beside shared weights remove an
    offset."""
    teacher = whole(model_type)
    architecture = architecture_for(teacher)
    layers = layers_of(teacher)
    for at in architecture.mlp.values():
        layers[3].get_submodule(at).load_state_dict(layers[1].get_submodule(at).state_dict())
    plan = plan_for(teacher, Fuse("mlp", (1, 3), "share"))
    student = apply(teacher, plan)
    batches = batches_of(teacher, 40, 24)
    assert loss(student, teacher, batches) < 1e-12

    layer, generator = layers_of(student)[1], torch.Generator().manual_seed(0)
    if part == "out":
        module = layer.get_submodule(architecture.attention["out"])
        theta = theta_of(module)
        turn = torch.eye(32) + 0.1 * torch.randn(32, 32, generator=generator)
        store(module, torch.cat([theta[:-1] @ turn.double(), theta[-1:]]))
    elif part == "norm":
        norm = layer.get_submodule((architecture.mlp if architecture.post_norm else architecture.attention)["norm"])
        norm.weight.data *= 0.5 + torch.rand(norm.weight.shape, generator=generator)
    else:
        for role in ("in", "out"):
            bias = layer.get_submodule(architecture.mlp[role]).bias.data
            bias += torch.randn(bias.shape, generator=generator)
    report = refit(student, teacher, plan, batches)
    assert report.before > 1e-3
    assert report.after < 1e-6 * report.before


def hidden(model, layer, at, batch):
    """Input and output of a module of a layer, and output of the layer."""
    seen = {}
    module = layers_of(model)[layer]
    handles = [
        module.get_submodule(at).register_forward_hook(lambda m, args, out: seen.update(x=args[0], out=out)),
        module.register_forward_hook(lambda m, args, out: seen.update(end=out[0] if isinstance(out, tuple) else out)),
    ]
    with torch.inference_mode():
        model(**batch)
    for handle in handles:
        handle.remove()
    return seen["x"], seen["out"], seen["end"]


def one_strength(monkeypatch, strength):
    """Restrict fits to a single strength."""
    monkeypatch.setattr(fit, "__defaults__", ((strength,),))


def rows_of(batches, states):
    """Tokens that the fit uses, in float64."""
    found = []
    for batch, part, held_out in zip(batches, states, Sample.of(batches).held_out, strict=True):
        mask = batch.get("attention_mask", torch.ones(part.shape[:2])).bool()
        found.append(part[mask & ~held_out[:, None]].double())
    return torch.cat(found)


@pytest.mark.parametrize("model_type", ["gpt2", "vit", "llama"])
@pytest.mark.parametrize("method", ["linear", "full"])
def test_repair_of_a_removed_layer_is_the_formula(monkeypatch, model_type, method):
    """Layer 2 is dropped, so the MLP of layer 1 must map the residual Y to L, the output of layer 2. `linear`: its
    outputs M become M T, with T = I + (M^T M + a I)^-1 M^T (L - Y - M), ReplaceMe's closed form with a penalty towards
    the identity. `full`: its projection W of the features X becomes W + (X^T X + a I)^-1 X^T (L - Y - X W). a is
    relative to the mean square. With a bias, both also fit a constant."""
    strength = 0.01
    one_strength(monkeypatch, strength)
    teacher = whole(model_type)
    batches = batches_of(teacher, 30, 30)
    plan = plan_for(teacher, Drop("layer", 2))
    at = architecture_for(teacher).mlp["out"]
    seen = [hidden(teacher, 1, at, batch) for batch in batches]
    x, m, end = (rows_of(batches, parts) for parts in zip(*seen, strict=True))
    aim = rows_of(batches, [hidden(teacher, 2, at, batch)[2] for batch in batches]) - (end - m)

    student, report, _, _ = refitted(teacher, plan, batches, method)
    assert report.kept
    inputs = m if method == "linear" else x
    width = inputs.shape[1]
    theta = theta_of(layers_of(teacher)[1].get_submodule(at))
    start = torch.eye(width + 1, width).double() if method == "linear" else theta
    constant = torch.ones(len(inputs), 1) * float(outs_of(teacher, 1)[1].bias is not None)
    ones = torch.cat([inputs, constant], dim=1)
    held = strength * inputs.square().sum() / width * torch.eye(width + 1).double()
    held[-1, -1] = 1 if not constant.any() else 0  # without a bias, the constant stays 0
    change = torch.linalg.solve(ones.T @ ones + held, ones.T @ (aim - ones @ start))
    expected = start + change
    if method == "linear":
        expected = theta @ expected[:-1] + torch.cat([torch.zeros(len(theta) - 1, width), expected[-1:]])
    found = theta_of(layers_of(student)[1].get_submodule(at))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
    assert not torch.allclose(found, theta, rtol=1e-2), "blind"


@pytest.mark.parametrize("model_type", ["gpt2", "qwen2"])
def test_batches_do_not_matter(model_type):
    """The same sequences give the same model one by one, in unequal batches, or all together."""
    teacher = whole(model_type)
    plan = plan_for(teacher, Fuse("layer", (1, 2), keep=1), Drop("mlp", 3))
    (together,) = batches_of(teacher, 24)
    losses, outputs = [], []
    for sizes in ((24,), (5, 17, 2), (1,) * 24):
        parts = {name: tensor.split(sizes) for name, tensor in together.items()}
        batches = [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)]
        student, report, _, _ = refitted(teacher, plan, batches)
        assert report.kept
        losses.append(report.after)
        with torch.inference_mode():
            outputs.append(prediction(student(**together)))
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-3)
    for found in outputs[1:]:
        torch.testing.assert_close(found, outputs[0], rtol=0, atol=1e-3 * outputs[0].abs().max().item())


@pytest.mark.parametrize("model_type", ["gpt2", "bert", "mistral"])
def test_padding_does_not_matter(model_type):
    """The content and the length of padding change nothing."""
    teacher = whole(model_type)
    plan = plan_for(teacher, *PLANS["last"])
    batches = batches_of(teacher)
    others = []
    for batch in batches:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        noise = torch.randint(3, 60, ids.shape, generator=torch.Generator().manual_seed(5))
        longer = torch.randint(3, 60, (len(ids), 4), generator=torch.Generator().manual_seed(6))
        others.append(
            {
                "input_ids": torch.cat([torch.where(mask.bool(), ids, noise), longer], dim=1),
                "attention_mask": torch.cat([mask, torch.zeros_like(longer)], dim=1),
            }
        )
    reports = [refitted(teacher, plan, which)[1] for which in (batches, others)]
    assert reports[0].kept
    assert reports[1].before == pytest.approx(reports[0].before, rel=1e-5)
    assert reports[1].after == pytest.approx(reports[0].after, rel=1e-3)
    unmasked = [{"input_ids": batch["input_ids"]} for batch in batches]
    assert refitted(teacher, plan, unmasked)[1].after != pytest.approx(reports[0].after, rel=1e-3), "blind"


@pytest.mark.parametrize("name", ["depth", "share", "basis", "blocks"])
@pytest.mark.parametrize("value", [2.0, math.nan])
def test_what_makes_it_worse_is_undone(monkeypatch, name, value):
    """If the repair raises the loss, or makes it NaN, the student is restored to the bit, with its ties, and the report
    says so."""
    teacher = whole("gpt2")
    plan = plan_for(teacher, *PLANS[name])
    student = apply(teacher, plan)
    given, ties = state_of(student), ties_of(student)
    seen = []

    def fake(teacher_states, layerwise):
        seen.append(state_of(layerwise.model))
        return value

    monkeypatch.setattr(refit_module, "calibration_loss", lambda model, reference, batches: 1.0)
    monkeypatch.setattr(refit_module.TeacherStates, "loss", fake)
    monkeypatch.setattr(refit_module.TeacherStates, "loss_of", lambda *_: value)
    report = refit(student, teacher, plan, batches_of(teacher))
    assert (report.before, report.after, report.kept) == (1.0, 1.0, False)
    assert report.blocks
    assert not same(seen[0], given), "nothing was repaired: this test is blind"
    assert same(state_of(student), given)
    assert ties_of(student) == ties


@pytest.mark.parametrize("value", [1e9, math.nan])
def test_the_repair_may_end_behind_the_last_edit(monkeypatch, value):
    """If the repair of later layers raises the loss, they stay as the plan made them, and the report has no rows for
    them; otherwise they are repaired."""
    teacher = whole("gpt2")
    plan, batches = plan_for(teacher, *PLANS["depth"]), batches_of(teacher)
    student, report, given, before = refitted(teacher, plan, batches)
    monkeypatch.setattr(refit_module.TeacherStates, "loss", lambda *_: value)
    stopped, early, _, _ = refitted(teacher, plan, batches)
    assert early.kept
    check(stopped, teacher, batches, early, given, before)
    assert {row["layer"] for row in early.blocks} == {1}
    for name, tensor in state_of(stopped).items():
        if ".h.1." not in name:
            assert torch.equal(tensor, given[name]), name
    monkeypatch.setattr(refit_module.TeacherStates, "loss", lambda *_: 0.0)
    _, whole_report, _, _ = refitted(teacher, plan, batches)
    assert {row["layer"] for row in whole_report.blocks} == {1, 2}
    assert report.after <= early.after
    assert student is not stopped


def test_exact_sharing_needs_no_repair(model_type):
    """Aligned weights with residuals of full rank equal the original, so the repair changes nothing: it compares maps
    in the same order of units and heads, and in the same rotation."""
    teacher = whole(model_type)
    plan = plan_for(teacher, Fuse("layer", (0, 2), "share", "mean", align="rotation", rank=32))
    _, report, _, before = refitted(teacher, plan, batches_of(teacher))
    assert before < 1e-9
    assert report.blocks
    assert all(row["before"] == pytest.approx(row["after"], abs=1e-7) for row in report.blocks)


def test_norms_of_shared_blocks_are_refitted(model_type):
    """Each depth has its own norms around shared matrices. In a model without biases, only these can be repaired."""
    teacher = whole(model_type)
    plan = plan_for(teacher, Fuse("layer", (0, 2), "share", "mean"))
    student, report, given, before = refitted(teacher, plan, batches_of(teacher))
    assert any(row["map"] == "norm" and row["after"] < row["before"] for row in report.blocks)
    changed = {
        name.rpartition(".")[2] for name, tensor in student.state_dict().items() if not torch.equal(tensor, given[name])
    }
    assert "weight" in changed
    assert report.after < before


@pytest.mark.parametrize(("model_type", "sizes"), [("bert", (1,)), ("llama", (2,)), ("gpt2", (1, 1, 1))])
def test_next_to_nothing_to_calibrate_with(model_type, sizes):
    """With far fewer rows than inputs (one sequence, or three of four tokens), the result is still not worse."""
    teacher = whole(model_type)
    batches = [dummy_inputs(teacher, size, 4, seed=i) for i, size in enumerate(sizes)]
    for name in ("residual", "basis", "select"):
        student, report, given, before = refitted(teacher, plan_for(teacher, *PLANS[name]), batches)
        check(student, teacher, batches, report, given, before)
    with pytest.raises(DataError, match="no sequences"):
        refit(student, teacher, plan_for(teacher, *PLANS[name]), [])


@pytest.mark.parametrize(("model_type", "name"), in_turn(["depth", *SHARING], ["bert"], ["qwen2"] * 2))
def test_repaired_models_are_saved_and_loaded(tmp_path, model_type, name):
    """A repaired model passes `verify`, is as small on disk as its ties allow, and expands to an equal stock model."""
    teacher = whole(model_type)
    plan = plan_for(teacher, *PLANS[name])
    student, report, given, _ = refitted(teacher, plan, batches_of(teacher))
    assert report.kept
    assert not same(state_of(student), given)
    assert verify(student)["reload"] == 0
    student.save_pretrained(tmp_path)
    loaded = AutoFusedModel.from_pretrained(tmp_path)
    assert same(state_of(loaded), state_of(student))
    assert ties_of(loaded) == ties_of(student)
    inputs = dummy_inputs(student)
    with torch.inference_mode():
        torch.testing.assert_close(prediction(expand(student)(**inputs)), prediction(student(**inputs)))


@pytest.mark.parametrize(("model_type", "head"), [(kind, head) for kind in HEADS for head in HEADS[kind]])
def test_every_kind_of_head(model_type, head):
    """The repair works for language models, all classifiers, and question answering."""
    teacher = small(model_type, head)
    batches = batches_of(teacher, 40)
    student, report, given, before = refitted(teacher, plan_for(teacher, *PLANS["depth"]), batches)
    check(student, teacher, batches, report, given, before)
    assert report.after < before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", ["bert", "llama", "vit"])
def test_half_precision(model_type, dtype):
    """A model in half precision keeps its data type, is not worse, and is repaired almost as well as in float32."""
    teacher = whole(model_type)
    plan = plan_for(teacher, *PLANS["depth"])
    batches = batches_of(teacher)
    reference = refitted(teacher, plan, batches)[1]
    teacher = teacher.to(dtype)
    batches = [{k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()} for batch in batches]
    student, report, given, before = refitted(teacher, plan, batches)
    check(student, teacher, batches, report, given, before)
    assert {tensor.dtype for tensor in student.parameters()} == {dtype}
    assert report.after < reference.after + 0.1 * reference.before


def test_only_the_student_changes_and_only_in_place():
    """Parameters remain the same objects, so an existing optimiser still holds them. Modes, gradients, batches and the
    teacher are unchanged."""
    teacher, plan = whole("bert").train(), plan_for(whole("bert"), *PLANS["residual"])
    student = apply(teacher, plan)
    layers_of(student)[0].eval()
    modes = [[module.training for module in model.modules()] for model in (student, teacher)]
    parameters = list(student.parameters())
    original, batches = state_of(teacher), batches_of(teacher)
    copies = copy.deepcopy(batches)
    report = refit(student, teacher, plan, batches)
    assert report.kept
    assert all(one is other for one, other in zip(student.parameters(), parameters, strict=True))
    assert all(parameter.requires_grad and parameter.grad is None for parameter in parameters)
    assert [[module.training for module in model.modules()] for model in (student, teacher)] == modes
    assert same(state_of(teacher), original)
    for batch, expected in zip(batches, copies, strict=True):
        assert same(batch, expected)
    prediction(student(**batches[0])).sum().backward()


def test_dropout_is_off_while_repairing():
    """Models in training mode get the same repair as models in eval mode."""
    teacher = whole("bert")
    plan, batches = plan_for(teacher, *PLANS["depth"]), batches_of(teacher)
    students = [refitted(model, plan, batches)[0] for model in (teacher, copy.deepcopy(teacher).train())]
    assert students[1].training
    assert same(state_of(students[0]), state_of(students[1]))


def test_the_first_layer_can_go():
    """If the first layer is removed, the second reads its input and is repaired."""
    teacher = whole("gpt2")
    _, report, _, _ = refitted(teacher, plan_for(teacher, Drop("layer", 0)), batches_of(teacher))
    assert report.after < 0.6 * report.before
    assert (0, "attention", "read") in {(row["layer"], row["kind"], row["map"]) for row in report.blocks}


def test_modes_come_back_after_errors(monkeypatch):
    """After an error, both models are in their earlier mode, without hooks."""
    teacher = whole("gpt2").train()
    plan = plan_for(teacher, *PLANS["depth"])
    student = apply(teacher, plan)

    def fail(*args, **kwargs):
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(transformer, "fit_map", fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        refit(student, teacher, plan, batches_of(teacher))
    for model in (teacher, student):
        assert all(module.training for module in model.modules())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in layers_of(model).modules())
        assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("name", ["attention", "mlp"])
def test_blocks_fused_alone_are_refitted_where_they_run(name, monkeypatch):
    """A fused block is refitted at the depth where it runs, and later blocks are repaired too."""
    monkeypatch.setattr(refit_module.TeacherStates, "loss_of", lambda *_: math.inf)
    teacher = whole("llama")
    plan = plan_for(teacher, *PLANS[name])
    _, report, _, _ = refitted(teacher, plan, batches_of(teacher))
    assert (0, name) in {(row["layer"], row["kind"]) for row in report.blocks}
    assert {row["layer"] for row in report.blocks} == set(range(LAYERS))


def test_a_trace_can_be_asked_in_any_order():
    """Recorded teacher states do not depend on the order or number of queries."""
    teacher = whole("qwen2")
    sample = Sample.of(batches_of(teacher))
    points = [HookPoint(kind, place) for kind in ("attention", "mlp") for place in ("read", "sum")]
    places = [(layer, point) for layer in range(LAYERS) for point in points]
    expected = TeacherStates(LayerwiseForward(teacher, sample)).see(places)  # from front to back
    teacher_states = TeacherStates(LayerwiseForward(teacher, sample))
    for some in ([places[9], places[1]], [places[2]], [places[14], places[1], places[3]], places):
        found = teacher_states.see(some)
        assert found.keys() == set(some)
        for key, states in found.items():
            for one, other in zip(states, expected[key], strict=True):
                assert torch.equal(one, other)


def test_a_trace_that_went_ahead_runs_no_layer_again(model_type, monkeypatch):
    """States recorded on the way equal those of hooks on single layers, and no layer runs twice."""
    teacher = whole(model_type)
    sample = Sample.of(batches_of(teacher))
    points = [HookPoint(kind, place) for kind in ("attention", "mlp") for place in ("read", "residual", "sum")]
    inner = [point for point in points if point != HookPoint("mlp", "residual")]
    layerwise = LayerwiseForward(teacher, sample)
    hooked = {(layer, point): [] for layer in range(LAYERS) for point in inner}
    for layer in range(LAYERS):
        for _, seen in layerwise.look(*inner):
            for point in inner:
                hooked[layer, point].append(seen[point].float())
        layerwise.advance()
    teacher_states = TeacherStates(LayerwiseForward(teacher, sample))
    teacher_states.ahead(selecting(TRANSFORMER))
    monkeypatch.setattr(LayerwiseForward, "look", lambda *args, **options: pytest.fail("a layer ran again"))
    for key, states in teacher_states.see(hooked).items():
        for one, other in zip(states, hooked[key], strict=True):
            assert torch.equal(one, other)
    teacher_states.ahead(selecting(TRANSFORMER))


@pytest.mark.parametrize("name", ["attention", "mlp"])
def test_the_teacher_is_seen_where_it_should_be(name):
    """A block fused from later layers is fitted to the outputs of these layers, and blocks after it to the outputs of
    their own. The repair equals one with all teacher states recorded beforehand."""
    teacher = whole("llama")
    plan, batches = plan_for(teacher, *PLANS[name]), batches_of(teacher)
    _, report, _, before = refitted(teacher, plan, batches)
    teacher_states = TeacherStates(LayerwiseForward(teacher, Sample.of(batches)))
    teacher_states.states(LAYERS)
    assert refit_module.refit_by(apply(teacher, plan), teacher_states, plan, before, "full") == report


def test_rows_of_the_report():
    """Every refitted map has a row, front to back, with errors that did not rise."""
    teacher = whole("bert")
    plan = plan_for(teacher, Fuse("layer", (1, 2), keep=1), Fuse("mlp", (0, 3), "share"))
    _, report, _, _ = refitted(teacher, plan, batches_of(teacher))
    rows = [(row["layer"], row["kind"], row["map"]) for row in report.blocks]
    free = [("attention", "read"), ("attention", "out"), ("mlp", "read"), ("mlp", "out")]
    tied = [*free[:2], ("mlp", "in"), ("mlp", "out"), ("mlp", "norm")]
    assert rows == [(layer, *row) for layer, part in enumerate((tied, free, tied)) for row in part]
    assert all(0 <= row["after"] <= row["before"] for row in report.blocks)
