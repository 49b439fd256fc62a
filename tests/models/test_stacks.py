"""Models with several stacks of layers: encoder and decoder, image and text towers."""

import dataclasses

import pytest
import torch
from families import family_batches, family_model, family_table
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    CLIPConfig,
    CLIPModel,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_layerfuse import (
    AutoFusedModel,
    Drop,
    Fuse,
    FusionRecipe,
    Plan,
    UnsupportedModelError,
    apply,
    architecture_for,
    fuse,
)
from hf_layerfuse.calibration.contract import check_contract
from hf_layerfuse.errors import PlanError
from hf_layerfuse.evaluation.divergence import prediction

_TOWER = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48}


def bart():
    sides = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in _SIDE.items()}
    ids = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
    return BartForConditionalGeneration(
        BartConfig(vocab_size=64, d_model=32, max_position_embeddings=64, **sides, **ids)
    )


_SIDE = {"layers": 4, "attention_heads": 4, "ffn_dim": 48}


def t5():
    return T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=4, num_decoder_layers=4, num_heads=4)
    )


def clip():
    text = {**_TOWER, "vocab_size": 64, "max_position_embeddings": 40, "pad_token_id": 0, "bos_token_id": 1}
    vision = {**_TOWER, "image_size": 8, "patch_size": 2}
    return CLIPModel(CLIPConfig(text_config={**text, "eos_token_id": 2}, vision_config=vision, projection_dim=16))


def inputs(model, rows=4):
    generator = torch.Generator().manual_seed(0)
    found = {"input_ids": torch.randint(3, 60, (rows, 12), generator=generator)}
    if model.config.model_type == "clip":
        return {**found, "pixel_values": torch.randn(rows, 3, 8, 8, generator=generator)}
    # as long as the input, so that a mask of the wrong side has the right shape
    decoded = torch.randint(3, 60, (rows, 12), generator=generator)
    mask = torch.ones(rows, 12, dtype=torch.long)
    mask[::2, 8:] = 0
    return {**found, "attention_mask": mask, "decoder_input_ids": decoded}


def made(make):
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    return model


STACKS = [(bart, "encoder"), (bart, "decoder"), (t5, "encoder"), (t5, "decoder"), (clip, "vision"), (clip, "text")]


@pytest.mark.parametrize(("make", "stack"), STACKS, ids=[f"{make.__name__}-{stack}" for make, stack in STACKS])
def test_a_stack_is_fused_and_the_others_stay(make, stack, tmp_path):
    """The chosen stack gets fewer layers, the other one keeps its weights, and the result reloads as a stock model."""
    model = made(make)
    batch = inputs(model)
    small = fuse(model, keep_layers=3, stack=stack, batches=[batch], effort="low")
    assert type(small) is type(model)
    assert small.fusion_report.plan.stack == stack
    chosen = architecture_for(model, stack=stack)
    assert (len(chosen.layer_list(small)), len(chosen.layer_list(model))) == (3, 4)
    inside = f"{chosen.layers_path(model)}."
    weights = small.state_dict()
    outside = [name for name in model.state_dict() if not name.startswith(inside)]
    assert all(torch.equal(weights[name], model.state_dict()[name]) for name in outside)
    small.save_pretrained(tmp_path)
    again = AutoFusedModel.from_pretrained(tmp_path)
    with torch.inference_mode():
        assert torch.equal(prediction(again(**batch)), prediction(small(**batch)))


def test_plans_without_cross_attention_move_it_with_its_layer():
    """Plans of older releases know two kinds of blocks in decoders: a layer without both is removed, and a layer whose
    two blocks share their weights keeps its cross-attention."""
    model = made(bart)
    edits = [{"edit": "drop", "kind": kind, "layer": 1} for kind in ("attention", "mlp")]
    edits.append({"edit": "fuse", "kind": "layer", "layers": [2, 3], "mode": "share", "operator": "mean"})
    tree = {"format_version": 1, "model_type": "bart", "num_layers": 4, "stack": "decoder", "edits": edits}
    table, older = architecture_for(model, stack="decoder"), Plan.from_dict(tree)
    assert (older.kinds, table.kinds) == (("attention", "mlp"), ("attention", "cross", "mlp"))
    shared = [Fuse(kind, (2, 3), "share", "mean") for kind in older.kinds]
    same = table.plan(4, (Drop("layer", 1), *shared))
    ours, theirs = apply(model, older), apply(model, same)
    batch = inputs(model)
    with torch.inference_mode():
        assert torch.equal(prediction(ours(**batch)), prediction(theirs(**batch)))
    assert ours.num_parameters() == theirs.num_parameters()


def test_both_stacks_of_a_model():
    """A result can be fused again, at its other stack."""
    model = made(bart)
    batches = [inputs(model)]
    small = fuse(model, keep_layers=2, stack="encoder", batches=batches, effort="low")
    small = fuse(small, keep_layers=3, stack="decoder", batches=batches, effort="low")
    assert (small.config.encoder_layers, small.config.decoder_layers) == (2, 3)


def test_a_shared_stack_reloads_with_its_plan(tmp_path):
    """The plan in the config of a fused model names the stack that it shapes."""
    model = made(bart)
    plan = architecture_for(model, stack="decoder").plan(4, (Drop("mlp", 1), Drop("attention", 2)))
    fused = apply(model, plan)
    fused.save_pretrained(tmp_path)
    again = AutoFusedModel.from_pretrained(tmp_path)
    assert Plan.from_dict(again.config.layerfuse_plan).stack == "decoder"
    batch = inputs(model)
    with torch.inference_mode():
        assert torch.equal(prediction(again(**batch)), prediction(fused(**batch)))


def test_unknown_stacks_are_refused():
    """An unknown stack is refused with the known ones; a plan for another stack does not apply."""
    model = made(bart)
    with pytest.raises(UnsupportedModelError, match=r"no stack 'text'\. It has: encoder, decoder"):
        fuse(model, FusionRecipe(keep_layers=2, stack="text"))
    plan = Plan("bart", 4, (Drop("layer", 1),), stack="encoder")
    with pytest.raises(UnsupportedModelError, match="no stack 'vision'"):
        apply(model, dataclasses.replace(plan, stack="vision"))
    with pytest.raises(PlanError, match="for 5 layers, the model has 4"):
        apply(model, dataclasses.replace(plan, num_layers=5, stack="decoder"))


@pytest.mark.parametrize("name", ["bart, decoder", "whisper, decoder"])
def test_decoders_may_have_other_heads_than_their_encoder(name):
    """The heads of a decoder are those of its own field in the config."""
    model = family_model(name, decoder_attention_heads=2)
    assert model.config.encoder_attention_heads == 4
    table = family_table(name, model)
    assert {block.heads.count for block in table.blocks(model) if block.heads} == {2}
    check_contract(model, family_batches(name, model, 1), table)
