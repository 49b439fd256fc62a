"""The contract of architecture tables: it refuses wrong tables, naming table, layer and role, and passes right ones."""

import re

import pytest
import torch
import transformers
from families import FAMILIES, TINY, family_inputs, family_model, family_table
from helpers import some_batches, tiny_model
from torch import nn
from transformers import CONFIG_MAPPING

from hf_layerfuse import Drop, Plan, UnsupportedModelError, apply, fuse, refit
from hf_layerfuse.calibration.contract import check_contract
from hf_layerfuse.models.architectures import (
    ARCHITECTURES,
    BertArchitecture,
    Gemma2Architecture,
    Gemma3TextArchitecture,
    GPTNeoXArchitecture,
    GraniteArchitecture,
    LlamaArchitecture,
    OPTArchitecture,
    SmolLM3Architecture,
    ZeroBlock,
)


class NormBehindSum(LlamaArchitecture):
    post_norm = True


class NormInFrontOfBert(BertArchitecture):
    post_norm = False


class SwappedNorms(LlamaArchitecture):
    attention = {**LlamaArchitecture.attention, "norm": LlamaArchitecture.mlp["norm"]}
    mlp = {**LlamaArchitecture.mlp, "norm": LlamaArchitecture.attention["norm"]}


class NoMultiplier(GraniteArchitecture):
    between = {}


class NoNormBehindAttention(Gemma2Architecture):
    between = {"mlp": Gemma2Architecture.between["mlp"]}


class NoNormBehindMLP(Gemma3TextArchitecture):
    between = {"attention": Gemma3TextArchitecture.between["attention"]}


class NoNorms(Gemma3TextArchitecture):
    between = {}


class ForgottenList(SmolLM3Architecture):
    per_layer_config = ("layer_types",)


class Sequential(GPTNeoXArchitecture):
    parallel = False


class Zeros(nn.Module):
    def forward(self, hidden_states):
        return hidden_states.new_zeros(*hidden_states.shape[:-1], 48)


class BiasThatStays(OPTArchitecture):
    """A zero in front of the output projection leaves its bias."""

    skip = {**OPTArchitecture.skip, "mlp": {"final_layer_norm": nn.Identity, "fc1": Zeros}}


class PlaceholderOfAnotherWidth(OPTArchitecture):
    skip = {**OPTArchitecture.skip, "mlp": {"final_layer_norm": nn.Identity, "fc1": ZeroBlock}}


class IdentityAsPlaceholder(LlamaArchitecture):
    """An MLP that adds its input."""

    skip = {**LlamaArchitecture.skip, "mlp": {"post_attention_layernorm": nn.Identity, "mlp": nn.Identity}}


class OutAsQueries(LlamaArchitecture):
    attention = {**LlamaArchitecture.attention, "q": "self_attn.o_proj"}


class InputOfOut(LlamaArchitecture):
    mlp = {**LlamaArchitecture.mlp, "in": "mlp.down_proj"}


# table -> model, and the words with which the contract refuses the table
FAULTS = {
    NormBehindSum: (lambda: tiny_model("llama"), "in layer 5, .* of attention .*`post_norm`"),
    NormInFrontOfBert: (lambda: tiny_model("bert"), "in layer 5, .* of attention .*`post_norm`"),
    SwappedNorms: (lambda: tiny_model("llama"), "in layer 5, 'q' of attention does not read what the table says"),
    NoMultiplier: (lambda: family_model("granite"), "in layer 5, .*'out' of attention is not .*check .*`between`"),
    NoNormBehindAttention: (lambda: family_model("gemma2"), "in layer 4, .*'out' of attention is not .*`between`"),
    NoNormBehindMLP: (lambda: family_model("gemma3_text"), "in layer 4, .*'out' of mlp is not .*`between`"),
    ForgottenList: (lambda: family_model("smollm3"), r"config\.no_rope_layers has 6 entries, one per layer"),
    Sequential: (
        lambda: family_model("gpt_neox"),
        "in layer 5, .*'out' of attention is not the stream after attention: check .*`parallel`",
    ),
    BiasThatStays: (
        lambda: family_model("opt"),
        "in layer 5, the placeholders in `skip` of mlp still add to the stream",
    ),
    PlaceholderOfAnotherWidth: (
        lambda: family_model("opt"),
        "in layer 5, the placeholders in `skip` of mlp cannot run",
    ),
    IdentityAsPlaceholder: (lambda: tiny_model("llama"), "in layer 5, the placeholders in `skip` of mlp still add"),
    OutAsQueries: (lambda: tiny_model("llama"), "in layer 5, 'q' of attention does not read"),
    InputOfOut: (lambda: tiny_model("llama"), "in layer 5, 'in' of mlp does not read"),
}


@pytest.mark.parametrize("table", FAULTS)
def test_silent_faults_are_refused(table):
    """A wrong table, with which refits aim at the wrong place, is refused by its name, with the layer and the role."""
    make, words = FAULTS[table]
    model = make()
    with pytest.raises(UnsupportedModelError, match=words) as refused:
        check_contract(model, some_batches(model, 1), table())
    assert str(refused.value).startswith(f"{table.__name__}, the table of {table.model_type!r}, does not describe")


@pytest.mark.parametrize(
    ("origin", "step"),
    [
        ({}, "Correct the table, and register it again with register_architecture."),
        (
            {"discovered": True},
            "pass batches that are representative of the inputs, or print the table",
        ),
        ({"__module__": LlamaArchitecture.__module__}, "is part of hf_layerfuse: please report this with the config"),
    ],
)
def test_the_next_step_depends_on_the_origin_of_the_table(origin, step):
    """An author corrects a table, a user of a discovered one passes other batches, and only others report it."""
    model = family_model("smollm3")
    table = type("Forgetful", (ForgottenList,), {"__module__": __name__, **origin})
    with pytest.raises(UnsupportedModelError, match=re.escape(step)):
        check_contract(model, some_batches(model, 1), table())


def test_a_layer_between_layers_is_refused():
    """DeBERTa-v2 with a convolution behind its first layer has a stream that the layers alone do not make."""
    model = family_model("deberta-v2", conv_kernel_size=3, conv_act="gelu")
    with pytest.raises(UnsupportedModelError, match="run one by one, differ from the whole model"):
        fuse(model, keep_layers=3, batches=some_batches(model), effort="low")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [*TINY, *FAMILIES])
def test_right_tables_pass(name, dtype):
    """The table of every family passes on its model, under half precision and in training mode too."""
    model = family_model(name).to(dtype)
    inputs = family_inputs(name, model)
    inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    check_contract(model.train(), [inputs], family_table(name, model))
    assert model.training


def rule():
    """Rows in which most tokens follow from the two before."""
    torch.manual_seed(0)
    table, rows = torch.randint(12, (12, 12)), torch.randint(12, (2000, 24))
    for i in range(2, 24):
        follows = torch.rand(len(rows)) < 0.7
        rows[follows, i] = table[rows[follows, i - 2], rows[follows, i - 1]]
    return rows + 3


def trained(model, rows):
    """The model after a few seconds of training."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        batch = rows[torch.randint(len(rows), (32,))]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


_SIZES = {"vocab_size": 16, "hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "wrong", "config"),
    [
        ("granite", NoMultiplier, {"residual_multiplier": 0.3, "embedding_multiplier": 4.0}),
        ("gemma3_text", NoNorms, {"head_dim": 12, "sliding_window": 8, "query_pre_attn_scalar": 12}),
    ],
)
def test_right_aims_lower_test_losses(model_type, wrong, config, monkeypatch):
    """A refit that aims where the table says beats one whose table omits what lies in front of the sum."""
    family = FAMILIES[model_type]
    torch.manual_seed(0)
    kind = CONFIG_MAPPING[model_type]
    model = getattr(transformers, family.head)(kind(**{**family.config, **_SIZES, **config})).eval()
    rows = rule()
    train, test = rows[:-200], rows[-200:]
    trained(model, train)
    batches = [{"input_ids": part} for part in train[:512].split(64)]
    plan = Plan(model_type, 6, (Drop("layer", 2), Drop("layer", 4)))

    def loss():
        student = apply(model, plan)
        refit(student, model, plan, batches)
        with torch.no_grad():
            return student(input_ids=test, labels=test).loss.item()

    right = loss()
    monkeypatch.setitem(ARCHITECTURES, model_type, wrong())
    assert right < loss()
