"""The card of a run lists the changes, has the licence of the original, and a recipe that anyone can run."""

import dataclasses
import re

import pytest
import yaml
from helpers import ROOT
from huggingface_hub import ModelCard
from runs import (
    MERGED,
    PLAN,
    REPORT,
    RESULTS,
    SHARED,
    SMALLER,
    files_named_by,
    healed_by,
    machine_paths,
    recipe,
    results,
)

from hf_layerfuse import Drop, Fuse, FusionRecipe, HealRecipe, MergeRecipe, Plan, PlanNotes, RefitReport
from hf_layerfuse.pipeline.report.portable import PLACEHOLDER
from hf_layerfuse.pipeline.report.run_card import run_card
from hf_layerfuse.pipeline.report.sections import licence_of
from hf_layerfuse.plan.notes import CandidatePlan
from hf_layerfuse.plan.words import change_table
from hf_layerfuse.recipe import HubRecipe, Recipe, load_recipe


def test_says_what_became_of_what():
    """The plan is a table with a row for unchanged blocks; the first sentence has size, speed and quality."""
    text = run_card(recipe(), PLAN, RESULTS).content
    assert "75% of the parameters, 1.50 times as fast at batch 8, accuracy 0.875 (before: 0.9)" in text
    assert "| Layers 2, 3 | become one, which runs once (freeze) |" in text
    assert "| The attention of layer 7 | dropped |" in text
    assert "| All others | unchanged |" in text
    assert "It was not retrained" in text
    better = dataclasses.replace(SMALLER, metrics={"accuracy": 0.89})
    healed = run_card(recipe(), PLAN, results(healed=better)).content
    assert "accuracy 0.89 (before: 0.9)" in healed
    assert "It was not retrained" not in healed
    worse = healed_by(dataclasses.replace(REPORT, best_step=0))
    kept = run_card(recipe(), PLAN, results(rounds=worse)).content
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
    text = run_card(made, MERGED, RESULTS).content
    assert "## Changes to its 3 convolutions" in text
    assert "| Convolutions 1, 2 | become one, made of 2 |" in text
    assert "| All others | batch norms folded |" in text


def test_metrics_are_in_the_model_index():
    """The Hub reads the last stage from the card, with task, data and base model."""
    data = ModelCard(run_card(recipe(), PLAN, RESULTS).content).data
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
    """The folded section of the card is a recipe file with every field, which the command runs."""
    made = recipe(seed=3, fusion=FusionRecipe(ratio=0.5, mode="share", rank=4))
    text = run_card(made, PLAN, RESULTS).content
    [found] = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    (tmp_path / "recipe.yaml").write_text(found)
    assert load_recipe(tmp_path / "recipe.yaml") == made
    assert yaml.safe_load(found).keys() >= {field.name for field in dataclasses.fields(Recipe)} - {"merge", "collapse"}
    assert "```bash\nhf-layerfuse run recipe.yaml\n```" in text
    assert PLACEHOLDER not in text.partition("## How")[2]
    several = run_card(made, PLAN, results(environment={"processes": "4"})).content
    assert "```bash\naccelerate launch --num_processes 4 -m hf_layerfuse recipe.yaml\n```" in several


def test_nothing_in_the_card_belongs_to_one_machine(tmp_path, monkeypatch):
    """Paths are placeholders, which the text explains; a repeated run publishes nothing and sends nothing."""
    model, data = tmp_path / "own-bert", tmp_path / "data"
    model.mkdir()
    files = {"name": None, "config": None, "train": str(data / "train" / "a.csv"), "test": str(data / "test" / "a.csv")}
    monkeypatch.chdir(model)
    made = recipe(
        model=str(model),
        data=files,
        output_dir="../deep/small",
        fusion=FusionRecipe(latency_budget=0.5, tables=str(tmp_path / "tables")),
        heal=HealRecipe(log_with="tensorboard", log_dir=str(tmp_path / "logs")),
        hub=HubRecipe(push_to_hub="user/small", private=True, revision="v1"),
    )
    text = run_card(made, PLAN, RESULTS).content
    assert not machine_paths(text)
    assert not files_named_by(text)
    assert "# own-bert, fused" in text
    assert "on local data (test)" in text
    assert "replace each `path/to/...` with your own" in text
    [found] = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    tree = yaml.safe_load(found)
    assert (tree["model"], tree["output_dir"]) == ("path/to/own-bert", "small")
    assert (tree["data"]["train"], tree["data"]["test"]) == ("path/to/train/a.csv", "path/to/test/a.csv")
    assert (tree["fusion"]["tables"], tree["heal"]["log_dir"], tree["heal"]["log_with"]) == ("tables", "logs", None)
    assert tree["hub"] == dataclasses.asdict(HubRecipe())
    assert 'from_pretrained("user/small", revision="v1")' in text
    data = ModelCard(text).data
    assert (data.base_model, data.datasets, data.eval_results) == (None, None, None)
    assert "on own texts (test)" in run_card(made, PLAN, RESULTS, test_data="own texts").content


def test_files_are_named_if_they_are_beside_the_card():
    """The records of the run, and a file with the licence."""
    licence = {"license": "other", "license_name": "own", "license_link": "LICENSE"}
    alone = run_card(recipe(), PLAN, RESULTS, licence=licence)
    assert not files_named_by(alone.content)
    assert ModelCard(alone.content).data.to_dict().get("license_link") is None
    text = run_card(recipe(), PLAN, RESULTS, licence=licence, beside=["results.json", "plan.json", "LICENSE"]).content
    assert files_named_by(text) == {"plan.json", "results.json"}
    assert ModelCard(text).data.to_dict()["license_link"] == "LICENSE"
    elsewhere = licence | {"license_link": "https://example.com/LICENSE"}
    linked = run_card(recipe(), PLAN, RESULTS, licence=elsewhere).content
    assert ModelCard(linked).data.to_dict()["license_link"] == "https://example.com/LICENSE"


def test_candidates_and_refit_have_a_section():
    """The best candidates come first; the section is absent without calibration data."""
    losing = [CandidatePlan((Drop("layer", layer),), loss=1.0 + layer) for layer in range(7)]
    notes = PlanNotes(refit=RefitReport(0.5, 0.25, True), competition=(*losing, CandidatePlan(PLAN.edits, loss=0.25)))
    text = run_card(recipe(), dataclasses.replace(PLAN, notes=notes), RESULTS).content
    assert "The closed-form refit changed the loss from 0.5 to 0.25." in text
    first, second = re.findall(r"^\| (.*) \| ([\d.]+) \|$", text.partition("## Calibration")[2], flags=re.MULTILINE)[:2]
    assert first == ("layers 2, 3: become one, which runs once (freeze); the attention of layer 7: dropped", "0.25")
    assert second == ("layer 0: dropped", "1")
    assert "3 more candidates had higher losses." in text
    assert "## Calibration" not in run_card(recipe(), PLAN, RESULTS).content


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
    card = run_card(recipe(), PLAN, RESULTS, licence=licence_of(str(tmp_path)))
    assert ModelCard(card.content).data.to_dict().get("license") == found.get("license")
    assert ("states no licence" in card.content) == (not found)


def test_a_model_without_a_card_has_no_licence(tmp_path):
    """A path without a card, or a Hub name that cannot be reached, is not an error."""
    assert licence_of(str(tmp_path)) == {}
    assert licence_of("nobody/nothing") == {}


def test_use_is_what_loads_it():
    """Stock checkpoints load without imports. Others need the library, or trust in the code beside the weights."""
    stock = run_card(recipe(), Plan("bert", 12, (Fuse("layer", (2, 3)),)), RESULTS).content
    assert "import hf_layerfuse" not in stock
    assert "It is a stock checkpoint" in stock
    library = run_card(recipe(), SHARED, RESULTS).content
    assert "import hf_layerfuse" in library
    assert "does not make the model faster" in library
    code = run_card(recipe(with_code=True), SHARED, RESULTS).content
    assert "import hf_layerfuse" not in code
    assert 'from_pretrained("path/to/out", trust_remote_code=True)' in code


def test_shipped_cards_are_of_this_form():
    """Cards in model_cards/ have the form of a new card, and all files that they name exist."""
    cards = sorted((ROOT / "model_cards").glob("*/README.md"))
    assert len(cards) >= 3
    for path in cards:
        card = ModelCard.load(path)
        assert card.data.license or "states no licence" in card.content
        assert "Full recipe" in card.content
        assert not machine_paths(card.content)
        for file in files_named_by(card.content):
            assert (path.parent / file).is_file(), file
