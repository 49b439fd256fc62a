"""Each public function checks a model once, and checks plans by shape alone."""

from collections.abc import Callable

import pytest
import torch
from helpers import network, some_batches, tiny_model
from transformers import PreTrainedModel

from hf_layerfuse import (
    Fuse,
    FusionRecipe,
    Plan,
    UnsupportedModelError,
    align,
    apply,
    collapse,
    fuse,
    merge,
    plan_fusion,
    refit,
)
from hf_layerfuse.models.surgery import checks

LAYERS = 4
SHARED = Plan("llama", LAYERS, (Fuse("layer", (1, 2), "share", align="permutation"),))


def timed(model: PreTrainedModel) -> None:
    fuse(model, latency_budget=0.7, latency_repeats=1, effort="low", batches=some_batches(model), check=False)


def refitted(model: PreTrainedModel) -> None:
    """Refit with a student made from an undamaged model."""
    refit(apply(tiny_model("llama", num_hidden_layers=LAYERS), SHARED), model, SHARED, some_batches(model))


FRONT_DOORS = {
    "apply": lambda model: apply(model, SHARED),
    "align": lambda model: align(model, SHARED),
    "plan_fusion": lambda model: plan_fusion(model, FusionRecipe(keep_layers=3)),
    "fuse from weights": lambda model: fuse(model, keep_layers=3),
    "fuse, low": lambda model: fuse(model, keep_layers=3, effort="low", batches=some_batches(model)),
    "fuse, medium": lambda model: fuse(model, keep_layers=3, effort="medium", batches=some_batches(model)),
    "fuse, shared": lambda model: fuse(model, keep_layers=3, mode="share", effort="low", batches=some_batches(model)),
    "fuse, timed": timed,
    "collapse": lambda model: collapse(model, count=2, batches=some_batches(model)),
    "merge": lambda model: merge(model, latency_budget=0.7, batches=some_batches(model)),
}

QUICK = ("apply", "fuse, low", "merge")
"""One of those that only change weights, one that also searches, and one of convolutions."""


def model_for(name: str) -> PreTrainedModel:
    return network("cifar") if name == "merge" else tiny_model("llama", num_hidden_layers=LAYERS)


@pytest.mark.filterwarnings("ignore::hf_layerfuse.LayerFuseWarning")
@pytest.mark.usefixtures("steady")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FRONT_DOORS]
)
def test_weights_are_read_once(name: str, monkeypatch: pytest.MonkeyPatch):
    """One scan finds weights that are NaN or not loaded, for any number of candidates of a search."""
    scanned = []
    monkeypatch.setattr(checks, "check_weights", scanned.append)
    model = model_for(name)
    FRONT_DOORS[name](model)
    assert [id(one) for one in scanned] == [id(model)]


@pytest.mark.parametrize(("name", "call"), [*FRONT_DOORS.items(), ("refit", refitted)])
def test_damaged_weights_are_refused(name: str, call: Callable[[PreTrainedModel], object]):
    """Each public function refuses a model with NaN in its weights, and names the weight."""
    model = model_for(name)
    path, weight = list(model.named_parameters())[-1]
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.view(-1)[0] = torch.nan
        with pytest.raises(UnsupportedModelError, match=f"{path} holds NaN or infinite values"):
            call(model)
    finally:
        weight.data.copy_(kept)
