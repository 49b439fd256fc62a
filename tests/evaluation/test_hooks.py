"""Hooks show the values of a plain forward pass, and no hook is left behind, even after an error."""

import pytest
import torch
from helpers import tiny_model
from torch import nn

from hf_layerfuse.errors import DataError
from hf_layerfuse.evaluation.dummy_inputs import dummy_inputs
from hf_layerfuse.evaluation.hooks import StopForward, watch, watch_tokens
from hf_layerfuse.models.architectures import architecture_for


class Pair(nn.Module):
    """A module whose output is a tuple, like that of attention."""

    def forward(self, x):
        return 2 * x, "weights"


@pytest.fixture
def network():
    """Two linear maps, and between them a module that returns a tuple."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.pair, self.last = nn.Linear(3, 4), Pair(), nn.Linear(4, 2)

        def forward(self, x):
            return self.last(self.pair(self.first(x))[0])

    torch.manual_seed(0)
    return Network().eval()


def hooks_of(model):
    return [hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]


def test_tensors_are_those_of_a_plain_forward(network):
    """Inputs and outputs appear in the order of the pass; the first element represents a tuple."""
    x, seen = torch.randn(5, 3), {}
    modules = {
        "output": (network.last, "after"),
        "features": (network.last, "before"),
        "doubled": (network.pair, "after"),
        "input": (network.first, "before"),
    }
    with torch.no_grad(), watch(modules, seen.__setitem__):
        result = network(x)
        assert len(hooks_of(network)) == 4
    assert list(seen) == ["input", "doubled", "features", "output"]
    assert seen["input"] is x
    assert seen["output"] is result
    with torch.no_grad():
        assert torch.equal(seen["doubled"], 2 * network.first(x))
        assert torch.equal(seen["features"], seen["doubled"])
        assert torch.equal(network(x), result)
    assert not hooks_of(network)


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_are_removed_after_an_error(network, when):
    """An error of the model, or of the recording function, is raised and leaves no hook."""

    def fail(*_):
        raise RuntimeError("broken on purpose")

    with pytest.raises(RuntimeError, match="on purpose"), watch({0: (network.pair, when)}, fail):
        network(torch.randn(5, 3))
    assert not hooks_of(network)
    with pytest.raises(RuntimeError, match="shapes"), watch({0: (network.pair, when)}, lambda *_: None):
        network(torch.randn(5, 7))
    assert not hooks_of(network)


def test_hooks_are_removed_when_one_cannot_be_added(network):
    """If adding a hook fails, the earlier ones are removed."""
    with pytest.raises(AttributeError), watch({0: (network.first, "after"), 1: (None, "after")}, print):
        pass
    assert not hooks_of(network)


def test_a_pass_can_end_early(network):
    """`StopForward` ends the pass and the block without an error; later modules do not run."""
    seen = []

    def stop(key, _):
        seen.append(key)
        raise StopForward

    with watch({"first": (network.first, "after"), "last": (network.last, "after")}, stop):
        network(torch.randn(5, 3))
    assert seen == ["first"]
    assert not hooks_of(network)


def blocks_of(model, when="after"):
    return {index: (layer, when) for index, layer in enumerate(architecture_for(model).layer_list(model))}


def test_tokens_are_those_without_padding():
    """Each module shows the tokens that the mask keeps, batch by batch; mode and hooks are restored."""
    model = tiny_model("bert").train()
    batch = dummy_inputs(model, 3, 8)
    mask = torch.ones_like(batch["input_ids"])
    mask[1, 5:] = 0
    padded = batch | {"attention_mask": mask, "labels": torch.zeros(3)}
    seen, ends = {}, []

    def record(key, tokens):
        seen.setdefault(key, []).append(tokens)

    only_padding = padded | {"attention_mask": torch.zeros_like(mask)}
    watch_tokens(model, [padded, only_padding, batch], blocks_of(model), record, lambda: ends.append(len(seen[0])))
    assert ends == [1, 2]
    assert model.training
    assert not hooks_of(model)
    model.eval()
    with torch.no_grad():
        masked = model(**batch, attention_mask=mask, output_hidden_states=True).hidden_states
        plain = model(**batch, output_hidden_states=True).hidden_states
    for index, (first, second) in seen.items():
        torch.testing.assert_close(first, masked[index + 1][mask.bool()])
        torch.testing.assert_close(second, plain[index + 1].flatten(0, 1))


@pytest.mark.parametrize("batches", [0, 1])
def test_padding_alone_is_no_data(batches):
    """No batches, or batches of padding alone, are an error that says what to pass."""
    model = tiny_model("bert")
    batch = dummy_inputs(model, 2, 4)
    empty = batch | {"attention_mask": torch.zeros_like(batch["input_ids"])}
    with pytest.raises(DataError, match="hold no tokens that are not padding: pass `batches`"):
        watch_tokens(model, [empty] * batches, blocks_of(model), lambda *_: pytest.fail("shown"))
    assert not hooks_of(model)
