"""A user's model card is made of the report of a result and of a comparison with its original."""

import pytest
from helpers import tiny_model
from huggingface_hub import ModelCard
from runs import REPORT, files_named_by, machine_paths
from transformers import AutoModelForCausalLM

from hf_layerfuse import AutoFusedModel, CheckpointError, Comparison, DataError, fuse, model_card

pytestmark = pytest.mark.filterwarnings("ignore::hf_layerfuse.errors.LayerFuseWarning")  # no calibration data


@pytest.fixture(scope="module")
def pair():
    model = tiny_model("gpt2", "GPT2LMHeadModel")
    return model, fuse(model, keep_layers=4, check=False)


def compared(model, small) -> Comparison:
    return Comparison(
        metric="token perplexity",
        quality=(40.0, 42.5),
        difference=2.5,
        interval=(1.5, 3.5),
        verdict="worse",
        rows=12,
        parameters=(model.num_parameters(), small.num_parameters()),
        bytes=(400, 300),
        latency_ms={8: (20.0, 16.0)},
        speedup={8: 1.25},
        device="cpu x86_64",
    )


def test_card_of_a_comparison(pair):
    """The card has sizes, latency and quality with its interval, the changes, and the lines that load the model."""
    found = model_card(
        pair[1], compared(*pair), base_model="user/model", name="user/small", test_data="own texts", heal_report=REPORT
    )
    text = found.content
    assert "# user/model, fused" in text
    assert "1.25 times as fast at batch 8, token perplexity 42.5 (before: 40). It is a stock checkpoint" in text
    assert "## Before and after, on own texts" in text
    assert "| token perplexity | 40 | 42.5 | +2.5 (+1.5 to +3.5): worse |" in text
    assert "by a bootstrap over the same 12 rows" in text
    assert "## Changes to its 6 layers" in text
    assert "| All others | unchanged |" in text
    assert 'model = AutoModelForCausalLM.from_pretrained("user/small")' in text
    assert "Latency was measured on the machine named below." in text
    assert "device cpu x86_64" in text
    assert "states no licence" in text
    assert "no record of a retraining" not in text
    assert "a fair comparison is with an original after the same training" in text
    data = ModelCard(text).data
    assert (data.base_model, data.pipeline_tag, data.library_name) == ("user/model", "text-generation", "transformers")
    assert "layer-fusion" in data.tags
    assert not machine_paths(text)
    assert not files_named_by(text)


def test_card_of_a_report_alone(pair, tmp_path):
    """Without a comparison, the card has the sizes; without names, it says so and has placeholders."""
    text = model_card(pair[1]).content
    assert "# gpt2, fused" in text
    assert f"| parameters | {pair[0].num_parameters():,} | {pair[1].num_parameters():,} |" in text
    assert "perplexity" not in text
    assert "Latency" not in text
    assert "does not name the original" in text
    assert "no record of a retraining" in text
    assert 'from_pretrained("path/to/this-model")' in text
    local = model_card(pair[1], base_model=str(tmp_path), name=str(tmp_path / "small"))
    assert not machine_paths(local.content)
    assert 'from_pretrained("path/to/small")' in local.content
    assert local.data.base_model is None


def test_the_licence_is_that_of_the_original(pair, tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    found = model_card(pair[1], base_model=str(tmp_path))
    assert found.data.license == "mit"
    assert "states no licence" not in found.content


def test_a_lost_report_is_an_error_that_says_where_to_get_it(pair, tmp_path):
    """The report survives beside the weights only where it is saved."""
    pair[1].save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"has no fusion_report.*fusion_report\.save\(directory\)"):
        model_card(AutoModelForCausalLM.from_pretrained(tmp_path))
    pair[1].fusion_report.save(tmp_path)
    again = AutoFusedModel.from_pretrained(tmp_path)
    model_card(again).save(tmp_path / "README.md")
    assert ModelCard.load(tmp_path / "README.md").content == model_card(pair[1]).content


def test_a_comparison_of_another_model_is_an_error(pair):
    with pytest.raises(DataError, match=r"comparison is of a model with .* pass compare\(original, model"):
        model_card(pair[1], compared(pair[1], pair[0]))


def test_heads_without_a_task_load_with_their_auto_class_or_ours():
    """Question answering has an Auto class but no task here; some heads have no Auto class at all."""
    answering = fuse(tiny_model("bert", "BertForQuestionAnswering"), keep_layers=4, check=False)
    text = model_card(answering).content
    assert "AutoModelForQuestionAnswering.from_pretrained" in text
    assert "pipeline_tag" not in text
    heads = fuse(tiny_model("gpt2", "GPT2DoubleHeadsModel"), keep_layers=4, mode="share", check=False)
    lines = model_card(heads).content
    assert "from hf_layerfuse import AutoFusedModel" in lines
    assert "import hf_layerfuse  #" not in lines


@pytest.mark.parametrize("with_code", [False, True])
def test_fused_classes_need_the_library_or_their_code(with_code):
    shared = fuse(tiny_model("gpt2", "GPT2LMHeadModel"), keep_layers=4, mode="share", check=False)
    text = model_card(shared, with_code=with_code).content
    assert ("import hf_layerfuse  #" in text) != with_code
    assert ("trust_remote_code=True" in text) == with_code
    assert "does not make the model faster" in text
