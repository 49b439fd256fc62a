"""A layer-wise forward shows the computation of the model layer by layer, and leaves the model unchanged."""

import copy
import gc
import tempfile

import pytest
import torch
from helpers import HEADS, LAYERS, TINY, heads_of, tiny_model

from hf_layerfuse import Drop, Fuse, Plan, UnsupportedModelError, apply
from hf_layerfuse.calibration.disk import StoredTensors
from hf_layerfuse.calibration.layer_hooks import HookPoint
from hf_layerfuse.calibration.layerwise import LayerwiseForward
from hf_layerfuse.calibration.refit.between import through
from hf_layerfuse.calibration.samples import Sample
from hf_layerfuse.evaluation.divergence import prediction
from hf_layerfuse.evaluation.dummy_inputs import dummy_inputs
from hf_layerfuse.models.architectures import architecture_for

PLACES = ("read", "features", "residual", "sum")
POINTS = [HookPoint(kind, place) for kind in ("attention", "mlp") for place in PLACES]
# among them grouped heads, layers with a sliding window of 6 for 12 tokens, and such layers mixed with others
MIXED = [(kind, {}) for kind in TINY] + [("llama", {"num_key_value_heads": 1}), ("bert", {"is_decoder": True})]

every_head = pytest.mark.parametrize(("model_type", "head"), HEADS, ids=[head.__name__ for _, head in HEADS])
every_kind = pytest.mark.parametrize(("model_type", "changes"), MIXED, ids=[f"{k} {c}" if c else k for k, c in MIXED])


def batches_of(model, *sizes):
    """Batches of these sizes in which every third sequence of tokens is padded."""
    found = []
    for seed, size in enumerate(sizes):
        batch = dummy_inputs(model, size, 12, seed=seed)
        if "input_ids" in batch:
            mask = torch.ones_like(batch["input_ids"])
            mask[::3, ..., 9:] = 0
            batch["attention_mask"] = mask
        found.append(batch)
    return found


def body(model_type, **changes):
    """The model without a head, whose hidden states are those of its layers."""
    return tiny_model(model_type, min(heads_of(model_type), key=lambda head: len(head.__name__)), **changes)


def layers_of(model):
    return architecture_for(model).layer_list(model)


@torch.inference_mode()
def hidden_states(model, batch):
    return model(**batch, output_hidden_states=True).hidden_states


def finish(layerwise):
    while layerwise.depth < len(layerwise.layers):
        layerwise.advance()
    return layerwise


@every_kind
def test_states_are_the_hidden_states(model_type, changes):
    """At every depth, the states equal the hidden states of the model to the bit, for any number of earlier queries."""
    model = body(model_type, **changes)
    batches = batches_of(model, 3, 2)
    layerwise = LayerwiseForward(model, Sample.of(batches))
    expected = [hidden_states(model, batch) for batch in batches]
    for depth in range(LAYERS):
        assert layerwise.depth == depth
        for index, states in enumerate(expected):
            assert torch.equal(layerwise.states[index], states[depth])
        list(layerwise.look(*POINTS))
        list(layerwise.look(HookPoint("mlp", "features")))
        layerwise.advance()


@every_head
def test_outputs_at_the_end_are_those_of_the_model(model_type, head):
    """At the end of a layer-wise forward, the head gives the outputs of the model for the held-out sequences."""
    model = tiny_model(model_type, head)
    batches = batches_of(model, 5, 4, 3)
    sample = Sample.of(batches)
    found = list(finish(LayerwiseForward(model, sample)).outputs())
    assert len(found) == 1
    (output, mask), held_out = found[0], sample.held_out_batches[0]
    with torch.inference_mode():
        torch.testing.assert_close(prediction(output), prediction(model(**held_out)), rtol=1e-5, atol=1e-5)
    assert len(prediction(output)) == 1
    assert mask is held_out.get("attention_mask") or torch.equal(mask, held_out["attention_mask"])


@every_head
def test_rows_are_the_tokens_that_are_fitted(model_type, head):
    """Rows contain no padding and no held-out sequences; the selection split is separate."""
    model = tiny_model(model_type, head)
    batches = batches_of(model, 9, 8)
    sample = Sample.of(batches)
    layerwise = LayerwiseForward(model, sample)
    for index, batch in enumerate(batches):
        states = layerwise.states[index]
        choices = len(states) // len(sample.held_out[index])
        kept = ~sample.held_out[index].repeat_interleave(choices)[:, None].expand(states.shape[:-1])
        if "attention_mask" in batch:
            kept = kept & batch["attention_mask"].view(kept.shape).bool()
        selection = sample.selection[index].repeat_interleave(choices)[:, None].expand(states.shape[:-1])
        assert torch.equal(layerwise.rows(index, states), states[kept])
        fitted, chosen = layerwise.split(index, states)
        assert torch.equal(fitted, states[kept & ~selection])
        assert torch.equal(chosen, states[kept & selection])
        assert len(chosen)


def test_few_sequences_hold_out_their_ends():
    """With fewer than five sequences to fit, the last fifth of each sequence's tokens, without padding, selects the
    penalty."""
    model = body("llama")
    batches = batches_of(model, 4)
    layerwise = LayerwiseForward(model, Sample.of(batches))
    states = layerwise.states[0]
    fitted, chosen = layerwise.split(0, states)
    assert torch.equal(fitted, torch.cat([states[0, :8], states[1, :10], states[2, :10]]))
    assert torch.equal(chosen, torch.cat([states[0, 8:9], states[1, 10:], states[2, 10:]]))


@every_kind
def test_points_fit_together(model_type, changes):
    """In every block, the sum is the residual plus the output projection of the features. The norm is between the
    residual and the first maps, or after the sum."""
    model = body(model_type, **changes)
    architecture, batches = architecture_for(model), batches_of(model, 3)
    expected = hidden_states(model, batches[0])
    layerwise = LayerwiseForward(model, Sample.of(batches))
    for depth, layer in enumerate(layerwise.layers):
        ((_, seen),) = layerwise.look(*POINTS)
        with torch.inference_mode():
            for kind in ("attention", "mlp"):
                table = getattr(architecture, kind)
                read, features, residual, total = (seen[HookPoint(kind, place)] for place in PLACES)
                out, norm = layer.get_submodule(table["out"]), layer.get_submodule(table["norm"])
                added = through(layer, architecture, kind, out(features))
                torch.testing.assert_close(residual + added, total)
                start = seen[HookPoint("attention", "residual")] if architecture.parallel else residual
                assert torch.equal(read, start if architecture.post_norm else norm(start))
            attention = seen[HookPoint("attention", "sum")]
            if architecture.post_norm:
                attention = layer.get_submodule(architecture.attention["norm"])(attention)
                total = layer.get_submodule(architecture.mlp["norm"])(total)
            assert torch.equal(seen[HookPoint("mlp", "residual")], attention)
            assert torch.equal(seen[HookPoint("attention", "residual")], expected[depth])
            if depth + 1 < LAYERS:
                assert torch.equal(total, expected[depth + 1])
        layerwise.advance()


def test_points_alone_are_what_they_are_together(model_type):
    """A single hook point shows the same as all points together."""
    model = body(model_type)
    layerwise = LayerwiseForward(model, Sample.of(batches_of(model, 2)))
    ((_, together),) = layerwise.look(*POINTS)
    for point in POINTS:
        ((_, alone),) = layerwise.look(point)
        assert torch.equal(alone[point], together[point])


def test_layers_run_no_further_than_asked(model_type):
    """Hook points in the attention block do not run the MLP. Without hook points, the output is still available."""
    model = body(model_type)
    layerwise = LayerwiseForward(model, Sample.of(batches_of(model, 2)))
    ran = []
    out = layerwise.layers[0].get_submodule(layerwise.architecture.mlp["out"])
    handle = out.register_forward_pre_hook(lambda module, args: ran.append(module))
    list(layerwise.look(HookPoint("attention", "sum"), HookPoint("attention", "read")))
    list(layerwise.look(HookPoint("mlp", "residual")))
    assert not ran
    ((_, found),) = layerwise.look()
    assert ran
    assert list(found) == [None]
    handle.remove()


def test_another_layer_in_its_place(model_type):
    """A replacement layer gives its own output for the states."""
    model = body(model_type)
    layerwise = LayerwiseForward(model, Sample.of(batches_of(model, 2)))
    ((_, found),) = layerwise.look(layer=copy.deepcopy(layerwise.layers[4]))
    model_with = copy.deepcopy(model)
    layers_of(model_with)[0].load_state_dict(layerwise.layers[4].state_dict())
    assert torch.equal(found[None], hidden_states(model_with, batches_of(model, 2)[0])[1])


def test_layers_that_change_are_walked_as_they_are(model_type):
    """If a layer changes between two queries, the second query runs the changed layer, without keys and values of the
    first."""
    model = body(model_type)
    batches = [*batches_of(model, 2), dummy_inputs(model, 2)]
    layerwise = LayerwiseForward(model, Sample.of(batches))
    list(layerwise.look())
    for parameter in layerwise.layers[0].parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    layerwise.advance()
    for index, batch in enumerate(batches):
        assert torch.equal(layerwise.states[index], hidden_states(model, batch)[1])


REMOVED = {
    "blocks": (Drop("attention", 1), Drop("mlp", 3), Drop("attention", 0)),
    "layers": (Drop("layer", 0), Drop("layer", 3)),
    "shared": (Fuse("layer", (1, 3), "share", "mean", rank=2), Fuse("mlp", (0, 2, 4), "basis", rank=6)),
}


@pytest.mark.parametrize("name", REMOVED)
def test_edited_models_are_walked(model_type, name):
    """The layer-wise forward also runs models with removed blocks or shared weights."""
    model = apply(body(model_type), Plan(model_type, LAYERS, REMOVED[name]))
    batches = batches_of(model, 3)
    layerwise = LayerwiseForward(model, Sample.of(batches))
    expected = hidden_states(model, batches[0])
    for states in expected[:-1]:
        assert torch.equal(layerwise.states[0], states)
        layerwise.advance()
    ((output, _),) = layerwise.outputs()
    with torch.inference_mode():
        expected = prediction(model(**layerwise.sample.held_out_batches[0]))
    torch.testing.assert_close(prediction(output), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions(model_type, dtype):
    """The model computes in its own data type, and the states are float32."""
    model = body(model_type).to(dtype)
    batches = [{k: v.to(dtype) if v.is_floating_point() else v for k, v in b.items()} for b in batches_of(model, 3)]
    layerwise = LayerwiseForward(model, Sample.of(batches))
    for states in hidden_states(model, batches[0])[:-1]:
        assert layerwise.states[0].dtype == torch.float32
        torch.testing.assert_close(
            layerwise.states[0], states.float(), rtol=0, atol=0 if dtype != torch.float64 else 1e-4
        )
        layerwise.advance()
    assert layerwise.rows(0, layerwise.states[0]).dtype == torch.float32


def snapshot(model):
    """All attributes, hooks and weights of the modules, without the attribute in which transformers records its
    hooks."""
    parts = {
        name: (
            set(vars(module)) - {"_output_capturing_hooks_installed"},
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
        )
        for name, module in model.named_modules()
    }
    return parts, {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other):
    return one[0] == other[0] and all(torch.equal(one[1][name], other[1][name]) for name in one[1])


def test_the_model_is_left_as_it_was(model_type):
    """A layer-wise forward leaves hooks, attributes and weights unchanged, also while outputs are consumed."""
    model = tiny_model(model_type)
    before = snapshot(model)
    layerwise = LayerwiseForward(model, Sample.of(batches_of(model, 9, 8)))
    for _ in layerwise.look(*POINTS):
        pass
    next(layerwise.look(HookPoint("mlp", "sum")))
    finish(layerwise)
    for _ in layerwise.outputs():
        assert same(snapshot(model), before)
    assert same(snapshot(model), before)
    model(**dummy_inputs(model))


def fail(*args, **kwargs):
    raise RuntimeError("broken on purpose")


def test_the_model_is_left_as_it_was_by_exceptions(model_type):
    """An error on entry, inside a layer or in the head leaves no trace in the model."""
    model = tiny_model(model_type)
    before = snapshot(model)
    batches = batches_of(model, 2)
    names = ("embeddings", "embed_tokens", "wte")
    embeddings = next(module for name, module in model.named_modules() if name.endswith(names))
    handle = embeddings.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        LayerwiseForward(model, Sample.of(batches))
    handle.remove()
    assert same(snapshot(model), before)

    layerwise = LayerwiseForward(model, Sample.of(batches))
    handle = layerwise.layers[0].get_submodule(layerwise.architecture.mlp["out"]).register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        list(layerwise.look(HookPoint("mlp", "sum")))
    handle.remove()
    assert same(snapshot(model), before)

    finish(layerwise)
    handle = embeddings.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        list(layerwise.outputs())
    handle.remove()
    assert same(snapshot(model), before)


def test_wrapped_layers_are_given_back():
    """A layer whose forward is replaced, as by accelerate, runs that forward and keeps it afterwards."""
    model, used = body("llama"), []
    layer = layers_of(model)[2]
    stock = layer.forward

    def wrapped(*args, **kwargs):
        used.append(True)
        return stock(*args, **kwargs)

    layer.forward = wrapped
    layerwise = finish(LayerwiseForward(model, Sample.of(batches_of(model, 2))))
    assert layer.forward is wrapped
    assert used == [True]
    torch.testing.assert_close(layerwise.states[0], states_before_norm(model, batches_of(model, 2)[0]))


@torch.inference_mode()
def states_before_norm(model, batch):
    seen = []
    handle = layers_of(model)[-1].register_forward_hook(lambda module, args, output: seen.append(output))
    model(**batch)
    handle.remove()
    return seen[0]


def test_models_that_skip_layers_are_refused():
    """A model that does not run each of its layers once is refused by name, and no layer runs in a wrong order."""
    model = body("llama")
    model.config.num_hidden_layers = LAYERS - 2  # the exception that ends the loop over the layers
    with pytest.raises(UnsupportedModelError, match=f"called 4 of its {LAYERS} layers"):
        LayerwiseForward(model, Sample.of(batches_of(model, 2)))


def test_states_leave_no_files(tmp_path, monkeypatch):
    """States of any shape and data type are in files that are unlinked at once. They outlive their container."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    states = StoredTensors()
    tensors = [torch.randn(3, 4), torch.randn(2, 1, 5).half(), torch.arange(3)]
    for tensor in tensors:
        states.append(tensor)
    assert len(states) == 3
    for found, expected in zip(states, tensors, strict=True):
        assert torch.equal(found, expected)
        assert found.dtype == expected.dtype
    assert not list(tmp_path.iterdir())
    kept = states[0]
    del states, found
    gc.collect()
    assert torch.equal(kept, tensors[0])
