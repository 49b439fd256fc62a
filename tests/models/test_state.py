"""State that a smaller model keeps: generation config, frozen weights, per-layer fields of the config."""

import json

import pytest
import torch
from helpers import LAYERS, tiny_model
from transformers import AutoModelForCausalLM

from hf_layerfuse import AutoFusedModel, Drop, Fuse, Plan, apply, expand, fuse
from hf_layerfuse.evaluation.modes import checkpoint_activations

PLANS = {
    "depth": (Fuse("layer", (1, 2)), Drop("layer", 4)),
    "share": (Fuse("layer", (1, 3), "share"),),
    "part": (Drop("attention", 2),),
}


@pytest.mark.parametrize("name", PLANS)
def test_published_generation_configs_are_kept(tmp_path, name: str) -> None:
    """Thousands on the Hub set a temperature without sampling. Transformers loads those and saves them as they are."""
    tiny_model("gpt2", "GPT2LMHeadModel").save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "generation_config.json"
    published = json.loads(file.read_text()) | {"do_sample": False, "temperature": 0.9, "top_p": 0.6}
    file.write_text(json.dumps(published))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    made = apply(model, Plan("gpt2", LAYERS, PLANS[name]))
    for number, small in enumerate((made, expand(made), fuse(model, keep_layers=3))):
        small.save_pretrained(tmp_path / str(number))
        again = AutoFusedModel.from_pretrained(tmp_path / str(number)).generation_config
        assert (again.do_sample, again.temperature, again.top_p) == (False, 0.9, 0.6)


@pytest.mark.parametrize("name", PLANS)
def test_frozen_weights_stay_frozen(name: str) -> None:
    """Embeddings and whole layers; a fused layer is frozen where all its layers were."""
    model = tiny_model("llama", "LlamaForCausalLM")
    model.get_input_embeddings().requires_grad_(False)
    for layer in (0, 1, 2):
        model.model.layers[layer].requires_grad_(False)
    plan = Plan("llama", LAYERS, PLANS[name])
    made = apply(model, plan)
    assert not made.get_input_embeddings().weight.requires_grad
    assert made.lm_head.weight.requires_grad
    for layer, slot in zip(made.model.layers, plan.layout().slots, strict=True):
        trained = {parameter.requires_grad for _, parameter in layer.named_parameters()}
        if name != "share":  # a shared weight is frozen only where it is in each of its layers
            assert trained == {not set(slot.layers) <= {0, 1, 2}}
    assert all(parameter.requires_grad for parameter in apply(tiny_model("llama"), plan).parameters())


@pytest.mark.parametrize("name", PLANS)
def test_activation_checkpointing_stays_on(name: str) -> None:
    model = tiny_model("llama", "LlamaForCausalLM")
    checkpoint_activations(model, True)
    made = apply(model, Plan("llama", LAYERS, PLANS[name]))
    assert any(getattr(module, "gradient_checkpointing", False) for module in made.modules())
    loss = made.train()(input_ids=torch.ones(1, 4, dtype=torch.long), labels=torch.ones(1, 4, dtype=torch.long)).loss
    loss.backward()


def test_numbers_of_first_layers_follow() -> None:
    """Qwen2 counts the layers before the first one with a sliding window."""
    model = tiny_model("qwen2")
    assert model.config.max_window_layers == 3
    made = apply(model, Plan("qwen2", LAYERS, (Fuse("layer", (1, 2), operator="freeze", keep=1), Drop("layer", 4))))
    assert made.config.max_window_layers == 2
    assert made.config.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 2
