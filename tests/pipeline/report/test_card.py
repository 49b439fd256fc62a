"""A model card lists the changes, has the licence of the original, and contains the recipe of the run."""

import dataclasses
import re

import pytest
import yaml
from helpers import ROOT
from huggingface_hub import ModelCard
from runs import MERGED, PLAN, REPORT, RESULTS, SHARED, SMALLER, healed_by, recipe, results

from hf_layerfuse import Drop, Fuse, FusionRecipe, MergeRecipe, Plan
from hf_layerfuse.pipeline.report.card import licence_of, model_card
from hf_layerfuse.plan.words import change_table
from hf_layerfuse.recipe import Recipe, load_recipe


def test_says_what_became_of_what():
    """The plan is a table with a row for unchanged blocks; the first sentence has size, speed and quality."""
    text = model_card(recipe(), PLAN, RESULTS, "accelerate launch fuse.py x.yaml").content
    assert "75% of the parameters, 1.50 times as fast at batch 8, accuracy 0.875 (before: 0.9)" in text
    assert "| Layers 2, 3 | become one, which runs once (freeze) |" in text
    assert "| The attention of layer 7 | dropped |" in text
    assert "| All others | unchanged |" in text
    assert "It was not retrained" in text
    better = dataclasses.replace(SMALLER, metrics={"accuracy": 0.89})
    healed = model_card(recipe(), PLAN, results(healed=better), "x").content
    assert "accuracy 0.89 (before: 0.9)" in healed
    assert "It was not retrained" not in healed
    worse = healed_by(dataclasses.replace(REPORT, best_step=0))
    kept = model_card(recipe(), PLAN, results(rounds=worse), "x").content
    assert "did not lower the validation loss" in kept
    assert "did not lower the validation loss" not in healed


def test_blocks_that_stay_have_a_row():
    """Unchanged blocks have a row, even if each layer has an edit of its attention."""
    halves = Plan("bert", 4, (*(Drop("attention", layer) for layer in range(3)), Fuse("mlp", (0, 1, 2, 3))))
    assert change_table(halves)[-1] == ["All others", "unchanged"]
    whole = Plan("bert", 4, (Fuse("layer", (0, 1)), Fuse("layer", (2, 3))))
    assert change_table(whole)[-1][0] == "Layers 2, 3"


def test_merged_convolutions_have_a_row_each():
    made = recipe(fusion=None, merge=MergeRecipe(latency_budget=0.5), task="image-classification")
    text = model_card(made, MERGED, RESULTS, "x").content
    assert "## Changes to its 3 convolutions" in text
    assert "| Convolutions 1, 2 | become one, made of 2 |" in text
    assert "| All others | batch norms folded |" in text


def test_metrics_are_in_the_model_index():
    """The Hub reads the last stage from the card, with task, data and base model."""
    data = ModelCard(model_card(recipe(), PLAN, RESULTS, "x").content).data
    [evaluation] = data.eval_results
    assert (evaluation.metric_type, evaluation.metric_value) == ("accuracy", 0.875)
    assert (evaluation.dataset_name, evaluation.dataset_config, evaluation.dataset_split) == (
        "glue",
        "sst2",
        "validation",
    )
    assert data.base_model == "user/model"
    assert data.pipeline_tag == "text-classification"
    assert "layer-fusion" in data.tags


def test_the_recipe_in_the_card_makes_the_same_run(tmp_path):
    """The folded section of the card is a recipe file with every field."""
    made = recipe(seed=3, fusion=FusionRecipe(ratio=0.5, mode="share", rank=4))
    text = model_card(made, PLAN, RESULTS, "accelerate launch fuse.py x.yaml --seed 3").content
    [found] = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    (tmp_path / "recipe.yaml").write_text(found)
    assert load_recipe(tmp_path / "recipe.yaml") == made
    assert yaml.safe_load(found).keys() >= {field.name for field in dataclasses.fields(Recipe)} - {"merge", "collapse"}
    assert "```bash\naccelerate launch fuse.py x.yaml --seed 3\n```" in text


@pytest.mark.parametrize(
    ("front", "found"),
    [
        ("license: apache-2.0\nlanguage: en", {"license": "apache-2.0"}),
        (
            "license: other\nlicense_name: own\nlicense_link: LICENSE",
            {"license": "other", "license_name": "own", "license_link": "LICENSE"},
        ),
        ("language: en", {}),
        ("license: [", {}),
    ],
)
def test_the_licence_is_that_of_the_original(tmp_path, front, found):
    """The licence comes from the card of the original; without one, the card says so."""
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n# A model\n")
    assert licence_of(str(tmp_path)) == found
    card = model_card(recipe(), PLAN, RESULTS, "x", licence=licence_of(str(tmp_path)))
    assert ModelCard(card.content).data.to_dict().get("license") == found.get("license")
    assert ("states no licence" in card.content) == (not found)


def test_a_model_without_a_card_has_no_licence(tmp_path):
    """A path without a card, or a Hub name that cannot be reached, is not an error."""
    assert licence_of(str(tmp_path)) == {}
    assert licence_of("nobody/nothing") == {}


def test_use_is_what_loads_it():
    """Stock checkpoints load without imports. Others need the library, or trust in the code beside the weights."""
    stock = model_card(recipe(), Plan("bert", 12, (Fuse("layer", (2, 3)),)), RESULTS, "x").content
    assert "import hf_layerfuse" not in stock
    assert "It is a stock checkpoint" in stock
    library = model_card(recipe(), SHARED, RESULTS, "x").content
    assert "import hf_layerfuse" in library
    assert "does not make the model faster" in library
    code = model_card(recipe(with_code=True), SHARED, RESULTS, "x").content
    assert "import hf_layerfuse" not in code
    assert 'from_pretrained("path/to/this/model", trust_remote_code=True)' in code


def test_shipped_cards_are_of_this_form():
    """Cards in model_cards/ have the form of a new card, and their pictures exist."""
    cards = sorted((ROOT / "model_cards").glob("*/README.md"))
    assert len(cards) >= 3
    for path in cards:
        card = ModelCard.load(path)
        assert card.data.eval_results
        assert card.data.license or "states no licence" in card.content
        assert "Full recipe" in card.content
        for picture in re.findall(r"!\[[^]]+\]\(([^)]+)\)", card.content):
            assert (path.parent / picture).is_file()
