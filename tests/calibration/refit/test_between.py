"""Aims behind a norm: an output projection that reaches its aims gives the sum what it lacks."""

import pytest
import torch
from families import family_batches, family_model, family_table

from hf_layerfuse.calibration.layer_hooks import HookPoint
from hf_layerfuse.calibration.layerwise import LayerwiseForward
from hf_layerfuse.calibration.refit.between import Between, through
from hf_layerfuse.calibration.samples import Sample

BEHIND_NORMS = ("gemma2", "gemma3_text", "olmo2")
BEHIND_FACTORS = ("granite",)


def _at_layer_one(name):
    """The layer-wise forward at the second layer, and for each block: the block, its output, and what the sum gets."""
    model = family_model(name).eval()
    table = family_table(name, model)
    layerwise = LayerwiseForward(model, Sample.of(family_batches(name, model)), table)
    layerwise.advance()
    places = [HookPoint(kind, place) for kind in table.kinds for place in ("output", "residual", "sum")]
    (_, seen), *_ = layerwise.look(*places)
    for block in table.blocks(model):
        if block.layer == 1:
            output, residual, total = (seen[HookPoint(block.kind, place)] for place in ("output", "residual", "sum"))
            yield layerwise, block, output, total - residual


@pytest.mark.parametrize("name", [*BEHIND_NORMS, *BEHIND_FACTORS])
def test_aims_of_what_is_there_are_the_outputs(name):
    """What reaches the sum now has the outputs of now as aims."""
    for layerwise, block, output, added in _at_layer_one(name):
        between = Between(layerwise, block)
        torch.testing.assert_close(between.aims(added, output), output, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", BEHIND_NORMS)
def test_errors_of_aims_are_those_of_the_sum(name):
    """A small error at right angles to an output is, times its weight and the gain, the error of the sum."""
    for layerwise, block, output, added in _at_layer_one(name):
        between = Between(layerwise, block)
        error = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
        error -= (error * output).sum(-1, keepdim=True) / output.square().sum(-1, keepdim=True) * output
        error *= 1e-3 * output.norm(dim=-1, keepdim=True) / error.norm(dim=-1, keepdim=True)
        reached = through(layerwise.layers[1], layerwise.architecture, block.kind, output + error) - added
        (weight,) = between.weights(output)
        expected = weight * error * (added / (weight * output))
        torch.testing.assert_close(reached, expected, rtol=1e-2, atol=1e-3 * reached.abs().max().item())


@pytest.mark.parametrize("name", BEHIND_FACTORS)
def test_tokens_behind_a_factor_count_alike(name):
    """Only norms divide tokens by different sizes."""
    for layerwise, block, output, _ in _at_layer_one(name):
        assert Between(layerwise, block).weights(output) == ()


def test_linear_mlps_without_outputs_yet_have_aims():
    """The size of an output of zeros counts as one, so that aims and weights stay finite."""
    for layerwise, block, output, added in _at_layer_one("gemma2"):
        between, none = Between(layerwise, block), torch.zeros_like(output)
        assert between.aims(added, none).isfinite().all()
        assert torch.equal(*between.weights(none), torch.ones(*output.shape[:-1], 1))
