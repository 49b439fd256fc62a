"""Errors at the command line name its options, in place of the fields of recipes."""

import pytest

from hf_layerfuse import FusionRecipe, RecipeError
from hf_layerfuse.cli_options import OF_FUSION, OF_RECIPE, check_options, in_options
from hf_layerfuse.errors import DataError
from hf_layerfuse.recipe import SECTIONS, recipe_of

REST = {"model": "m", "task": "causal-lm", "output_dir": "o", "data": {}, "fusion": {"keep_layers": 2}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fusion": {"keep_layers": 0}}, "--fusion.keep_layers=0 leaves no layer: use 1 or more."),
        ({"fusion": {"keep_layers": "x"}}, "--fusion.keep_layers='x': use a whole number."),
        ({"heal": {"homotopy_strength": "x"}}, "--heal.homotopy_strength='x': use a number or 'auto'."),
        ({"heal": {"schedule": "x"}}, "--heal.schedule='x': use 'one-shot', 'uniform' or 'exponential'."),
        ({"fusion": {}}, "set --fusion.keep_layers (for example 8), --fusion.ratio (0.5), --fusion.max_parameters"),
        (
            {"fusion": {"keep_layers": 2, "cluster": "global"}},
            "--fusion.mode='depth' with --fusion.cluster='global' would merge distant layers into one that runs in the "
            "place of neither: use --fusion.cluster='auto' or 'adjacent', or --fusion.mode='share'.",
        ),
        ({"heal": {"steps": -1}}, "--heal.steps=-1: use 0 to skip healing"),
        (
            {"heal": {"schedule": "uniform", "steps": 1}},
            "heals in each of --heal.rounds=3, and there are --heal.steps=",
        ),
        ({"data": {"config": "c"}}, "--data.config='c' needs a Hub data set, and --data.name is not set: set it"),
        ({"fusion": {"keep_layers": 2, "mod": "depth"}}, "section fusion has no field 'mod'. Did you mean 'mode'? Its"),
        (
            {"fusoin": {}},
            "the recipe has no field 'fusoin'. Did you mean 'fusion'? Its fields are: model, task, output",
        ),
    ],
)
def test_a_recipe_is_refused_in_options(changes, message) -> None:
    """Fields with a section or a value become options, and names in a file stay as they are."""
    with pytest.raises(RecipeError) as refused:
        recipe_of({**REST, **changes}, "x.yaml")
    assert message in in_options(refused.value, OF_RECIPE)


def test_the_fields_of_a_fusion_have_no_section() -> None:
    with pytest.raises(RecipeError) as refused:
        FusionRecipe(keep_layers=0)
    assert in_options(refused.value, OF_FUSION).startswith("--keep_layers=0 leaves no layer")
    late = RecipeError("keep_layers=40 of the model's 6 fuses nothing: a mode and a rank are words here.")
    expected = "--keep_layers=40 of the model's 6 fuses nothing: a mode and a rank are words here."
    assert in_options(late, OF_FUSION, FusionRecipe) == expected
    assert in_options(late, OF_RECIPE, FusionRecipe) == expected.replace("--", "--fusion.")


def test_paths_are_not_options() -> None:
    """Names inside paths and file names stay as they are."""
    text = "/home/data.train/x and data.train.txt: no such file; set data.train, or data.test."
    expected = text.replace("set data.train, or data.test", "set --data.train, or --data.test")
    assert in_options(DataError(text), OF_RECIPE) == expected


@pytest.mark.parametrize(
    ("option", "close"),
    [
        ("--fusion.keep_layer", "--fusion.keep_layers"),
        ("--keep_layers", "--fusion.keep_layers"),
        ("--steps=3", "--heal.steps"),
        ("--fusoin.mode", "--fusion.mode"),
        ("--output", "--output_dir"),
    ],
)
def test_the_closest_option_is_named(option, close) -> None:
    with pytest.raises(RecipeError, match=f"is not an option. Did you mean {close}?"):
        check_options([option, "3"], OF_RECIPE, "hf-layerfuse run", ())


def test_earlier_names_are_options() -> None:
    """Names of fields in earlier releases are accepted, as they are in recipes."""
    given = [f"--{section}.{name}" for section, kind in SECTIONS.items() for name in kind._renamed]
    assert given
    check_options(given, OF_RECIPE, "hf-layerfuse run", ())
