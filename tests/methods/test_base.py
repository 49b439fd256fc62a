"""A method is one folder and one entry: what the package has to know of it is its `Method`."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from helpers import some_batches, tiny_model
from runs import STAGE
from torch.utils.data import DataLoader

import hf_layerfuse
from hf_layerfuse import Drop, HealRecipe, Plan, RecipeError, apply, methods
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
    """Each section that names a method has one `Method`, of the recipe and the targets of that section."""
    assert {method.name: method.targets for method in METHODS} == METHOD_TARGETS
    assert len({method.name for method in METHODS}) == len(METHODS)
    for method in METHODS:
        assert method.recipe_type is SECTIONS[method.name]
        assert set(method.targets) <= {field.name for field in dataclasses.fields(method.recipe_type)}


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_recipe_leads_to_its_method(method):
    """A run's recipe knows the section of its method, and `method_of` finds the method; one that is fitted at once
    needs no training, heals as the user says and has nothing to finish."""
    asked = method.recipe_type(**ASKED[method.name])
    recipe = Recipe(**COMMON, **{method.name: asked})
    assert recipe.method is asked
    assert method_of(recipe) is method
    assert not method.needs_training(asked)
    assert method.healing(asked, recipe.heal) is recipe.heal
    assert method.finish(asked) is None


def test_methods_that_end_after_training():
    """Homotopy moves activations to lines, as hard as the user says, and tells the training how near is near enough.
    As a regulariser it merges nothing in the end; a merge that stays open does, and needs no penalty."""
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
    """A number of MLPs that are dropped, from the last layer on; `late` ones have a finish."""

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
    """Make the weights of the head one number, so that a test sees whether the model was finished."""

    def fill(model, plan, batches):
        assert len(batches) == 6
        with torch.no_grad():
            model.lm_head.weight.fill_(0.5)
        return model, dataclasses.replace(plan, notes={"finished": True})

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
    """Its recipe or fields of it, a target that replaces another, a wrong recipe refused: all by its `Method` alone."""
    small = _compress(TOY, model, None, None, True, {"last": 2})
    assert [edit.layer for edit in Plan.from_dict(small.config.layerfuse_plan).edits] == [4, 5]
    small = _compress(TOY, model, ToyRecipe(most=3), None, False, {"last": 1})
    assert [edit.layer for edit in Plan.from_dict(small.config.layerfuse_plan).edits] == [5]
    with pytest.raises(RecipeError, match="pass a ToyRecipe"):
        _compress(TOY, model, SECTIONS["fusion"](keep_layers=2), None, True, {})


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("late", [False, True])
def test_a_new_method_runs_in_the_pipeline(model, monkeypatch, tmp_path, capsys, late):
    """Once it is registered, a run searches by it, heals as it says, and lets it finish what was trained."""
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
    assert ("filling" in said) is plan.notes.get("finished", False) is late
    assert bool((fused.lm_head.weight == 0.5).all()) is late
    assert outcome.fused.parameters < outcome.before.parameters
    assert [step for step, _ in outcome.rounds[-1].report.validation_loss] == ([0, 1, 2] if late else [0, 2])


def test_the_name_of_a_result_in_0_1():
    """What 0.1 calls `Found` is importable under that name still, and is the same class."""
    assert hf_layerfuse.Found is hf_layerfuse.SearchResult
