"""Properties of every family of `FAMILIES`: one compact test each, and all heads, edits and searches in slow tests."""

from functools import partial
from itertools import product

import pytest
import torch
from families import (
    CROSSED,
    FAMILIES,
    LAYERS,
    family_batches,
    family_inputs,
    family_model,
    family_table,
    heads_of,
    model_type_of,
    takes_states,
)
from helpers import EDITS, STOCK, slow_except

from hf_layerfuse import (
    AutoFusedModel,
    Drop,
    Fuse,
    LayerFuseError,
    Linearize,
    PlanError,
    UnsupportedModelError,
    apply,
    collapse,
    expand,
    fuse,
    verify,
)
from hf_layerfuse.calibration.contract import check_contract
from hf_layerfuse.evaluation.divergence import calibration_loss, prediction
from hf_layerfuse.models.modeling import FusedMixin

HEADS = [(name, head.__name__) for name in FAMILIES for head in heads_of(model_type_of(name))]

# heads that lack a stack
WITHOUT = {
    "": ("BartForCausalLM", "MBartForCausalLM", "MarianForCausalLM", "WhisperForCausalLM"),
    "decoder": ("T5EncoderModel", "T5ForTokenClassification", "WhisperForAudioClassification"),
    "text": ("CLIPForImageClassification", "SiglipForImageClassification"),
}

# heads that cannot be fused on calibration batches, and why
REFUSED = {
    "Dinov2Backbone": "none of which is a tensor",
    "DINOv3ViTBackbone": "none of which is a tensor",
    "BeitBackbone": "none of which is a tensor",
    "BeitForSemanticSegmentation": "or the head reads the states of others",
}


def refusal(name, head) -> str | None:
    """Part of the message with which a head is refused, or None."""
    if not takes_states(name, head):
        return "the cross-attention does not run"
    return "the layers in the table of" if head in WITHOUT[FAMILIES[name].stack] else REFUSED.get(head)


ALTERNATE = ("smollm3", "gemma2", "gpt_neo")  # neighbours attend in different ways, and cannot be averaged

HYBRID = ("qwen3_next", "qwen3_5_text")  # layer 0 differs from the others

OPAQUE = ("mixtral", "qwen3_moe", "qwen3_next", "mamba")  # no MLP could become linear

EVERY_HEAD = [pytest.param(name, head, id=f"{name}-{head}") for name, head in HEADS if not refusal(name, head)]


def applied(name, model, *edits):
    return apply(model, family_table(name, model).plan(LAYERS, edits))


def stack_of(name) -> str | None:
    return FAMILIES[name].stack or None


def outputs(model, inputs):
    with torch.inference_mode():
        return prediction(model(**inputs))


def near(ours, theirs):
    """Equal up to rounding, which large activations of random models make large."""
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max().item())


def drops(name, model) -> list[Drop]:
    """One dropped block of each kind."""
    return [Drop(kind, layer) for kind, layer in zip(family_table(name, model).kinds, (1, 3, 2), strict=False)]


def zeroed(name, model):
    """The model with the outputs of the blocks of `drops` set to zero, in place."""
    architecture = family_table(name, model)
    for edit in drops(name, model):
        for path, parameter in architecture.layer_list(model)[edit.layer].named_parameters():
            if architecture.silences(edit.kind, path):
                parameter.data.zero_()
    return model


def decodes(model) -> bool:
    """Whether decoding with a cache is compared: the model generates, from text alone."""
    return model.can_generate() and not hasattr(model.config, "vision_config")


CROSS = {"cross": (Fuse("cross", (1, 2)), Drop("cross", 3), Fuse("cross", (4, 5), "share", "mean", rank=2))}
EDITS_OF = {name: EDITS | (CROSS if name in CROSSED else {}) for name in FAMILIES}
"""Edits by family."""


def ruled_out(name, edit) -> str | None:
    """Part of the message with which a family refuses an edit, or None."""
    edits = EDITS_OF[name][edit]
    if name == "mamba" and edit in ("mlp", "linear"):
        return "has a kind that layers of 'mamba' do not have"
    if name in HYBRID and edit in ("attention", "mlp", "relaxed"):
        return "different shapes"
    if name in HYBRID and edit == "drop":  # of the only layer with attention, which counts the tokens in the cache
        return "keep at least one"
    if name.startswith(("modernbert", "t5")):  # their first layer differs from the others
        words = {"drop": "cannot become layer 0"}
        words |= dict.fromkeys(("attention", "mlp", "relaxed"), "different shapes")
        if name == "modernbert":  # layers of two types
            words["depth"] = "differ in config"
        return words.get(edit)
    if name in OPAQUE and any(isinstance(each, Linearize) for each in edits):
        return "cannot become linear"
    if name in ALTERNATE and edit == "depth":
        return "differ in config"
    return None


# rows whose layers are those of another row, and variants, are left to the longer run
SAME = ("xlm-roberta", "camembert", "electra", "marian", "whisper", "hubert", "siglip", "vit_mae")
SAME += ("clip_text_model", "siglip_vision_model", "siglip_text_model")
QUICK = [name for name in FAMILIES if name not in SAME and ("," not in name or name == "t5, decoder")]


@pytest.mark.parametrize("name", slow_except(QUICK, FAMILIES))
def test_every_edit_of_a_family(name):
    """The table fits; edits do what they say; results survive saving, loading, caching and expansion."""
    model = family_model(name)
    inputs = family_inputs(name, model)
    check_contract(model, [inputs], family_table(name, model))
    expected = outputs(model, inputs)
    assert torch.equal(outputs(applied(name, model), inputs), expected)

    depth = applied(name, model, Fuse("layer", (1, 2), operator="freeze"), Drop("layer", 4))
    assert not isinstance(depth, FusedMixin)
    assert not torch.allclose(outputs(depth, inputs), expected, rtol=1e-2), "the edits had no effect: a blind test"
    assert verify(depth, inputs=inputs)["reload"] == 0

    others = [] if name in OPAQUE else [Linearize(4), Drop("mlp", 5)]
    small = applied(name, model, Fuse("layer", (1, 3), "share", "mean", rank=2), *others)
    assert small.num_parameters() < model.num_parameters()
    report = verify(small, inputs=inputs)
    assert report["reload"] == 0
    assert ("cache" in report) == decodes(small)

    dropped = applied(name, model, *drops(name, model))
    stock = expand(dropped)
    assert type(stock) is type(model)
    near(outputs(stock, inputs), outputs(dropped, inputs))
    near(outputs(dropped, inputs), outputs(zeroed(name, model), inputs))


@pytest.mark.parametrize("name", slow_except(["t5, decoder"], CROSSED))
def test_sharing_equal_cross_attention_is_the_identity(name):
    """Sharing equal cross-attention blocks changes no output bit."""
    model = family_model(name)
    first, *others = family_table(name, model).layer_list(model)
    for layer in others:
        for path in family_table(name, model).cross.values():
            layer.get_submodule(path).load_state_dict(first.get_submodule(path).state_dict())
    inputs = family_inputs(name, model)
    small = applied(name, model, Fuse("cross", (1, 2, 3), "share", "mean"), Fuse("cross", (4, 5), "share", "telescope"))
    assert small.num_parameters() < model.num_parameters()
    assert torch.equal(outputs(small, inputs), outputs(model, inputs))


@pytest.mark.slow
@pytest.mark.usefixtures("steady")
def test_a_latency_search_compares_cross_attention():
    """Within a latency budget, each cross-attention block is kept, dropped or fused with its layer."""
    model = family_model("mbart, decoder")
    batches = family_batches("mbart, decoder", model, 2)
    small = fuse(model, latency_budget=0.9, stack="decoder", batches=batches, effort="low")
    notes = small.fusion_report.plan.notes
    assert notes.latency_ms.measured <= 0.9 * notes.latency_ms.original
    assert {row.edit.kind for row in notes.losses} >= {"cross"}


def three_in_turn() -> list:
    """Three edits for each head, the next three each time, so that each edit meets each family and most heads."""
    heads = [(name, head) for name, head in HEADS if not refusal(name, head)]
    return [
        pytest.param(name, head, names[(3 * i + j) % len(names)], id=f"{name}-{head}-{names[(3 * i + j) % len(names)]}")
        for i, (name, head) in enumerate(heads)
        for names in [list(EDITS_OF[name])]
        for j in range(3)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "head", "edit"), three_in_turn())
def test_edits_of_every_head(name, head, edit):
    """Each edit on each head: the right class, smaller, with the same outputs after reloading and with a cache."""
    model = family_model(name, head)
    inputs = family_inputs(name, model)
    if words := ruled_out(name, edit):
        with pytest.raises((PlanError, UnsupportedModelError), match=words):
            verify(applied(name, model, *EDITS_OF[name][edit]), inputs=inputs)
        return
    small = applied(name, model, *EDITS_OF[name][edit])
    assert isinstance(small, FusedMixin) == (edit not in STOCK)
    assert small.num_parameters() < model.num_parameters()
    assert verify(small, inputs=inputs)["reload"] == 0
    if edit not in (*STOCK, "linear"):  # a stock class has no linear MLPs
        near(outputs(expand(small), inputs), outputs(small, inputs))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "head"), EVERY_HEAD)
def test_every_head_keeps_the_contract(name, head):
    """The table fits each head; an empty plan is bit-equal, and dropping a block is zeroing its outputs."""
    model = family_model(name, head)
    inputs = family_inputs(name, model)
    check_contract(model, [inputs], family_table(name, model))
    assert torch.equal(outputs(applied(name, model), inputs), outputs(model, inputs))
    dropped = applied(name, model, *drops(name, model))
    near(outputs(dropped, inputs), outputs(zeroed(name, model), inputs))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "head"), [(name, head) for name, head in HEADS if refusal(name, head)])
def test_heads_that_cannot_be_fused_are_refused_with_the_reason(name, head):
    """A decoder without the encoder, a backbone, and a head that reads several layers."""
    model = family_model(name, head)
    with pytest.raises(UnsupportedModelError, match=refusal(name, head)):
        fuse(model, keep_layers=3, stack=stack_of(name), batches=family_batches(name, model, 2), effort="low")


SEARCHES = {
    "depth": {"keep_layers": 3},
    "share": {"keep_layers": 3, "mode": "share"},
    "rank": {"keep_layers": 3, "mode": "share", "rank": 2},
    "mlp": {"keep_layers": 3, "blocks": "mlp"},
    "attention": {"ratio": 0.5, "blocks": "attention"},
    "collapse": {"count": 2},
}
SEARCHES_OF_CROSSED = {
    "cross": {"keep_layers": 3, "blocks": "cross"},
    "separate": {"keep_layers": 3, "blocks": "separate"},
}
REFUSED_SEARCHES = {
    **{(name, "collapse"): "cannot become linear" for name in OPAQUE},
    ("mamba", "collapse"): "has a kind that layers of 'mamba' do not have",
    ("mamba", "attention"): "have only attention blocks",
    ("mamba", "mlp"): "have only attention blocks",
}


# the outputs of a random model are nearly the same for all inputs
@pytest.mark.filterwarnings("ignore:the fused model is worse than chance")
@pytest.mark.slow
@pytest.mark.parametrize(("name", "search"), [*product(FAMILIES, SEARCHES), *product(CROSSED, SEARCHES_OF_CROSSED)])
def test_every_search_of_a_family(name, search, tmp_path):
    """A search ends with a model that is smaller and reloads; its refit did not make the calibration loss worse."""
    model = family_model(name)
    batches = family_batches(name, model)
    asked = {"stack": stack_of(name), "batches": batches, **(SEARCHES | SEARCHES_OF_CROSSED)[search]}
    find = collapse if search == "collapse" else partial(fuse, effort="low")
    if words := REFUSED_SEARCHES.get((name, search)):
        with pytest.raises(LayerFuseError, match=words):
            find(model, **asked)
        return
    small = find(model, **asked)
    assert small.num_parameters() < model.num_parameters()
    small.save_pretrained(tmp_path)
    inputs = family_inputs(name, model, seed=99)
    assert torch.equal(outputs(AutoFusedModel.from_pretrained(tmp_path), inputs), outputs(small, inputs))
    fitted = small.fusion_report.plan.notes.refit
    assert fitted is None or fitted.after <= fitted.before
    assert torch.isfinite(torch.tensor(calibration_loss(small, model, batches)))
