"""Properties of every architecture, every head in transformers, and every kind of edit."""

import copy
import itertools

import pytest
import torch
from helpers import EDITS, HEADS, LAYERS, LAYOUTS, STOCK, TINY, in_turn, slow_unless, tiny_model

from hf_layerfuse import Drop, Fuse, Plan, apply, expand, verify
from hf_layerfuse.evaluation.dummy_inputs import dummy_inputs
from hf_layerfuse.models.architectures import architecture_for
from hf_layerfuse.models.modeling import FusedMixin
from hf_layerfuse.models.surgery.linear_mlp import Collapsed
from hf_layerfuse.models.verify import prediction

every_head = pytest.mark.parametrize(
    ("model_type", "head"),
    slow_unless(lambda kind, head: kind in LAYOUTS, HEADS),
    ids=[head.__name__ for _, head in HEADS],
)


FIRST = dict(reversed(HEADS))
one_head = pytest.mark.parametrize(("model_type", "head"), FIRST.items(), ids=FIRST)


def on_heads(field, choices, rest=tuple(HEADS)):
    """Every choice on the first head of three layouts, and one of the choices, in turn, on each other head. Two of the
    three layouts are left to the longer run, but for one choice, and so are architectures of the same layouts."""
    choices = list(choices)
    first, *more = ((kind, FIRST[kind]) for kind in ("gpt2", "bert", "llama"))
    cases = in_turn(choices, [first], [head for head in rest if head != first])
    quick = [(head, choice) for head, choice in cases if head[0] in LAYOUTS]
    cases += [(head, choice) for head in more for choice in choices if (head, choice) not in cases]
    ids = [
        f"{head.__name__}-{'-'.join(choice) if isinstance(choice, tuple) else choice}" for (_, head), choice in cases
    ]
    marked = slow_unless(lambda *case: (case[:2], case[2]) in quick, [(*head, choice) for head, choice in cases])
    return pytest.mark.parametrize(("model_type", "head", field), marked, ids=ids)


def on_one_head(field, choices):
    """Every choice on three layouts, and one of them, in turn, on each of the other architectures."""
    return on_heads(field, choices, rest=FIRST.items())


def outputs(model, inputs=None):
    with torch.inference_mode():
        return prediction(model(**(inputs or dummy_inputs(model))))


@every_head
def test_empty_plan_is_bit_equal(model_type, head):
    """A plan without edits gives the same class and the same outputs to the bit, in separate memory."""
    model = tiny_model(model_type, head)
    copied = apply(model, Plan(model_type, LAYERS))
    assert type(copied) is head
    assert torch.equal(outputs(copied), outputs(model))
    originals = {parameter.data_ptr() for parameter in model.parameters()}
    assert originals.isdisjoint(parameter.data_ptr() for parameter in copied.parameters())


@on_heads("name", EDITS)
def test_result_survives_saving_loading_and_caching(model_type, head, name):
    """Reloading gives the right head, no missing or unexpected keys, and the same logits. Cached decoding equals
    uncached decoding."""
    model = tiny_model(model_type, head)
    before = copy.deepcopy(model.state_dict())
    expected = outputs(model)
    fused = apply(model, Plan(model_type, LAYERS, EDITS[name]))
    assert isinstance(fused, FusedMixin) == (name not in STOCK)
    assert isinstance(fused, head)
    assert fused.num_parameters() < model.num_parameters()
    report = verify(fused)
    assert report["reload"] == 0
    assert ("cache" in report) == (fused.can_generate() and getattr(fused.config, "is_decoder", True))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), "the input was changed"
    assert torch.equal(outputs(model), expected)
    assert not torch.allclose(outputs(fused), expected, rtol=1e-2), "the edit had no effect: this test is blind"


@on_one_head("fused", itertools.product(["layer", "attention", "mlp"], ["mean", "freeze", "telescope"]))
def test_sharing_equal_blocks_is_the_identity(model_type, head, fused):
    """Sharing equal blocks changes no output bit, for any operator."""
    kind, operator = fused
    model = tiny_model(model_type, head)
    layers = architecture_for(model).layer_list(model)
    for layer in layers[1:]:
        layer.load_state_dict(layers[0].state_dict())
    plan = Plan(model_type, LAYERS, (Fuse(kind, (0, 2, 3), "share", operator), Fuse(kind, (4, 5), "share", operator)))
    assert torch.equal(outputs(apply(model, plan)), outputs(model))


@on_one_head("operator", ["mean", "freeze", "telescope"])
def test_depth_fusing_equal_layers_gives_that_layer(model_type, head, operator):
    """Fusing three equal layers in depth equals keeping one and dropping the others."""
    model = tiny_model(model_type, head)
    layers = architecture_for(model).layer_list(model)
    for layer in layers[4:]:
        layer.load_state_dict(layers[3].state_dict())
    fused = apply(model, Plan(model_type, LAYERS, (Fuse("layer", (3, 4, 5), operator=operator),)))
    dropped = apply(model, Plan(model_type, LAYERS, (Drop("layer", 4), Drop("layer", 5))))
    assert torch.equal(outputs(fused), outputs(dropped))


@one_head
def test_fusing_both_blocks_is_fusing_the_layer(model_type, head):
    """Attention and MLP fused over the same layers give a stock model, equal to fusing whole layers."""
    model = tiny_model(model_type, head)
    parts = apply(model, Plan(model_type, LAYERS, (Fuse("attention", (1, 2)), Fuse("mlp", (1, 2)), Drop("layer", 5))))
    edits = (Fuse("layer", (1, 2)), Drop("attention", 5), Drop("mlp", 5))
    whole = apply(model, Plan(model_type, LAYERS, edits))
    assert type(parts) is type(whole) is head
    assert torch.equal(outputs(parts), outputs(whole))


@one_head
def test_dropped_block_contributes_nothing(model_type, head):
    """Dropping a block equals setting its output projection to zero."""
    model = tiny_model(model_type, head)
    architecture = architecture_for(model)
    fused = apply(model, Plan(model_type, LAYERS, (Drop("attention", 1), Drop("mlp", 3))))
    for block in architecture.blocks(model):
        if (block.layer, block.kind) in ((1, "attention"), (3, "mlp")):
            for parameter in model.get_submodule(block.modules["out"]).parameters():
                parameter.data.zero_()
    torch.testing.assert_close(outputs(fused), outputs(model))


@on_one_head("name", ["share", "attention", "mlp", "relaxed"])
def test_fused_model_expands_to_an_equal_stock_model(model_type, head, name):
    """The stock export of a fused model has the original's class and size, and the fused model's outputs."""
    model = tiny_model(model_type, head)
    fused = apply(model, Plan(model_type, LAYERS, EDITS[name]))
    stock = expand(fused)
    assert type(stock) is head
    assert stock.num_parameters() == model.num_parameters()
    assert stock.config.model_type == model_type
    assert not hasattr(stock.config, "layerfuse_plan")
    torch.testing.assert_close(outputs(stock), outputs(fused))


@on_one_head("name", EDITS)
def test_every_parameter_is_reached_by_gradients(model_type, head, name):
    """Every weight that trains in the original gets a gradient; a shared weight gets the sum over its uses."""
    model = tiny_model(model_type, head)
    fused = apply(model, Plan(model_type, LAYERS, EDITS[name])).train()
    for module in fused.modules():
        if isinstance(module, Collapsed) and not module.weight.any():  # that of a gated MLP, before it is fitted
            torch.nn.init.normal_(module.weight)

    def without_gradient(which):
        torch.manual_seed(0)
        prediction(which.train()(**dummy_inputs(which))).square().sum().backward()
        return {n for n, p in which.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}

    architecture = architecture_for(model)
    outside = {n for n in without_gradient(model) if not n.startswith(architecture.layers_path(model) + ".")}
    # key biases shift all scores of a query alike, which the softmax cancels: their gradient is zero up to rounding
    inside = {n for n in without_gradient(fused) if n not in outside and not n.endswith(("key.bias", "k_lin.bias"))}
    assert not inside
    assert torch.isfinite(torch.stack([p.grad.norm() for p in fused.parameters() if p.grad is not None])).all()


# transformers 5.23 prefers activation_checkpointing_enable, which earlier releases of version 5 do not have
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@on_one_head("name", EDITS)
def test_runs_as_transformers_models_do(model_type, head, name):
    """Hidden states, gradient checkpointing, deepcopy and half precision work on the result."""
    fused = apply(tiny_model(model_type, head), Plan(model_type, LAYERS, EDITS[name]))
    inputs = dummy_inputs(fused)
    expected = outputs(fused, inputs)

    with torch.inference_mode():
        hidden = fused(**inputs, output_hidden_states=True).hidden_states
    assert len(hidden) == fused.config.num_hidden_layers + 1
    twin = copy.deepcopy(fused)
    assert torch.equal(outputs(twin, inputs), expected)
    assert twin.num_parameters() == fused.num_parameters(), "deepcopy untied the weights"

    half = apply(tiny_model(model_type, head).to(torch.bfloat16), Plan(model_type, LAYERS, EDITS[name]))
    assert half.dtype == torch.bfloat16
    images = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in inputs.items()}
    assert outputs(half, images).dtype == torch.bfloat16

    def gradients(model):
        model.zero_grad()
        torch.manual_seed(0)  # the same dropout
        prediction(model(**inputs)).square().mean().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = gradients(fused.train())
    fused.gradient_checkpointing_enable({"use_reentrant": False})
    for key, value in gradients(fused).items():
        torch.testing.assert_close(value, plain[key])


QUICK = ("gpt2", "bert", "llama")


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        case if case[0] in QUICK else pytest.param(*case, marks=pytest.mark.slow)
        for case in in_turn(EDITS, firsts=(), rest=TINY)
    ],
)
def test_compiles(model_type, name):
    """torch.compile traces the result like a stock model: one edit for each architecture, and each edit once."""
    fused = apply(tiny_model(model_type), Plan(model_type, LAYERS, EDITS[name]))
    compiled = torch.compile(fused, backend="eager")
    torch.testing.assert_close(outputs(compiled, dummy_inputs(fused)), outputs(fused))
    torch._dynamo.reset()
