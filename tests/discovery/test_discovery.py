"""The architecture of a model is found from one forward pass, verified, and printed as source."""

import warnings

import pytest
import torch
from families import family_inputs, family_model
from repeated import RepeatedConfig, RepeatedForSequenceClassification, repeated, tokens
from torch import nn

from hf_layerfuse import (
    AutoFusedModel,
    CheckpointError,
    DataError,
    Drop,
    LayerFuseWarning,
    Plan,
    TransformerArchitecture,
    UnsupportedModelError,
    ZeroBlock,
    apply,
    collapse,
    discover_architecture,
    fuse,
    register_architecture,
)
from hf_layerfuse.models.architectures import ARCHITECTURES

FAST = ["gpt2", "bert", "llama", "gemma2"]


@pytest.fixture
def forget():
    """Remove the table of the model after a test that registers it."""
    yield
    ARCHITECTURES.pop("repeated", None)


@pytest.mark.parametrize(("batches", "message"), [([], "no sequences"), ([False], "without tensors")])
def test_unknown_models_need_batches_of_tensors(forget, batches, message):
    """Calibration data without a batch are refused for an unknown architecture too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LayerFuseWarning)
        with pytest.raises(DataError, match=message):
            fuse(repeated(), keep_layers=2, batches=batches, effort="low")


@pytest.mark.parametrize("name", FAST)
def test_the_source_gives_the_same_table(name):
    """`source()`, executed, gives the class of `architecture()`."""
    model = family_model(name)
    found = discover_architecture(model, family_inputs(name, model))
    assert not found.unverified
    before, scope = ARCHITECTURES[found.model_type], {}
    try:
        exec(found.source(), scope)
    finally:
        ARCHITECTURES[found.model_type] = before
    ours = found.architecture()
    theirs = scope[ours.__name__]
    assert issubclass(theirs, TransformerArchitecture)
    public = [
        name for name in vars(ours) if not name.startswith("_") and name != "discovered"
    ]  # the source is your own
    assert {name: getattr(ours, name) for name in public} == {name: getattr(theirs, name) for name in public}
    assert ours.__name__ == type(before).__name__ or name == "gpt2"


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_nothing_is_changed_or_copied(name, monkeypatch):
    """Modules, weights, hooks and modes of the model are the same objects afterwards; only single layers are copied."""
    model = family_model(name).train()
    for cls in (nn.ModuleList, type(model), type(model.base_model)):
        monkeypatch.setattr(cls, "__deepcopy__", None, raising=False)
    modules, versions = dict(model.named_modules()), [p._version for p in model.parameters()]
    weights = {name: id(parameter) for name, parameter in model.named_parameters()}
    discover_architecture(model, family_inputs(name, model))
    assert {name: id(module) for name, module in model.named_modules()} == {n: id(m) for n, m in modules.items()}
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == weights
    assert [parameter._version for parameter in model.parameters()] == versions
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("name", "joint", "pairing", "bound_heads"),
    [
        ("gpt_neox", {"qkv": "groups"}, "halves", False),
        ("bloom", {"qkv": "groups"}, "halves", True),
        ("glm4", {"gate_in": "gate_first"}, "neighbours", False),
    ],
)
def test_layouts(name, joint, pairing, bound_heads):
    """The layouts of joint maps and of rotary positions, and heads with their own position biases, are found."""
    model = family_model(name)
    found = discover_architecture(model, family_inputs(name, model))
    assert (found.joint, found.pairing, found.bound_heads) == (joint, pairing, bound_heads)


def test_random_inputs_are_the_default():
    """A text model needs no batch, and half precision is enough."""
    found = discover_architecture(family_model("llama").to(torch.bfloat16))
    assert (found.stack, found.depth_field, found.unverified) == ("model.layers", "num_hidden_layers", ())


def test_own_class():
    """The table of a class of the user is the one that CONTRIBUTING.md writes by hand."""
    found = discover_architecture(repeated(), tokens())
    assert found.blocks[0].roles == {"norm": "norm1", "qkv": "attention.qkv", "out": "attention.out"}
    assert found.blocks[1].roles == {"norm": "norm2", "in": "mlp.0", "out": "mlp.2"}
    assert found.activation == "mlp.1"
    assert found.skip["mlp"] == {"norm2": nn.Identity, "mlp": ZeroBlock}
    assert not found.unverified


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ("twice", "layers: its members run 2, 2, 2, 2, 2, 2 times, so weights serve several depths"),
        ("backwards", "layers: its members run in the order 5, 4, 3, 2, 1, 0"),
        ("mixed", r"have different blocks, .* Layers 0, 1, 2, 3: attention .*; layers 4, 5: parallel attention"),
    ],
)
def test_stacks_that_no_table_describes(order, message):
    """A model that repeats its layers, runs them in another order or mixes two kinds is refused; the error says how."""
    with pytest.raises(UnsupportedModelError, match=message):
        discover_architecture(repeated(order=order), tokens())


def test_a_wrong_stack_is_refused():
    """An unknown `stack=` is refused with the stacks that exist."""
    with pytest.raises(
        UnsupportedModelError, match=r"'blocks'\. It has one, 'layers' \(layers, 6 .*: leave stack= out"
    ):
        discover_architecture(repeated(), tokens(), stack="blocks")


def test_inputs_that_do_not_fit():
    """A model that random inputs do not fit asks for a batch; a batch that it does not accept is refused."""
    model = repeated(side=1)
    with pytest.raises(UnsupportedModelError, match=r"does not accept random inputs: .*Pass a representative batch"):
        discover_architecture(model)
    with pytest.raises(
        UnsupportedModelError, match="does not accept the batch of input_ids: ValueError: side is missing"
    ):
        discover_architecture(model, tokens())
    assert not discover_architecture(model, {**tokens(), "side": torch.ones(8)}).unverified


def test_models_without_weights_are_refused():
    """An architecture is found by running the model, which a model on the meta device cannot do."""
    with torch.device("meta"):
        model = RepeatedForSequenceClassification(RepeatedConfig())
    with pytest.raises(UnsupportedModelError, match="has no weights"):
        discover_architecture(model, tokens())


@pytest.mark.parametrize(("method", "target"), [(fuse, {"keep_layers": 4}), (collapse, {"count": 1})])
def test_unknown_architectures_are_discovered(method, target, forget):
    """`fuse` and `collapse` use the discovered table of an unknown architecture. A warning names it, once."""
    model, batches = repeated(), None if method is fuse else [tokens(2)]
    warning = r"RepeatedArchitecture was discovered .*`hf-layerfuse adapt MODEL`"
    with pytest.warns(LayerFuseWarning, match=warning) as seen:
        small = method(model, batches=batches, check=False, **target)
    assert seen[0].filename == __file__
    assert small.num_parameters() < model.num_parameters()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method(model, batches=batches, check=False, **target)


def test_inputs_that_random_ones_cannot_replace(forget):
    """The result of a model that needs another input is verified on the calibration batches, which have it."""
    batches = [{**tokens(), "side": torch.ones(8)}]
    with pytest.warns(LayerFuseWarning, match="was discovered"):
        small = fuse(repeated(side=1), keep_layers=4, batches=batches, effort="low")
    assert len(small.layers) == 4


@pytest.mark.slow
def test_unknown_architectures_with_several_stacks(monkeypatch):
    """`fuse` asks which stack of an unknown architecture to fuse, and discovers the tables of all."""
    monkeypatch.delitem(ARCHITECTURES, "bart")
    model = family_model("bart", decoder_layers=6)
    inputs = family_inputs("bart", model, rows=4)
    with pytest.raises(UnsupportedModelError, match=r"pass stack= with one of 'encoder' .* 'decoder'"):
        fuse(model, keep_layers=4, batches=[inputs])
    with pytest.warns(LayerFuseWarning, match="BartArchitecture was discovered"):
        small = fuse(model, keep_layers=4, stack="decoder", batches=[inputs])
    assert (small.config.encoder_layers, small.config.decoder_layers) == (6, 4)
    assert fuse(model, keep_layers=4, stack="encoder", batches=[inputs]).config.encoder_layers == 4


def test_unverified_tables_are_not_used(forget):
    """A table that does not hold on the batch is refused, with the part that could not be verified."""
    model = repeated(num_attention_heads=3)
    with pytest.raises(UnsupportedModelError, match=r"not verified: the layout of the attention block: .*adapt MODEL"):
        fuse(model, keep_layers=4)
    assert "repeated" not in ARCHITECTURES


def test_fused_checkpoints_need_their_table(tmp_path, forget):
    """A fused checkpoint of an unregistered architecture is refused with the next step; a stock one loads."""
    model = repeated()
    register_architecture(discover_architecture(model, tokens()).architecture())
    apply(model, Plan("repeated", 6, (Drop("layer", 1),))).save_pretrained(tmp_path / "stock")
    apply(model, Plan("repeated", 6, (Drop("mlp", 1),))).save_pretrained(tmp_path / "fused")
    assert AutoFusedModel.from_pretrained(tmp_path / "fused").config.model_type == "fused_repeated"
    ARCHITECTURES.pop("repeated")
    assert len(AutoFusedModel.from_pretrained(tmp_path / "stock").layers) == 5
    with pytest.raises(CheckpointError, match="is a fused 'repeated', whose architecture table is not registered"):
        AutoFusedModel.from_pretrained(tmp_path / "fused")


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({}, "the batch is a dict without tensors"),
        ([tokens(2)], "the batch is a list without tensors"),
        (torch.zeros(2, 4), "the batch is a Tensor without tensors"),
        ({"input_ids": [[1, 2]]}, "the batch is a dict without tensors"),
        ({"input_ids": torch.zeros(2, 1, dtype=torch.long)}, r"the shape \(2, 1, 16\), one token per row"),
    ],
)
def test_wrong_batches_are_refused(batch, message):
    """A batch that is not a dict of tensors, or has one token per row, is refused."""
    with pytest.raises(DataError, match=message):
        discover_architecture(repeated(), batch)


def test_numbers_among_the_inputs():
    """A number among the inputs has no rows."""
    assert not discover_architecture(repeated(), {"side": torch.tensor(1), **tokens()}).unverified


def test_blocks_that_add_zero_are_not_verified():
    """Blocks whose output projections are zero, as before training, show nothing, so their table is not verified."""
    model = repeated()
    for layer in model.layers:
        nn.init.zeros_(layer.mlp[2].weight)
        nn.init.zeros_(layer.mlp[2].bias)
    found = discover_architecture(model, tokens())
    assert any("the block of layer 3 adds zero on this batch" in claim for claim in found.unverified)


def test_values_that_are_not_models_are_refused():
    """A config, and a model without a `model_type`, are refused with what to do."""
    with pytest.raises(UnsupportedModelError, match=r"RepeatedConfig is a config, .*: pass the model"):
        discover_architecture(RepeatedConfig())
    model = repeated()
    model.config.model_type = ""
    with pytest.raises(UnsupportedModelError, match=r"RepeatedConfig has no model_type, .*: set it on the class"):
        discover_architecture(model, tokens())


def _returns_nothing(input_ids, side=None):
    return None


def _lacks_a_package(input_ids, side=None):
    raise ImportError("no module named 'kernels'")


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (_lacks_a_package, "does not accept the batch of input_ids: ImportError: no module named 'kernels'"),
        (_returns_nothing, "the members 0, 1, 2, 3, 4, 5 do not run|its members do not run as modules"),
    ],
)
def test_models_that_do_not_run(forward, message):
    """A model that raises, or does not run its layers, is refused with the reason."""
    model = repeated()
    model.forward = forward
    with pytest.raises(UnsupportedModelError, match=message):
        discover_architecture(model, tokens())


def test_outputs_without_names_are_refused():
    """A model whose forward() returns a bare tensor cannot be compared, and is refused with what to return."""
    model, stock = repeated(), RepeatedForSequenceClassification.forward
    model.forward = lambda input_ids: stock(model, input_ids).logits
    with pytest.raises(UnsupportedModelError, match=r"the model returns a Tensor: .*return a ModelOutput"):
        discover_architecture(model, tokens())


def test_states_that_are_not_finite_are_refused():
    """A weight that is NaN is named by its layer."""
    model = repeated()
    model.layers[2].mlp[2].weight.data.fill_(torch.nan)
    with pytest.raises(UnsupportedModelError, match="member 2 returns states that are not finite"):
        discover_architecture(model, tokens())
