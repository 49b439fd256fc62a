"""Operator `mix` continues in training: elements are drawn anew in each step, and averaged at the end."""

import dataclasses

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from helpers import LAYERS, in_turn, tiny_model
from torch.utils.data import DataLoader

from hf_layerfuse import (
    Fuse,
    HealRecipe,
    HealScope,
    Plan,
    RecipeError,
    align,
    apply,
    fused_parameters,
    heal,
    heal_scope,
    layer_map,
    mixed_weights,
)
from hf_layerfuse.evaluation.dummy_inputs import dummy_inputs
from hf_layerfuse.models.architectures import architecture_for
from hf_layerfuse.recipe import DataRecipe, FusionRecipe, Recipe
from hf_layerfuse.training.mixture import Mixture

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


PLANS = {
    "share": (Fuse("layer", (1, 3), "share", "mix"), Fuse("layer", (2, 4), "share", "mean")),
    "depth": (Fuse("layer", (1, 2, 3), operator="mix"), Fuse("layer", (4, 5), operator="mean")),
    "aligned": (Fuse("mlp", (1, 3, 5), "share", "mix", align="permutation"),),
}


def made(model_type: str, name: str, head: str | None = None):
    # layers of two types cannot be averaged in depth
    one_type = {"use_sliding_window": False} if model_type == "qwen2" else {}
    teacher = tiny_model(model_type, head, **one_type)
    plan = Plan(model_type, LAYERS, PLANS[name])
    student = apply(teacher, plan)
    return student, teacher, plan, mixed_weights(student, teacher, plan)


@pytest.mark.parametrize(("model_type", "name"), in_turn(PLANS))
def test_parts_are_those_of_the_aligned_layers(model_type, name):
    """Every element of a weight made by `mix` comes from one of its parts; other weights have no parts."""
    student, teacher, plan, parts = made(model_type, name)
    assert parts
    edit = plan.edits[0]
    originals = architecture_for(teacher).layer_list(align(teacher, plan))
    prefix = architecture_for(teacher).layers_path(student)
    for full, tensors in parts.items():
        value = student.get_parameter(full)
        assert len(tensors) == len(edit.layers)
        assert torch.stack([value == tensor for tensor in tensors]).any(0).all()
        own = full.removeprefix(f"{prefix}.").split(".", 1)[1]
        for layer, tensor in zip(edit.layers, tensors, strict=True):
            assert torch.equal(tensor, originals[layer].get_parameter(own))
    if edit.mode == "share":
        assert all(student.get_parameter(full).ndim == 2 for full in parts), (
            "what each depth has for itself is not mixed"
        )
    mixed = {id(student.get_parameter(full)) for full in parts}
    kinds = 1 if edit.kind == "mlp" else 2
    layer = architecture_for(teacher).layer_list(student)[
        plan.layout().slots[1].layers[0] if edit.mode == "share" else 1
    ]
    owned = [
        p for n, p in layer.named_parameters() if architecture_for(teacher).owner(n) in ("attention", "mlp")[-kinds:]
    ]
    assert mixed == {id(p) for p in owned if edit.mode == "depth" or p.ndim == 2}


def test_a_scope_has_what_the_recipe_asks_for():
    """Layers are always matched; fused parameters are frozen or mixed by the recipe, of the last of several rounds."""
    student, teacher, plan, parts = made("gpt2", "share")
    plain = heal_scope(student, teacher, plan, HealRecipe())
    assert plain == HealScope(matches=layer_map(student, teacher, plan))
    frozen = heal_scope(student, teacher, plan, HealRecipe(freeze_fused=True))
    assert frozen == dataclasses.replace(plain, frozen=fused_parameters(student, plan))
    last = tiny_model("gpt2", seed=1)
    mixing, theirs = HealRecipe(mix=True), mixed_weights(student, last, plan)
    for options, expected in (({}, parts), ({"source": (last, plan)}, theirs)):
        scope = heal_scope(student, teacher, plan, mixing, **options)
        assert scope.matches == plain.matches
        assert scope.mixed.keys() == expected.keys()
        for name, tensors in expected.items():
            assert torch.equal(torch.stack(scope.mixed[name]), torch.stack(tensors))
    assert not torch.equal(next(iter(parts.values()))[0], next(iter(theirs.values()))[0])


def test_a_step_by_hand():
    """Outside steps, the weight is the mean. In a step, it is mixed, and each part gets the gradient of its
    elements."""
    student, _, _, parts = made("gpt2", "share", "GPT2Model")
    mixture = Mixture(student, parts)
    name = next(iter(parts))
    target, tensors = student.get_parameter(name), parts[name]
    assert torch.equal(target, torch.stack(list(tensors)).double().mean(0).float())
    torch.manual_seed(0)
    mixture.draw()
    first = target.detach().clone()
    shares = [(target == tensor).float().mean().item() for tensor in tensors]
    assert shares == pytest.approx([0.5, 0.5], abs=0.1)
    student(**dummy_inputs(student)).last_hidden_state.square().mean().backward()
    gradient = target.grad.clone()
    mixture.scatter_gradients()
    place = next(i for i, found in enumerate(mixture.targets) if found is target)
    ours = list(mixture.parts[place])
    assert target.grad is None
    assert torch.equal(sum(part.grad for part in ours), gradient)
    for part, tensor in zip(ours, tensors, strict=True):
        assert torch.equal(part.grad != 0, (target == tensor) & (gradient != 0))
    mixture.draw()
    assert not torch.equal(target, first)
    assert student.h[1].mlp.c_fc.weight is student.h[3].mlp.c_fc.weight


def healed(folder=None, steps: int = 6):
    teacher = tiny_model("gpt2", "GPT2LMHeadModel")
    plan = Plan("gpt2", LAYERS, PLANS["share"])
    student = apply(teacher, plan)
    ids = torch.randint(3, 64, (12, 8), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    recipe = HealRecipe(steps=steps, learning_rate=3e-3, eval_every=2, mixed_precision="no", mix=True)
    scope = heal_scope(student, teacher, plan, recipe)
    options = {"teacher": teacher, "scope": scope, "validation_batches": DataLoader(rows[:4]), "checkpoints": folder}
    report = heal(student, DataLoader(rows, 4, shuffle=True), recipe, **options)
    return student, scope.mixed, report


def test_healing_trains_the_parts():
    """The loss falls, every parameter changes, mixed ones included, ties remain, and the original is unchanged."""
    before = apply(tiny_model("gpt2", "GPT2LMHeadModel"), Plan("gpt2", LAYERS, PLANS["share"]))
    original = tiny_model("gpt2", "GPT2LMHeadModel").state_dict()
    student, parts, report = healed(steps=12)
    assert report.validation_loss[-1][1] < report.validation_loss[0][1]
    for name, value in student.named_parameters():
        assert not torch.equal(value, before.get_parameter(name)), name
    for name, tensors in parts.items():
        assert any(torch.equal(tensor, original[name]) for tensor in tensors)
    assert student.transformer.h[1].mlp.c_fc.weight is student.transformer.h[3].mlp.c_fc.weight


@pytest.mark.parametrize("moment", [4, *(pytest.param(moment, marks=pytest.mark.slow) for moment in (1, 3, 6))])
def test_interrupted_and_started_again(tmp_path, interrupt, moment):
    """Checkpoints hold the parts, so an interrupted training ends with the same result."""
    whole, _, _ = healed()
    interrupt(moment)
    with pytest.raises(InterruptedError):
        healed(tmp_path / "run")
    student, _, _ = healed(tmp_path / "run")
    theirs = whole.state_dict()
    assert [name for name, value in student.state_dict().items() if not torch.equal(value, theirs[name])] == []


def test_an_error_leaves_the_mean(interrupt):
    """After an error inside a step, the model has the mean of the parts, not the drawn mixture."""
    teacher = tiny_model("gpt2", "GPT2LMHeadModel")
    plan = Plan("gpt2", LAYERS, PLANS["share"])
    student = apply(teacher, plan)
    recipe = HealRecipe(steps=2, mix=True, kl_weight=0.0)
    scope = heal_scope(student, teacher, plan, recipe)
    rows = [{"input_ids": torch.arange(3, 11), "labels": torch.arange(3, 11)}] * 4
    interrupt(1)
    with pytest.raises(InterruptedError):
        heal(student, DataLoader(rows, 4), recipe, scope=scope)
    for name, tensors in scope.mixed.items():
        torch.testing.assert_close(student.get_parameter(name), torch.stack(list(tensors)).mean(0))


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_launchers_that_train_the_student_alone_are_refused(monkeypatch, kind):
    """Mixing trains weights outside the student, but these launchers shard or update only those of the student."""
    student, _, _, parts = made("gpt2", "share", "GPT2LMHeadModel")
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType(kind))
    with pytest.raises(RecipeError, match=f"{kind}.*multi-gpu"):
        heal(student, DataLoader([]), HealRecipe(steps=2, mix=True, kl_weight=0.0), scope=HealScope(mixed=parts))


def test_recipes_that_mix_nothing_are_refused():
    """Mixing needs the operator, and weights that are trained."""
    common = {"model": "m", "task": "causal-lm", "output_dir": "o", "data": DataRecipe(train="t")}
    with pytest.raises(RecipeError, match=r"fusion\.operator='auto'"):
        Recipe(**common, fusion=FusionRecipe(keep_layers=3), heal=HealRecipe(mix=True))
    with pytest.raises(RecipeError, match="freeze_fused"):
        HealRecipe(mix=True, freeze_fused=True)
