"""Verification passes good models, refuses unusable ones, and warns of results that are probably unusable."""

import copy
import logging

import pytest
import torch
from families import family_config
from helpers import LAYERS, heads_of, in_turn, tiny_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2ForSequenceClassification

from hf_layerfuse import (
    AutoFusedModel,
    CheckpointError,
    Drop,
    Fuse,
    FusionRecipe,
    LayerFuseWarning,
    Plan,
    PlanError,
    UnsupportedModelError,
    VerificationError,
    apply,
    expand,
    fuse,
    plan_fusion,
    verify,
)
from hf_layerfuse.evaluation.dummy_inputs import dummy_inputs
from hf_layerfuse.models.verify import prediction, warn_if_useless

DEPTH = (Fuse("layer", (1, 2)),)
SHARE = (Fuse("layer", (1, 3), "share"),)


def fused(model_type, edits=SHARE, head=None, **changes):
    return apply(tiny_model(model_type, head, **changes), Plan(model_type, LAYERS, edits))


def logits(model, inputs):
    with torch.inference_mode():
        return prediction(model(**inputs))


def modes(model):
    return {name: module.training for name, module in model.named_modules()}


@pytest.mark.parametrize(("model_type", "edits"), in_turn([DEPTH, SHARE]))
def test_good_results_pass(tmp_path, model_type, edits):
    """A good result reloads without a difference: from a given path, with given inputs and labels, in half
    precision."""
    head = heads_of(model_type)[-1]
    model = fused(model_type, edits, head)
    model.save_pretrained(tmp_path)
    inputs = dummy_inputs(model, 3, 7, seed=1)
    for report in (verify(model), verify(model, tmp_path), verify(model, inputs={**inputs, "labels": None})):
        assert report["reload"] == 0
        assert report.get("cache", 0) < 1e-4
    half = apply(tiny_model(model_type, head).to(torch.bfloat16), Plan(model_type, LAYERS, edits))
    assert verify(half)["reload"] == 0


def test_a_changed_weight_on_disk_is_noticed(tmp_path):
    """One changed weight on disk fails, and the restored file passes."""
    model = fused("gpt2")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    good = load_file(file)
    bad = {name: tensor.clone() for name, tensor in good.items()}
    name = next(name for name in bad if name.endswith("h.4.mlp.c_fc.weight"))
    bad[name][0, 0] += 0.01
    save_file(bad, file, {"format": "pt"})
    with pytest.raises(VerificationError, match=r"differ by up to .* after saving and loading"):
        verify(model, tmp_path)
    save_file(good, file, {"format": "pt"})
    assert verify(model, tmp_path)["reload"] == 0


@pytest.mark.parametrize("edits", [DEPTH, SHARE], ids=["depth", "share"])
def test_weights_that_are_missing_or_left_over_are_noticed(tmp_path, edits):
    """A file with a missing or an unused weight fails with the name of the weight."""
    model = fused("gpt2", edits)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    save_file({**weights, "transformer.h.1.attn.extra.weight": torch.ones(2)}, file, {"format": "pt"})
    with pytest.raises(VerificationError, match=r"does not match its config: .*h\.1\.attn\.extra\.weight"):
        verify(model, tmp_path)
    lost = next(name for name in weights if name.endswith("h.2.mlp.c_fc.bias"))
    save_file({name: tensor for name, tensor in weights.items() if name != lost}, file, {"format": "pt"})
    with pytest.raises((VerificationError, CheckpointError), match=r"h\.2\.mlp\.c_fc\.bias"):
        verify(model, tmp_path)


@pytest.mark.parametrize("head", ["GPT2LMHeadModel", "LlamaForCausalLM"])
def test_wrong_layer_indices_are_noticed(head):
    """Two layers that write to the same cache entry fail, although nothing differs without a cache."""
    model = fused("gpt2" if head.startswith("GPT2") else "llama", SHARE, head)
    model.config.use_cache = False
    assert verify(model)["cache"] < 1e-4
    layers = model.transformer.h if head.startswith("GPT2") else model.model.layers
    attention = [layer.attn if head.startswith("GPT2") else layer.self_attn for layer in layers]
    attention[3].layer_idx = attention[1].layer_idx
    with pytest.raises(VerificationError, match=r"decoding with a cache differs .* layer indices are wrong"):
        verify(model)


def test_weights_that_were_untied_are_not_lost():
    """If other code unties a shared weight, both tensors are saved and reloaded."""
    model = fused("gpt2", head="GPT2Model")
    layer = model.h[3].mlp.c_fc
    layer.weight = nn.Parameter(layer.weight.detach() + 1)
    assert verify(model)["reload"] == 0


@pytest.mark.parametrize("num_labels", [1, 2, 3])
def test_where_the_weights_lie_in_memory_does_not_matter(tmp_path, num_labels):
    """Weights mapped from a file are not aligned in memory, which changes rounding; good models still pass."""
    model = fused("bert", head="BertForSequenceClassification", num_labels=num_labels)
    assert verify(model)["reload"] == 0
    model.save_pretrained(tmp_path)
    loaded = AutoFusedModel.from_pretrained(tmp_path)
    assert any(parameter.data_ptr() % 64 for parameter in loaded.parameters()), "aligned: this test is blind"
    assert verify(loaded)["reload"] == verify(loaded, tmp_path)["reload"] == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_outputs_that_are_not_finite_are_noticed(model_type, value):
    """NaN or infinite outputs fail."""
    model = fused(model_type)
    norm = [parameter for name, parameter in model.named_parameters() if "norm" in name.lower() or "ln_" in name][-1]
    norm.data.fill_(value)
    with pytest.raises(VerificationError, match="NaN or infinite"):
        verify(model)


def test_overflow_of_a_data_type_is_noticed():
    """`fuse` refuses to return a fused weight that overflows a half-precision type."""
    model = tiny_model("gpt2", "GPT2Model").half()
    for layer, value in ((1, -4e4), (2, 4e4), (3, 4e4)):
        model.h[layer].load_state_dict(model.h[1].state_dict())
        model.h[layer].mlp.c_proj.bias.data.fill_(value)
    with pytest.raises(VerificationError, match="NaN or infinite"):
        fuse(model, keep_layers=4, operator="telescope")


def test_verification_leaves_every_mode(monkeypatch):
    """Every submodule keeps its training or evaluation mode, also after a failure."""
    model = fused("bert").train()
    model.get_submodule("bert.encoder.layer.2").eval()
    before = modes(model)
    assert len(set(before.values())) == 2
    verify(model)
    assert modes(model) == before
    monkeypatch.setattr(model, "save_pretrained", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        verify(model)
    assert modes(model) == before


def test_fuse_verifies_unless_told_not_to(monkeypatch):
    """`fuse` returns nothing that fails verification; `check=False` skips the check."""

    def failing(model, inputs=None):
        raise VerificationError("seen")

    monkeypatch.setattr("hf_layerfuse.api.verify", failing)
    model = tiny_model("gpt2")
    with pytest.raises(VerificationError, match="seen"):
        fuse(model, keep_layers=3)
    assert fuse(model, keep_layers=3, check=False).config.num_hidden_layers == 3


LABELLED = [
    ("bert", "BertForSequenceClassification"),
    ("distilbert", "DistilBertForTokenClassification"),
    ("vit", "ViTForImageClassification"),
    ("gpt2", "GPT2LMHeadModel"),
    ("qwen3", "Qwen3ForCausalLM"),
]


@pytest.mark.parametrize(("model_type", "head"), LABELLED)
def test_warns_where_labels_say_worse_than_chance(model_type, head, caplog):
    """There is a warning with both losses if the labels are the least likely classes, and none if they are the most
    likely."""
    model = tiny_model(model_type, head, **({} if "LM" in head else {"num_labels": 5}))
    inputs = dummy_inputs(model, 4)
    plain = {"keep_layers": 5, "operator": "freeze", "cluster": "adjacent", "refit": "none", "effort": "low"}
    scores = logits(fuse(model, **plain), inputs)
    best, worst = scores.argmax(-1), scores.argmin(-1)
    if "LM" in head:  # position i is scored by what follows it
        first = torch.full((4, 1), -100)
        best, worst = (torch.cat([first, labels[:, :-1]], dim=1) for labels in (best, worst))
    same = fuse(model, **plain, batches=[{**inputs, "labels": best}])
    torch.testing.assert_close(logits(same, inputs), scores, rtol=0, atol=0)
    classes = 64 if "LM" in head else 5
    with (
        caplog.at_level(logging.WARNING, "hf_layerfuse"),
        pytest.warns(LayerFuseWarning, match=rf"worse than chance .* loss \d.* over {classes} classes") as caught,
    ):
        fuse(model, **plain, batches=[{**inputs, "labels": worst}])
    assert caught[0].filename == __file__, "the warning does not point at the call of fuse"
    assert "worse than chance" in caplog.text


@pytest.mark.parametrize("padded", [False, True])
def test_warns_without_labels_where_the_content_is_lost(padded):
    """There is a warning if outputs fit other inputs better than their own, and none if they fit their own."""
    model = tiny_model("gpt2", "GPT2Model")
    for name, parameter in model.named_parameters():
        if name.startswith("h.1."):  # a layer that does nothing
            parameter.data.zero_()
    fused = apply(model, Plan("gpt2", LAYERS, (Drop("layer", 1),)))
    batch = {"input_ids": torch.arange(3, 7)[:, None].expand(4, 8)}
    if padded:
        batch["attention_mask"] = torch.tensor([[1] * 5 + [0] * 3]).repeat(4, 1)
    warn_if_useless(model, fused, [batch])
    fused.wte.weight.data[3:7] = fused.wte.weight.data[3:7].roll(1, 0)  # outputs moved by one input
    with pytest.warns(LayerFuseWarning, match=r"worse than chance .* for its inputs, 1\.00 with those for other"):
        warn_if_useless(model, fused, [batch])
    # a single input has no other to compare with
    warn_if_useless(model, fused, [{name: tensor[:1] for name, tensor in batch.items()}])
    warn_if_useless(model, fused, None)


@pytest.mark.parametrize(
    ("changes", "labels"),
    [
        ({"num_labels": 1}, torch.full((4,), 1e6)),
        ({"num_labels": 3, "problem_type": "regression"}, torch.full((4, 3), 1e6)),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, torch.full((4, 3), 1e6)),
    ],
)
def test_losses_without_classes_are_not_judged_by_chance(changes, labels):
    """A regression loss has no chance level, so the directions of the outputs are compared if they have any."""
    model = tiny_model("bert", "BertForSequenceClassification", **changes)
    layers = model.bert.encoder.layer
    layers[3].load_state_dict(layers[2].state_dict())
    fuse(model, keep_layers=5, mode="share", effort="low", batches=[{**dummy_inputs(model, 4), "labels": labels}])


def test_warns_of_a_plan_that_does_nothing():
    """There is a warning if the result is as large as the original."""
    model = tiny_model("gpt2")
    with pytest.warns(LayerFuseWarning, match="removed no parameters"):
        warn_if_useless(model, apply(model, Plan("gpt2", LAYERS)), None)


def damaged(model):
    model.get_parameter("h.3.mlp.c_fc.bias").data[5] = float("nan")
    return model


def with_attribute(name, value):
    def change(model):
        setattr(model, name, value)
        return model

    return change


def on_meta(model):
    with torch.device("meta"):
        return type(model)(model.config)


REFUSED = [
    (damaged, r"h\.3\.mlp\.c_fc\.bias holds NaN or infinite values: .*earlier"),
    (with_attribute("hf_quantizer", object()), "quantised: fuse the full-precision model"),
    (on_meta, "on the meta device: load the model without offloading"),
    (lambda model: apply(model, Plan("gpt2", LAYERS, SHARE)), "FusedGPT2Model is already fused: .*original"),
    (lambda model: apply(model, Plan("gpt2", LAYERS, (Drop("attention", 2),))), "already fused"),
]


@pytest.mark.parametrize(
    ("change", "message"), REFUSED, ids=["nan", "quantised", "meta", "fused", "fused-without-attention"]
)
def test_models_that_cannot_be_fused_are_refused(change, message):
    """Each model state that would give a wrong result is refused before planning and before applying, with the next
    step."""
    model = change(tiny_model("gpt2", "GPT2Model"))
    recipe = FusionRecipe(keep_layers=3)
    for attempt in (
        lambda: fuse(model, recipe),
        lambda: plan_fusion(model, recipe),
        lambda: apply(model, Plan("gpt2", LAYERS, DEPTH)),
    ):
        with pytest.raises(UnsupportedModelError, match=message):
            attempt()


def test_a_fused_model_can_be_fused_again_when_expanded():
    """The advice in the error works: the result of `expand` can be fused."""
    again = fuse(expand(fused("gpt2")), keep_layers=3)
    assert again.config.num_hidden_layers == 3


def test_a_config_is_refused():
    """A config has no weights to fuse."""
    with pytest.raises(UnsupportedModelError, match="GPT2Config is not a model: pass a model with its weights"):
        fuse(family_config("gpt2"), keep_layers=3)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan("bert", LAYERS, SHARE), "the plan is for 'bert', the model is 'roberta'"),
        (Plan("roberta", LAYERS + 1, SHARE), "the plan is for 7 layers, the model has 6"),
        (Plan("roberta", 12), "the plan is for 12 layers, the model has 6"),
    ],
)
def test_plans_for_another_model_are_refused(plan, message):
    """A plan for another architecture, however similar, or for another depth is not applied."""
    model = tiny_model("roberta")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PlanError, match=message):
        apply(model, plan)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_decoder_that_takes_one_row():
    """GPT-2 with a classifier and no padding token reads one sequence at a time, as is the default in transformers."""
    config = family_config("gpt2", pad_token_id=None)
    model = GPT2ForSequenceClassification(config).eval()
    assert fuse(model, keep_layers=3).config.num_hidden_layers == 3


def test_batches_from_a_generator():
    """A generator serves both the plan and the check of the result, so a useless result is still reported."""
    model = tiny_model("gpt2", "GPT2LMHeadModel")
    inputs = dummy_inputs(model, 4)
    batches = ({**inputs, "labels": inputs["input_ids"]} for _ in range(2))
    with pytest.warns(LayerFuseWarning, match="worse than chance on the calibration batches: loss"):
        fuse(model, keep_layers=3, similarity="block_influence", effort="low", batches=batches)


def test_labels_that_are_no_classes_are_no_obstacle():
    """A body with labelled batches, and float labels of a regression, are checked without the labels."""
    for head, labels in (("BertModel", torch.tensor([0, 1])), ("BertForSequenceClassification", torch.rand(2, 2))):
        model = tiny_model("bert", head)
        before = model.config.to_dict()
        small = fuse(model, keep_layers=5, effort="low", batches=[{**dummy_inputs(model), "labels": labels}])
        assert model.config.to_dict() == before
        assert getattr(small.config, "problem_type", None) is None
