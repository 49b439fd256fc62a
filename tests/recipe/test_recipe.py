"""Recipes: impossible values are refused before anything runs, with the value and the allowed ones."""

import dataclasses
import itertools
import json
from typing import get_args, get_type_hints

import pytest
import yaml

from hf_layerfuse import FusionRecipe, LayerFuseError, MergeRecipe, RecipeError
from hf_layerfuse.math.similarity import ON_ACTIVATIONS, ON_WEIGHTS
from hf_layerfuse.recipe import TARGETS, DataRecipe, EvaluateRecipe, HealRecipe, Recipe, load_recipe

WHOLE = """
model: gpt2
task: causal-lm
output_dir: out
data: {name: some/text, max_length: 64}
fusion: {keep_layers: 8, mode: share}
heal: {steps: 10, learning_rate: 1e-4, kl_weight: 1}
"""
RUN = {"model": "gpt2", "task": "causal-lm", "output_dir": "out"}


@pytest.fixture
def written(tmp_path):
    """Path of a recipe file with this content."""

    def write(text: str | bytes):
        path = tmp_path / "recipe.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_errors_are_one_family():
    """Every error about a recipe is a `LayerFuseError` and a `ValueError`."""
    assert issubclass(RecipeError, LayerFuseError)
    assert issubclass(RecipeError, ValueError)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (FusionRecipe, {}, r"exactly one target, got none: set keep_layers .* ratio .* max_parameters .* max_bytes"),
        (FusionRecipe, {"keep_layers": 3, "ratio": 0.5}, r"exactly one target, got keep_layers=3 and ratio=0.5: set"),
        (FusionRecipe, {"max_bytes": 9, "max_parameters": 8}, r"got max_parameters=8.0 and max_bytes=9.0: set"),
        (FusionRecipe, {"max_parameters": 0}, r"max_parameters=0\.0 leaves no model: use a number above 0"),
        (FusionRecipe, {"max_bytes": float("nan")}, r"max_bytes=nan leaves no model: use a number above 0"),
        (FusionRecipe, {"keep_layers": 0}, r"keep_layers=0 .* 1 or more"),
        (FusionRecipe, {"keep_layers": -2}, r"keep_layers=-2 .* 1 or more"),
        (FusionRecipe, {"keep_layers": 2, "mode": "share", "rank": "auto"}, r"rank='auto' follows .* keep_layers=2"),
        (FusionRecipe, {"ratio": 0.5, "rank": "auto"}, r"rank=auto with mode='depth'"),
        (FusionRecipe, {"ratio": 0.5, "mode": "share", "rank": -1}, r"rank=-1: use 'auto', or"),
        (FusionRecipe, {"ratio": 0}, r"ratio=0\.0 .* between 0 and 1"),
        (FusionRecipe, {"ratio": 1}, r"ratio=1\.0 .* between 0 and 1"),
        (FusionRecipe, {"ratio": 1.5}, r"ratio=1\.5 .* between 0 and 1"),
        (FusionRecipe, {"ratio": float("nan")}, r"ratio=nan .* between 0 and 1"),
        *(
            (FusionRecipe, {"keep_layers": 3, "cluster": name}, rf"mode='depth' with cluster='{name}'.*mode='share'")
            for name in ("global", "agglomerative")
        ),
        (DataRecipe, {"max_length": 0}, r"data\.max_length=0: .* 1 or more"),
        (DataRecipe, {"max_test_samples": 0}, r"data\.max_test_samples=0: .* 1 or more"),
        (HealRecipe, {"steps": -1}, r"heal\.steps=-1: .*0"),
        (HealRecipe, {"batch_size": 0}, r"heal\.batch_size=0: .* 1 or more"),
        (HealRecipe, {"temperature": 0}, r"heal\.temperature=0\.0: .* above 0"),
        (HealRecipe, {"learning_rate": float("nan")}, r"heal\.learning_rate=nan: .* above 0"),
        (HealRecipe, {"ce_weight": 0, "kl_weight": 0}, r"are all 0"),
        (HealRecipe, {"warmup_ratio": 2}, r"heal\.warmup_ratio=2\.0: .* 0 to 1"),
        (EvaluateRecipe, {"stride": 0}, r"evaluate\.stride=0: .* 1 or more"),
    ],
)
def test_impossible_values_are_refused(kind, values, message):
    """An impossible value or combination is refused with the value and the allowed ones."""
    with pytest.raises(RecipeError, match=message):
        kind(**values)


@pytest.mark.parametrize(
    ("kind", "values", "named"),
    [
        (FusionRecipe, {"keep_layers": "three"}, ("keep_layers", "'three'", "a whole number")),
        (FusionRecipe, {"keep_layers": 3.0}, ("keep_layers", "3.0", "a whole number")),
        (FusionRecipe, {"keep_layers": True}, ("keep_layers", "True", "a whole number")),
        (FusionRecipe, {"ratio": "half"}, ("ratio", "'half'", "a number")),
        (FusionRecipe, {"ratio": [0.5]}, ("ratio", "[0.5]", "a number")),
        (FusionRecipe, {"max_parameters": "8M"}, ("max_parameters", "'8M'", "a number")),
        (FusionRecipe, {"max_bytes": True}, ("max_bytes", "True", "a number")),
        (FusionRecipe, {"keep_layers": 3, "cluster": "local"}, ("cluster", "local", "'adjacent'", "'agglomerative'")),
        (FusionRecipe, {"keep_layers": 3, "mode": "wide"}, ("mode", "wide", "'depth'", "'share'")),
        (FusionRecipe, {"keep_layers": 3, "blocks": "head"}, ("blocks", "head", "'layer'", "'mlp'", "'separate'")),
        (FusionRecipe, {"keep_layers": 3, "seed": 1.5}, ("seed", "1.5", "a whole number")),
        (DataRecipe, {"text_column": 3}, ("text_column", "3", "text")),
        (HealRecipe, {"mixed_precision": "fp8"}, ("mixed_precision", "fp8", "'auto'", "'bf16'")),
        (Recipe, {**RUN, "task": "chess"}, ("task", "chess", "'causal-lm'", "'feature-extraction'")),
        (Recipe, {**RUN, "data": {"name": "x"}}, ("data", "a DataRecipe")),
    ],
)
def test_wrong_types_are_refused(kind, values, named):
    """A value of the wrong type is refused with its field, the value and the right type; nothing is converted."""
    rest = {"data": DataRecipe(), "fusion": FusionRecipe(keep_layers=3)} if kind is Recipe else {}
    with pytest.raises(RecipeError) as refused:
        kind(**{**rest, **values})
    assert all(name in str(refused.value) for name in (kind.__name__, *named)), refused.value


@pytest.mark.parametrize(
    ("kind", "field", "close"),
    [
        (FusionRecipe, "keep_layer", "keep_layers"),
        (FusionRecipe, "similarty", "similarity"),
        (DataRecipe, "max_len", "max_length"),
        (HealRecipe, "learningrate", "learning_rate"),
        (EvaluateRecipe, "strid", "stride"),
        (Recipe, "heel", "heal"),
    ],
)
def test_unknown_fields_are_refused_with_the_nearest(kind, field, close):
    """A misspelt field is never ignored: the error suggests the nearest one and lists all."""
    with pytest.raises(RecipeError, match=f"{kind.__name__} has no field '{field}'. Did you mean '{close}'") as refused:
        kind(**{field: 1})
    assert all(name.name in str(refused.value) for name in dataclasses.fields(kind))
    with pytest.raises(RecipeError) as refused:
        kind(zzzzz=1)
    assert "Did you mean" not in str(refused.value)


def test_whole_numbers_and_exponents_are_floats(written):
    """For a float, 1 is 1.0, and 1e-4, which YAML reads as text, is a number. `no` stays a text, not false."""
    recipe = HealRecipe(temperature=2, learning_rate="1e-4")
    assert (recipe.temperature, recipe.learning_rate) == (2.0, 1e-4)
    assert type(recipe.temperature) is type(recipe.learning_rate) is float
    heal = load_recipe(written(WHOLE)).heal
    assert (heal.learning_rate, heal.kl_weight) == (1e-4, 1.0)
    assert HealRecipe(mixed_precision=yaml.safe_load("no")).mixed_precision == "no"
    assert type(heal.learning_rate) is type(heal.kl_weight) is float


def test_every_similarity_can_be_asked_for():
    assert {*ON_WEIGHTS, *ON_ACTIVATIONS} == {*get_args(get_type_hints(FusionRecipe)["similarity"])}


def test_file(written):
    """A file gives the same recipe as its fields in Python; missing sections have their defaults."""
    assert load_recipe(written(WHOLE)) == Recipe(
        **RUN,
        data=DataRecipe(name="some/text", max_length=64),
        fusion=FusionRecipe(keep_layers=8, mode="share"),
        heal=HealRecipe(steps=10, learning_rate=1e-4, kl_weight=1.0),
        evaluate=EvaluateRecipe(),
    )


def test_overrides(written):
    """Overrides replace fields inside and outside sections, and create missing sections."""
    overrides = {"model": "other", "fusion.mode": "depth", "heal.steps": 0, "evaluate.latency": False}
    recipe = load_recipe(written(WHOLE), overrides)
    assert (recipe.model, recipe.fusion.mode, recipe.heal.steps) == ("other", "depth", 0)
    assert recipe.evaluate == EvaluateRecipe(latency=False)
    assert recipe.heal.learning_rate == 1e-4
    empty = written("model: gpt2\ntask: causal-lm\noutput_dir: out\ndata:\nfusion:\n")
    assert load_recipe(empty, {"fusion.ratio": 0.5}).fusion == FusionRecipe(ratio=0.5)


def test_a_new_target_replaces_the_old_one(written):
    """A target on the command line replaces the file's target; naming two is still refused."""
    values = {"keep_layers": 4, "ratio": 0.25, "max_parameters": 8e6, "max_bytes": 2e7}
    values |= {"latency_budget": 0.5, "latency_ms": 20.0}
    whole = WHOLE.replace("mode: share", "mode: depth")
    assert whole != WHOLE
    assert {*values} == {*TARGETS}
    for old, new in itertools.permutations(values, 2):
        path = written(whole.replace("keep_layers: 8", f"{old}: {values[old]}"))
        expected = FusionRecipe(**{new: values[new]})
        assert load_recipe(path, {f"fusion.{new}": values[new]}).fusion == expected
        with pytest.raises(RecipeError, match=r"exactly one target, got \w+=\S+ and \w+=\S+: set"):
            load_recipe(path, {f"fusion.{name}": values[name] for name in (old, new)})
    assert load_recipe(written(WHOLE), {"fusion.max_bytes": "2e7"}).fusion.max_bytes == 2e7


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"fussion.ratio": 0.5},
            r"--fussion\.ratio: no section 'fussion'.*data, fusion, collapse, merge, heal",
        ),
        ({"fusion.heal.steps": 1}, r"no section 'fusion\.heal'"),
        ({"fusion.keep_layer": 1}, r"no field 'keep_layer'. Did you mean 'keep_layers'"),
        ({"moddel": "gpt2"}, r"no field 'moddel'. Did you mean 'model'"),
        ({"fusion": 8}, r"section 'fusion' holds 8, not fields"),
    ],
)
def test_bad_overrides_are_refused(written, overrides, message):
    """An override of an unknown section or field is refused by name."""
    with pytest.raises(RecipeError, match=message):
        load_recipe(written(WHOLE), overrides)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"recipe\.yaml holds NoneType, not a mapping"),
        ("- model: gpt2", r"recipe\.yaml holds list, not a mapping"),
        ("just words", r"recipe\.yaml holds str, not a mapping"),
        ("model: [gpt2", r"recipe\.yaml is not valid YAML"),
        (b"model: \xff", r"recipe\.yaml is not valid YAML"),
        ("1: gpt2", r"no field '1'"),
        (WHOLE.replace("mode: share", "on: true"), r"FusionRecipe has no field 'True'"),
        (WHOLE.replace("{keep_layers: 8, mode: share}", "8"), r"section 'fusion' holds 8, not fields"),
        (WHOLE.replace("{keep_layers: 8, mode: share}", ""), r"exactly one target"),
        (WHOLE.replace("data:", "date:"), r"no field 'date'. Did you mean 'data'"),
        (WHOLE.replace("output_dir: out", ""), "Recipe lacks output_dir: add it"),
    ],
)
def test_bad_files_are_refused(written, text, message):
    """A file that is not a recipe is a `RecipeError` that names its content, never a bare TypeError."""
    with pytest.raises(RecipeError, match=message):
        load_recipe(written(text))


def test_missing_files_are_named(tmp_path):
    """A missing file, or a directory, is named in the error."""
    for path in (tmp_path / "nowhere.yaml", tmp_path):
        with pytest.raises(RecipeError, match=f"no recipe at {path}"):
            load_recipe(path)


def test_yaml_runs_no_code(written, tmp_path):
    """A YAML tag that calls a function is refused and not called; an unsafe loader would call it."""
    victim = tmp_path / "victim"
    path = written(WHOLE.replace("model: gpt2", f"model: !!python/object/apply:os.mkdir [{victim}]"))
    with pytest.raises(RecipeError, match="is not valid YAML"):
        load_recipe(path)
    assert not victim.exists()
    yaml.unsafe_load(path.read_text())
    assert victim.exists(), "the tag does nothing: this test is blind"


def test_earlier_field_names_still_load():
    """Recipes of 0.1 set the latency budget of a merge by its earlier names; both names together are refused."""
    earlier = MergeRecipe(budget=0.5, batch_size=4, repeats=3)
    assert earlier == MergeRecipe(latency_budget=0.5, latency_batch_size=4, latency_repeats=3)
    with pytest.raises(RecipeError, match="'budget' is the earlier name of 'latency_budget'"):
        MergeRecipe(budget=0.5, latency_budget=0.5)
    assert HealRecipe(straighten="auto") == HealRecipe(homotopy_strength="auto")


def test_earlier_field_names_meet_current_ones(tmp_path):
    """A file of 0.1 accepts overrides by current names, and a current file accepts overrides by earlier names."""
    path = tmp_path / "recipe.yaml"
    for inside, given in (("budget", "latency_budget"), ("latency_budget", "budget"), ("budget_ms", "latency_budget")):
        tree = {"model": "m", "task": "image-classification", "output_dir": "out", "data": {"name": "cifar10"}}
        path.write_text(json.dumps(tree | {"merge": {inside: 0.9, "batch_size": 4}}))
        assert load_recipe(path, {f"merge.{given}": 0.5}).merge == MergeRecipe(latency_budget=0.5, latency_batch_size=4)
    with pytest.raises(RecipeError, match="Give only 'latency_budget'"):
        load_recipe(path, {"merge.budget": 0.5, "merge.latency_budget": 0.6})
