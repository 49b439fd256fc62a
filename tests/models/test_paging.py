"""Models whose weights stay in their files compute the same as loaded ones, and hold only what they use."""

import json

import pytest
import torch
from families import FAMILIES, TINY, family_inputs, family_model, family_table
from helpers import slow_except, tiny_model

from hf_layerfuse import AutoFusedModel, CheckpointError, UnsupportedModelError, architecture_for
from hf_layerfuse.evaluation.divergence import prediction
from hf_layerfuse.models.paging import empty, in_memory, paged_model

COMPUTED = {"mixtral", "qwen3_moe", "qwen3_next", "nomic_bert", "marian", "marian, decoder"}
"""Families with weights that Transformers computes from those of the files."""

QUICK = ("llama", "gpt2", "vit", "deberta-v2", "mixtral")


def opened(model, path, memory=0, table=None):
    model.save_pretrained(path)
    paged, weights = paged_model(path, memory)
    weights.attach(paged, table or architecture_for(model))
    return paged


def held(model) -> int:
    """Bytes of the storage of all parameters, without the single NaN behind each that is on disk."""
    sizes = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    return sum(size for size in sizes.values() if size > 4)


@pytest.mark.parametrize("name", slow_except(QUICK, {**TINY, **FAMILIES}))
def test_computes_the_same(name, tmp_path):
    """The outputs equal those of the loaded model to the bit. Checkpoints with other weights than the model are
    refused by name."""
    model = family_model(name).eval()
    table, inputs = family_table(name, model), family_inputs(name, model)
    if name in COMPUTED:
        with pytest.raises(CheckpointError, match=r"holds no '.+computes this weight"):
            opened(model, tmp_path, table=table)
        return
    paged = opened(model, tmp_path, table=table)
    with torch.inference_mode():
        assert torch.equal(prediction(paged(**inputs)), prediction(model(**inputs)))


def test_holds_what_it_uses(tmp_path):
    """With no memory for weights, all layers are on disk after a pass; inside `in_memory`, those that are named are in
    memory; with enough memory, all stay."""
    model = tiny_model("llama")
    paged = opened(model, tmp_path)
    layers = architecture_for(paged).layer_list(paged)
    size = sum(p.nbytes for p in layers[0].parameters())
    outside = held(paged)
    assert outside < held(model) - 5 * size
    with torch.inference_mode():
        paged(**family_inputs("llama", model))
    assert held(paged) <= outside + size
    with in_memory(layers[1:3]):
        for index in (1, 2):
            for ours, theirs in zip(layers[index].parameters(), model.model.layers[index].parameters(), strict=True):
                assert torch.equal(ours, theirs)
        assert held(paged) >= outside + 2 * size
    roomy = opened(model, tmp_path, memory=1 << 30)
    with torch.inference_mode():
        roomy(**family_inputs("llama", model))
    assert held(roomy) >= held(model)


def test_weights_on_disk_are_nan(tmp_path):
    """A computation with a weight that is not in memory gives NaN, not a wrong number."""
    paged = opened(tiny_model("llama"), tmp_path)
    assert torch.isnan(paged.model.layers[0].mlp.down_proj.weight @ torch.ones(paged.config.intermediate_size)).all()


def test_ordinary_modules_stay(tmp_path):
    """`in_memory` leaves the modules of ordinary models alone."""
    model = tiny_model("llama")
    before = [p.clone() for p in model.parameters()]
    with in_memory(model.model.layers):
        pass
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(tmp_path, dtype):
    """Weights in half precision are read as float32."""
    model = tiny_model("llama").to(dtype)
    inputs = family_inputs("llama", model)
    with torch.inference_mode():
        found = prediction(opened(model, tmp_path)(**inputs))
        assert torch.equal(found, prediction(AutoFusedModel.from_pretrained(tmp_path, dtype=torch.float32)(**inputs)))


def test_damaged_checkpoints_are_refused(tmp_path):
    """A missing file, weights that are NaN, and shapes that differ from the config are named."""
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    files = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 2
    files[1].unlink()
    with pytest.raises(CheckpointError, match=rf"lacks {files[1].name}"):
        paged_model(tmp_path / "shards")

    broken = tiny_model("llama")
    broken.model.layers[2].mlp.up_proj.weight.data[0, 0] = torch.nan
    paged = opened(broken, tmp_path / "nan")
    with pytest.raises(UnsupportedModelError, match=r"layers\.2\.mlp\.up_proj\.weight holds NaN"), torch.no_grad():
        paged(**family_inputs("llama", model))

    paged = opened(model, tmp_path / "shape")
    config = json.loads((tmp_path / "shape" / "config.json").read_text())
    (tmp_path / "shape" / "config.json").write_text(json.dumps({**config, "intermediate_size": 7}))
    paged, weights = paged_model(tmp_path / "shape", 0)
    weights.attach(paged, architecture_for(paged))
    with pytest.raises(CheckpointError, match="has the shape"), torch.no_grad():
        paged(**family_inputs("llama", model))

    with pytest.raises(CheckpointError, match="no directory"):
        paged_model(tmp_path / "nothing")


def test_empty_keeps_what_it_must(tmp_path):
    """`empty` frees the named weights and leaves the others, and buffers."""
    model = tiny_model("llama")
    kept = model.model.embed_tokens.weight.clone()
    empty(model, [name for name in model.state_dict() if "layers" in name])
    assert torch.equal(model.model.embed_tokens.weight, kept)
    assert all(torch.isnan(p).all() for p in model.model.layers.parameters())
