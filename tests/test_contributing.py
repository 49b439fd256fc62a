"""The guide in CONTRIBUTING.md works as written: its code registers an architecture that is new to the package."""

import os
import subprocess
import sys

import pytest
from families import FAMILIES, TINY, model_type_of
from helpers import GUIDE, NETWORKS, blocks_of
from transformers import PreTrainedConfig, PreTrainedModel

from hf_layerfuse import UnsupportedModelError, fuse, register_architecture
from hf_layerfuse.models.architectures import ARCHITECTURES, BUILTIN, TransformerArchitecture, architecture_for

# in a process of its own, so that the registries of this one stay as they are
USE = """
import tempfile
import toy, torch
from transformers import AutoModelForSequenceClassification
from hf_layerfuse import (
    AutoFusedModel, Drop, Fuse, FusionRecipe, Plan, apply, collapse, expand, fuse, plan_fusion, verify
)
from hf_layerfuse.evaluation.dummy_inputs import dummy_inputs

torch.manual_seed(0)
model = toy.ToyForSequenceClassification(toy.ToyConfig(num_labels=3)).eval()
inputs = dummy_inputs(model, 4)

def logits(which):
    with torch.inference_mode():
        return which(**inputs).logits

plans = {
    "ToyForSequenceClassification": [Fuse("layer", (1, 2)), Drop("layer", 4)],
    "FusedToyForSequenceClassification": [Fuse("layer", (1, 3), "share"), Drop("attention", 0), Fuse("mlp", (4, 5))],
}
for name, edits in plans.items():
    small = apply(model, Plan("toy", 6, edits))
    assert type(small).__name__ == name
    assert small.num_parameters() < model.num_parameters()
    assert not torch.allclose(logits(small), logits(model))
    assert verify(small) == {"reload": 0}
    torch.testing.assert_close(logits(expand(small)), logits(small))
    with tempfile.TemporaryDirectory() as path:
        small.save_pretrained(path)
        for load in (AutoFusedModel, AutoModelForSequenceClassification):
            loaded = load.from_pretrained(path)
            assert type(loaded) is type(small)
            assert loaded.num_parameters() == small.num_parameters()
            torch.testing.assert_close(logits(loaded), logits(small))

for mode in ("depth", "share"):
    for blocks in ("layer", "attention", "mlp"):
        for similarity in ("cosine", "cka"):
            recipe = FusionRecipe(keep_layers=4, mode=mode, blocks=blocks, similarity=similarity)
            plan = plan_fusion(model, recipe, [inputs])
            assert sum(len(edit.layers) - 1 for edit in plan.edits) == 2
            assert all((edit.kind, edit.mode) == (blocks, mode) for edit in plan.edits)
    plan = plan_fusion(model, FusionRecipe(keep_layers=4, mode=mode))
    assert torch.equal(logits(fuse(model, keep_layers=4, mode=mode)), logits(apply(model, plan)))

batches = [dummy_inputs(model, 2) for _ in range(4)]
linear = collapse(model, count=2, batches=batches)
assert sum(isinstance(layer.mlp[1], torch.nn.Identity) for layer in linear.base_model.layers) == 2

untouched = apply(model, Plan("toy", 6, []))
assert torch.equal(logits(untouched), logits(model))
print("done")
"""


@pytest.mark.slow
def test_adding_an_architecture_works_as_written(tmp_path):
    """The unchanged code of the guide is enough to fuse, save, reload and verify a new model."""
    code = blocks_of("Add an architecture")
    assert len(code) == 2
    (tmp_path / "toy.py").write_text("\n".join(code), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", USE],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    # DeepSpeed, where it is installed, greets on standard output
    assert done.stdout.splitlines()[-1:] == ["done"], done.stderr


def test_an_unknown_architecture_is_refused_with_directions():
    """The error for an unknown architecture names the next step first, then the closest names, and pages that exist."""

    class UnknownConfig(PreTrainedConfig):
        model_type = "my-gemma3"

    class UnknownModel(PreTrainedModel):
        config_class = UnknownConfig

    with pytest.raises(UnsupportedModelError, match="unknown architecture 'my-gemma3'") as refused:
        fuse(UnknownModel(UnknownConfig()), keep_layers=1)
    with pytest.raises(UnsupportedModelError, match="adapt MODEL` finds and prints a table for it") as looked_up:
        architecture_for(UnknownConfig())
    for message in map(str, (refused.value, looked_up.value)):
        direction, closest = message.index("see 'Add an architecture' in CONTRIBUTING.md"), message.index("gemma3, ")
        assert direction < closest < message.index("docs/architectures.md lists all")
        assert len(message) < 400
    assert (GUIDE.parent / "docs/architectures.md").exists()
    assert blocks_of("Add an architecture")


def test_registering_needs_a_config_class():
    """An architecture without a registered config is refused with the two missing calls."""

    class Architecture(TransformerArchitecture):
        model_type = "unheard-of"

    with pytest.raises(UnsupportedModelError, match=r"AutoConfig\.register\('unheard-of', YourConfig\).*AutoModel"):
        register_architecture(Architecture)
    assert "unheard-of" not in ARCHITECTURES


def test_every_built_in_architecture_is_tested():
    """Each built-in architecture has a row in `TINY`, `FAMILIES` or `NETWORKS`, and the guide names the first two."""
    conv_graphs = {config.model_type for _, config in NETWORKS.values()}
    families = set(map(model_type_of, FAMILIES))
    rows = TINY.keys() | families | conv_graphs - {"cifar_resnet"}
    assert {architecture.model_type for architecture in BUILTIN} == rows
    guide = GUIDE.read_text(encoding="utf-8")
    assert "`TINY`" in guide
    assert "`FAMILIES`" in guide
