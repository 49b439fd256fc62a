"""A method is one folder and one entry: the package reads everything from its `Method`."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from helpers import some_batches, tiny_model
from runs import STAGE
from torch.utils.data import DataLoader

import hf_layerfuse
from hf_layerfuse import Drop, HealRecipe, Plan, PlanNotes, RecipeError, apply, methods
from hf_layerfuse.api import _compress
from hf_layerfuse.methods import METHODS, method_of
from hf_layerfuse.methods.base import Finish, Method, SearchResult
from hf_layerfuse.pipeline.rounds import fuse_and_heal
from hf_layerfuse.recipe import SECTIONS, DataRecipe, Recipe
from hf_layerfuse.recipe.run import METHOD_TARGETS
from hf_layerfuse.recipe.strict import require_one, strict_recipe

COMMON = {"model": "m", "task": "image-classification", "output_dir": "o", "data": DataRecipe(train="t")}
ASKED = {"fusion": {"keep_layers": 4}, "collapse": {"count": 2}, "merge": {"latency_budget": 0.5}}


def test_methods_are_those_of_recipes():
    """Each section that names a method has one `Method`, with the recipe and targets of that section."""
    assert {method.name: method.targets for method in METHODS} == METHOD_TARGETS
    assert len({method.name for method in METHODS}) == len(METHODS)
    for method in METHODS:
        assert method.recipe_type is SECTIONS[method.name]
        assert set(method.targets) <= {field.name for field in dataclasses.fields(method.recipe_type)}


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_recipe_leads_to_its_method(method):
    """A run's recipe names the section of its method, and `method_of` finds the method. A method that fits at once
    needs no training, heals by the user's recipe, and has no last step."""
    asked = method.recipe_type(**ASKED[method.name])
    recipe = Recipe(**COMMON, **{method.name: asked})
    assert recipe.method is asked
    assert method_of(recipe) is method
    assert not method.needs_training(asked)
    assert method.healing(asked, recipe.heal) is recipe.heal
    assert method.finish(asked) is None


def test_methods_that_end_after_training():
    """Homotopy moves activations to lines with the user's strength, and gives the training its threshold. As a
    regulariser it merges nothing at the end. An open merge has a last step and needs no penalty."""
    collapse, merge = (next(method for method in METHODS if method.name == name) for name in ("collapse", "merge"))
    homotopy = collapse.recipe_type(count=2, method="homotopy", threshold=0.1)
    assert collapse.needs_training(homotopy)
    assert collapse.healing(homotopy, HealRecipe()).homotopy_strength == "auto"
    assert collapse.healing(homotopy, HealRecipe(homotopy_strength=3.0)).homotopy_strength == 3.0
    assert collapse.finish(homotopy).threshold == 0.1
    regulariser = dataclasses.replace(homotopy, merge=False)
    assert collapse.needs_training(regulariser)
    assert collapse.finish(regulariser) is None
    opened = merge.recipe_type(latency_budget=0.5, method="open")
    assert merge.needs_training(opened)
    assert merge.healing(opened, HealRecipe()).homotopy_strength == HealRecipe().homotopy_strength
    assert merge.finish(opened).threshold is None


@strict_recipe
class ToyRecipe:
    """A method that drops a number of MLPs, from the last layer on; `late` adds a last step."""

    last: int | None = None
    most: int | None = None
    late: bool = False

    def __post_init__(self) -> None:
        require_one(self, ("last", "most"), "last or most")


def drop_last(model, recipe, batches=None):
    depth = model.config.num_hidden_layers
    plan = Plan("gpt2", depth, tuple(Drop("mlp", layer) for layer in range(depth - (recipe.last or 1), depth)))
    return SearchResult(apply(model, plan), plan, None)


def finish(recipe):
    """Set all head weights to one number, so that a test sees the last step."""

    def fill(model, plan, batches):
        assert len(batches) == 6
        with torch.no_grad():
            model.lm_head.weight.fill_(0.5)
        return model, dataclasses.replace(plan, notes=PlanNotes(extra={"finished": True}))

    return Finish("filling", fill) if recipe.late else None


TOY = Method(
    name="toy",
    recipe_type=ToyRecipe,
    targets=("last", "most"),
    doing="toying",
    done="toyed",
    tag="layer-toy",
    search=drop_last,
    needs_training=lambda recipe: recipe.late,
    healing=lambda recipe, heal: dataclasses.replace(heal, eval_every=1) if recipe.late else heal,
    finish=finish,
)


@pytest.fixture(scope="module")
def model():
    return tiny_model("gpt2", "GPT2LMHeadModel")


def test_a_new_method_has_the_front_door(model):
    """A recipe or its fields, a target that replaces another, and the refusal of a wrong recipe all work through its
    `Method`."""
    small = _compress(TOY, model, None, None, True, {"last": 2})
    assert [edit.layer for edit in Plan.from_dict(small.config.layerfuse_plan).edits] == [4, 5]
    small = _compress(TOY, model, ToyRecipe(most=3), None, False, {"last": 1})
    assert [edit.layer for edit in Plan.from_dict(small.config.layerfuse_plan).edits] == [5]
    with pytest.raises(RecipeError, match="pass a ToyRecipe"):
        _compress(TOY, model, SECTIONS["fusion"](keep_layers=2), None, True, {})


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("late", [False, True])
def test_a_new_method_runs_in_the_pipeline(model, monkeypatch, tmp_path, capsys, late):
    """After registration, a run uses the search, the healing and the last step of the method."""
    monkeypatch.setattr(methods, "METHODS", (*METHODS, TOY))
    batches = some_batches(model)
    rows = [{"input_ids": ids, "labels": ids} for batch in batches for ids in batch["input_ids"]]
    inputs = SimpleNamespace(
        calibration=lambda: batches,
        dtype=torch.float32,
        measure=lambda model, original, name: dataclasses.replace(STAGE, parameters=model.num_parameters()),
        train_loader=lambda teacher, seed: DataLoader(rows, batch_size=2),
        validation_batches=lambda: DataLoader(rows, batch_size=2),
    )
    heal = HealRecipe(steps=2, batch_size=2)
    recipe = SimpleNamespace(method=ToyRecipe(last=2, late=late), heal=heal, task="causal-lm", seed=0)
    outcome = fuse_and_heal(recipe, model, inputs, tmp_path)
    fused, plan = outcome.model, outcome.plan
    said = capsys.readouterr().err
    assert "toying" in said
    assert ("filling" in said) is plan.notes.extra.get("finished", False) is late
    assert bool((fused.lm_head.weight == 0.5).all()) is late
    assert outcome.fused.parameters < outcome.before.parameters
    assert [step for step, _ in outcome.rounds[-1].report.validation_loss] == ([0, 1, 2] if late else [0, 2])


def test_the_name_of_a_result_in_0_1():
    """`Found`, the name in 0.1, can still be imported and is the same class."""
    assert hf_layerfuse.Found is hf_layerfuse.SearchResult
