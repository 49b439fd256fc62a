"""Models whose `per_layer_config` makes layers differ: its entries stay with their layers."""

import pytest
import torch
from helpers import some_batches
from transformers.models.step3p7.configuration_step3p7 import Step3p7TextConfig
from transformers.models.step3p7.modeling_step3p7 import Step3p7TextModel

from hf_layerfuse import Drop, Fuse, LayerFuseWarning, Plan, PlanError, apply, fuse
from hf_layerfuse.discovery import ensure_architecture
from hf_layerfuse.models.architectures import ARCHITECTURES, LayerArchitecture
from hf_layerfuse.pipeline.inspect import overview

TYPES = ("full_attention", "sliding_attention", "sliding_attention") * 2
TYPE = Step3p7TextConfig.model_type


@pytest.fixture(scope="module")
def model():
    """Step 3.7 with six heads in sliding-window attention, four in full attention, and a discovered table."""
    torch.manual_seed(0)
    config = Step3p7TextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_sliding_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=8,
        mlp_layer_types=["dense"] * 6,
        layer_types=list(TYPES),
        pad_token_id=1,
    )
    model = Step3p7TextModel(config).eval()
    with pytest.warns(LayerFuseWarning, match="was discovered"):
        ensure_architecture(model, LayerArchitecture, some_batches(model, 1))
    yield model
    del ARCHITECTURES[TYPE]


def heads(config):
    return [each.num_attention_heads for each in config.per_layer_config]


def states(model, batch):
    with torch.inference_mode():
        return model(**batch).last_hidden_state


def test_an_empty_plan_changes_nothing(model):
    """Without edits, outputs are equal bit for bit. The model can be inspected."""
    batch = some_batches(model, 1)[0]
    assert torch.equal(states(apply(model, Plan(TYPE, 6)), batch), states(model, batch))
    assert ["fuse()", "yes"] in overview(model)[0]


@pytest.mark.parametrize(
    ("edits", "kept"),
    [
        ((Drop("layer", 0),), (1, 2, 3, 4, 5)),
        ((Drop("layer", 2), Drop("layer", 3)), (0, 1, 4, 5)),
        ((Fuse("layer", (1, 2)),), (0, 1, 3, 4, 5)),
    ],
)
def test_entries_stay_with_their_layers(model, tmp_path, edits, kept):
    """After layers are dropped or fused, the stock class loads the result, and computes the same."""
    small = apply(model, Plan(TYPE, 6, edits))
    assert heads(small.config) == [4 if TYPES[i] == "full_attention" else 6 for i in kept]
    assert heads(model.config) == [4, 6, 6, 4, 6, 6]
    small.save_pretrained(tmp_path)
    loaded, batch = Step3p7TextModel.from_pretrained(tmp_path), some_batches(model, 1)[0]
    assert heads(loaded.config) == heads(small.config)
    assert torch.equal(states(loaded.eval(), batch), states(small.eval(), batch))


def test_only_layers_of_one_shape_are_fused(model):
    """A plan that fuses layers with different numbers of heads is refused; a search makes none."""
    with pytest.raises(PlanError, match="weights have different shapes, such as layers 0 and 1"):
        apply(model, Plan(TYPE, 6, (Fuse("layer", (0, 1)),)))
    small = fuse(model, keep_layers=4, operator="freeze", align="none", batches=some_batches(model, 2))
    assert len(heads(small.config)) == 4
