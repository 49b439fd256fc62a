"""Errors that the obvious implementation makes silently. One test, or a few, for each of them."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from helpers import LAYERS, heads_of, on_two_processes, tiny_model
from safetensors import safe_open

from hf_layerfuse import (
    AutoFusedModel,
    Drop,
    Fuse,
    Plan,
    PlanError,
    UnsupportedModelError,
    apply,
    architecture_for,
    expand,
    fuse,
)
from hf_layerfuse.evaluation.divergence import decode, prediction
from hf_layerfuse.evaluation.dummy_inputs import dummy_inputs

SHARE = (Fuse("layer", (1, 3), "share"), Fuse("mlp", (2, 4), "share"), Fuse("attention", (0, 5), "share"))
DECODERS = ["gpt2", "llama", "mistral", "qwen2", "qwen3"]

decoders = pytest.mark.parametrize("model_type", DECODERS)


def causal_lm(model_type, **changes):
    name = next(h.__name__ for h in heads_of(model_type) if h.__name__.endswith(("ForCausalLM", "LMHeadModel")))
    return tiny_model(model_type, name, **changes)


def shared_model(model_type, edits=SHARE, head=None, **changes):
    return apply(tiny_model(model_type, head, **changes), Plan(model_type, LAYERS, edits))


def layer_list(model):
    return architecture_for(model).layer_list(model)


def attention_of(model):
    """Attention modules that write to the cache, in order."""
    return [
        module for module in layer_list(model).modules() if hasattr(module, "layer_idx") and hasattr(module, "config")
    ]


@torch.inference_mode()
def decoded(model, ids, use_cache):
    """Logits of all positions, in one pass or token by token with a cache."""
    if not use_cache:
        return model(input_ids=ids, use_cache=False).logits
    cache, parts = None, []
    for position in range(ids.shape[1]):
        logits, cache = decode(model, ids[:, position : position + 1], cache)
        parts.append(logits)
    return torch.cat(parts, dim=1)


@decoders
def test_1_parameters_are_shared_and_modules_are_not(model_type):
    """Shared layers have one tensor per matrix, but separate modules and cache entries."""
    model = apply(causal_lm(model_type), Plan(model_type, LAYERS, SHARE))
    layers, architecture = layer_list(model), architecture_for(model)
    assert len(set(map(id, layers.modules()))) == sum(1 for _ in layers.modules()) == len(list(layers.named_modules()))
    named = [dict(layer.named_parameters()) for layer in layers]
    assert named[1].keys() == named[3].keys()
    for name, parameter in named[1].items():
        assert (named[3][name] is parameter) == (parameter.ndim >= 2)
        assert (named[4][name] is named[2][name]) == (parameter.ndim >= 2 and architecture.owner(name) == "mlp")
        assert (named[5][name] is named[0][name]) == (parameter.ndim >= 2 and architecture.owner(name) == "attention")
    assert [module.layer_idx for module in attention_of(model)] == list(range(LAYERS))
    ids = dummy_inputs(model, 2, 12)["input_ids"]
    torch.testing.assert_close(decoded(model, ids, True), decoded(model, ids, False), rtol=1e-4, atol=1e-4)


@decoders
def test_1_sharing_the_module_would_decode_wrongly(model_type):
    """One attention module at two depths is correct without a cache, and wrong with one."""
    model = causal_lm(model_type)
    layers = layer_list(model)
    layers[2].load_state_dict(layers[1].state_dict())
    right = apply(model, Plan(model_type, LAYERS, (Fuse("attention", (1, 2), "share"),)))
    wrong = copy.deepcopy(model)
    name = "attn" if model_type == "gpt2" else "self_attn"
    setattr(layer_list(wrong)[2], name, getattr(layer_list(wrong)[1], name))
    ids = dummy_inputs(model, 2, 12)["input_ids"]
    expected = decoded(model, ids, False)
    assert torch.equal(decoded(right, ids, False), expected)
    assert torch.equal(decoded(wrong, ids, False), expected)
    torch.testing.assert_close(decoded(right, ids, True), expected, rtol=1e-4, atol=1e-4)
    assert (decoded(wrong, ids, True) - expected).abs().max() > 0.01 * expected.abs().max()


@decoders
@pytest.mark.parametrize(
    ("edits", "kept"),
    [
        ((Drop("layer", 0),), [1, 2, 3, 4, 5]),
        ((Drop("layer", 1), Fuse("layer", (3, 4, 5))), [0, 2, 4]),  # freeze keeps the one in the middle
        ((Fuse("layer", (0, 1)), Fuse("layer", (2, 3))), [1, 3, 4, 5]),
        ((Drop("layer", 3), Drop("layer", 4), Drop("layer", 5)), [0, 1, 2]),
    ],
)
def test_2_layers_are_renumbered_with_their_types(model_type, edits, kept):
    """After layers are removed, the cache has one entry per layer, and each layer keeps its type of attention."""
    original = causal_lm(model_type)
    model = apply(original, Plan(model_type, LAYERS, edits))
    assert [module.layer_idx for module in attention_of(model)] == list(range(len(kept)))
    types = getattr(original.config, "layer_types", None)
    if types is not None:
        assert model.config.layer_types == [types[layer] for layer in kept]
    windows = [getattr(module, "sliding_window", None) for module in attention_of(original)]
    assert [getattr(module, "sliding_window", None) for module in attention_of(model)] == [windows[i] for i in kept]
    ids = dummy_inputs(model, 2, 12)["input_ids"]
    with torch.inference_mode():
        assert decode(model, ids)[1].get_seq_length() == 12
    torch.testing.assert_close(decoded(model, ids, True), decoded(model, ids, False), rtol=1e-4, atol=1e-4)


def test_2_frozen_layers_keep_their_type():
    """`freeze` with layer 3 of (2, 3) equals dropping layer 2, type of attention included; averaging the two is
    refused."""
    original = causal_lm("qwen2")
    frozen = apply(original, Plan("qwen2", LAYERS, (Fuse("layer", (2, 3)),)))
    dropped = apply(original, Plan("qwen2", LAYERS, (Drop("layer", 2),)))
    ids = dummy_inputs(frozen, 2, 12)["input_ids"]
    with torch.inference_mode():
        assert torch.equal(frozen(input_ids=ids).logits, dropped(input_ids=ids).logits)
    with pytest.raises(PlanError, match="full_attention, sliding_attention"):
        apply(original, Plan("qwen2", LAYERS, (Fuse("layer", (2, 3), operator="mean"),)))


@pytest.mark.parametrize(
    ("edits", "types", "indices"),
    [
        ((Drop("attention", 0),), "fffsss", [0, 1, 3, 4, 5]),
        ((Drop("attention", 1), Drop("attention", 3)), "fffsss", [0, 1, 3, 4]),
        ((Drop("attention", 0), Drop("attention", 1), Drop("attention", 2)), "ssssss", [0, 1, 2]),
        ((Drop("layer", 2), Drop("attention", 4)), "ffsss", [0, 1, 2, 3]),
        ((Fuse("attention", (2, 3)), Drop("mlp", 0)), "ffssss", [0, 1, 2, 3, 4]),
    ],
)
def test_2_mixed_attention_types(edits, types, indices):
    """In Qwen2 with full (f) and sliding (s) layers, attention uses the first cache entries of its own type."""
    original = causal_lm("qwen2")
    assert "".join(name[0] for name in original.config.layer_types) == "fffsss"
    model = apply(original, Plan("qwen2", LAYERS, edits))
    assert "".join(name[0] for name in model.config.layer_types) == types
    assert [module.layer_idx for module in attention_of(model)] == indices
    for module in attention_of(model):
        assert model.config.layer_types[module.layer_idx][0] == ("s" if module.sliding_window else "f")
    assert len(model.config.layer_types) == model.config.num_hidden_layers


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "qwen3"])
def test_3_ties_do_not_depend_on_those_of_the_embeddings(tmp_path, model_type, tie):
    """Shared matrices are saved once and loaded as one tensor, with or without tied word embeddings."""
    model = apply(causal_lm(model_type, tie_word_embeddings=tie), Plan(model_type, LAYERS, SHARE))
    model.save_pretrained(tmp_path)
    loaded = AutoFusedModel.from_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert len(file.keys()) == len(list(model.parameters()))
    for which in (model, loaded):
        assert which.config.tie_word_embeddings == tie
        assert (which.get_output_embeddings().weight is which.get_input_embeddings().weight) == tie
        layers = layer_list(which)
        for block in architecture_for(which).blocks(which):
            if block.layer == 3:
                for role in block.modules.keys() - {"norm", "q_norm", "k_norm"}:
                    one, two = (which.get_submodule(block.modules[role].replace(".3.", f".{i}.")) for i in (1, 3))
                    assert one is not two
                    assert one.weight is two.weight
        assert len(layers) == LAYERS
    assert loaded.num_parameters() == model.num_parameters()


def test_3_a_tie_that_is_not_declared_cannot_be_saved(tmp_path):
    """This is why ties are declared: a stock model whose layers share a tensor cannot be saved."""
    model = causal_lm("llama")
    model.model.layers[3].mlp.up_proj.weight = model.model.layers[1].mlp.up_proj.weight
    with pytest.raises(RuntimeError, match="shared"):
        model.save_pretrained(tmp_path)


def test_4_tying_does_not_cut_the_bias_of_a_conv1d(tmp_path):
    """GPT-2's weights are (in, out): tying them repeatedly leaves their biases at size out."""
    model = shared_model("gpt2", head="GPT2LMHeadModel")
    model.save_pretrained(tmp_path)
    sizes = {"attn.c_attn": 96, "attn.c_proj": 32, "mlp.c_fc": 128, "mlp.c_proj": 32}
    for which in (model, AutoFusedModel.from_pretrained(tmp_path)):
        before = {name: parameter.clone() for name, parameter in which.named_parameters()}
        which.tie_weights()
        which.tie_weights()
        for layer in which.transformer.h:
            assert {name: len(layer.get_submodule(name).bias) for name in sizes} == sizes
        assert all(torch.equal(parameter, before[name]) for name, parameter in which.named_parameters())


def test_5_config_holds_no_parameter_names(tmp_path, model_type):
    """The config names layers and kinds. A parameter name would bind the file to one release of transformers."""
    model = shared_model(model_type)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    text = json.dumps(config["layerfuse_plan"]["edits"])
    parts = {part for name, _ in model.named_parameters() for part in name.split(".") if not part.isdigit()}
    # the kinds are words that some architectures use for modules too
    assert not {part for part in parts - {"attention", "mlp", "layer", "layers"} if f'"{part}"' in text}
    assert "." not in text
    assert "notes" not in config["layerfuse_plan"]


FOREIGN = """
import contextlib, json, sys
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

def attempt(load, **options):
    try:
        _, info = load(sys.argv[1], output_loading_info=True, **options)
        return sorted(info["missing_keys"])
    except Exception as error:
        return f"{type(error).__name__}: {error}"

sized = GPT2Config(n_embd=32, n_layer=6, n_head=4, n_positions=64, vocab_size=64)
results = {
    "auto": [attempt(auto.from_pretrained) for auto in (AutoConfig, AutoModel, AutoModelForCausalLM)],
    "forced": attempt(GPT2LMHeadModel.from_pretrained),
    "sized": attempt(GPT2LMHeadModel.from_pretrained, config=sized),
}
assert "hf_layerfuse" not in sys.modules
print(json.dumps(results))
"""


@pytest.mark.slow
def test_6_stock_transformers_does_not_load_it_by_accident(tmp_path):
    """Without this library, Auto classes refuse the checkpoint, and a stock class forced on it lists the missing
    weights."""
    model = shared_model("gpt2", head="GPT2LMHeadModel")
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "fused_gpt2"
    done = subprocess.run([sys.executable, "-c", FOREIGN, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    for message in results["auto"]:
        assert "`fused_gpt2` but Transformers does not recognize this architecture" in message
    # the stock class does not read the sizes of another model type, and its default ones do not fit
    assert results["forced"].startswith("RuntimeError")
    # with the right sizes given by hand, all matrices that are shared are missing, and transformers shows that
    shared = {name for name, kept in model.all_tied_weights_keys.items() if ".h." in name and name != kept}
    assert len(shared) == 8
    assert set(results["sized"]) == shared
    assert "MISSING" in done.stderr


def test_7_the_mlp_of_bert_spans_two_modules():
    """Sharing BERT's MLPs shares both maps, but not the norm in the same module."""
    model = shared_model("bert", (Fuse("mlp", (1, 3), "share"),))
    one, two = (model.bert.encoder.layer[layer] for layer in (1, 3))
    assert one.intermediate.dense.weight is two.intermediate.dense.weight
    assert one.output.dense.weight is two.output.dense.weight
    assert one.output.LayerNorm.weight is not two.output.LayerNorm.weight
    assert one.attention.self.query.weight is not two.attention.self.query.weight


def test_8_shared_parameters_are_counted_once(model_type):
    """The number of parameters counts unique tensors; `state_dict` lists shared ones at every depth."""
    original = tiny_model(model_type)
    model = apply(original, Plan(model_type, LAYERS, (Fuse("layer", (0, 1, 2, 3, 4, 5), "share"),)))
    unique = {parameter.data_ptr(): parameter.numel() for parameter in model.parameters()}
    assert model.num_parameters() == sum(unique.values())
    matrices = [p.numel() for p in layer_list(model)[0].parameters() if p.ndim >= 2]
    assert original.num_parameters() - model.num_parameters() == (LAYERS - 1) * sum(matrices)
    listed = [sum(tensor.numel() for tensor in which.state_dict().values()) for which in (original, model)]
    assert listed[0] == listed[1]


def test_11_gradients_of_shared_weights_add_up(model_type):
    """The gradient of a shared matrix is the sum over its copies in the equal stock model."""
    model = shared_model(model_type).eval()
    stock = expand(model)
    for which in (model, stock):
        prediction(which(**dummy_inputs(which))).square().mean().backward()
    mine, copies = ([dict(layer.named_parameters()) for layer in layer_list(which)] for which in (model, stock))
    groups = {"attention": [(1, 3), (0, 5), (2,), (4,)], "mlp": [(1, 3), (2, 4), (0,), (5,)]}
    compared = 0
    for kind, depths in groups.items():
        for group in depths:
            for name, parameter in mine[group[0]].items():
                if architecture_for(model).owner(name) == kind and parameter.ndim >= 2:
                    total = sum(copies[depth][name].grad for depth in group)
                    scale = max(copies[depth][name].grad.abs().max() for depth in group)
                    assert scale > 0
                    torch.testing.assert_close(parameter.grad, total, rtol=1e-3, atol=1e-4 * scale.item())
                    compared += len(group) > 1
    assert compared >= 8


PROGRAM = """
import os
import sys
import torch
import torch.distributed as dist
from contextlib import ExitStack
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import GPT2Config, GPT2LMHeadModel
from hf_layerfuse import AutoFusedModel, Blend, Fuse, Plan, apply, linearize_mlps
from hf_layerfuse.training.homotopy import HomotopyPenalty
from hf_layerfuse.training.sharding import one_unit_for_shared, shares_layers, unshard_after

NAMES = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")

CONFIG = GPT2Config(n_embd=32, n_layer=4, n_head=4, n_positions=32, vocab_size=64, bos_token_id=1, eos_token_id=2)

def build():
    torch.manual_seed(0)
    return apply(GPT2LMHeadModel(CONFIG), Plan("gpt2", 4, (Fuse("layer", (1, 3), "share"),)))

def assert_shared(model):
    one, two = model.transformer.h[1], model.transformer.h[3]
    for name in NAMES:
        assert one.get_submodule(name).weight is two.get_submodule(name).weight
        assert one.get_submodule(name).bias is not two.get_submodule(name).bias

def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()

def step(model, optimizer, backward):
    ids = torch.randint(3, 64, (2, 16), generator=torch.Generator().manual_seed(dist.get_rank()))  # other data per rank
    loss = model(input_ids=ids, labels=ids).loss
    backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()

def replicated():
    accelerator = Accelerator()
    assert accelerator.num_processes == 2, accelerator.num_processes
    model = build()
    before = model.transformer.h[1].mlp.c_fc.weight.detach().clone()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), 1e-2))
    assert_shared(accelerator.unwrap_model(model))
    step(model, optimizer, accelerator.backward)
    plain = accelerator.unwrap_model(model)
    assert_shared(plain)
    assert not torch.equal(plain.transformer.h[1].mlp.c_fc.weight, before)
    flat = torch.cat([parameter.detach().flatten() for parameter in plain.parameters()])
    both = accelerator.gather(flat[None])
    assert both.shape[0] == 2
    assert torch.equal(both[0], both[1])

def sharded():
    mesh = init_device_mesh("cpu", (2,))
    model = build()
    try:
        for unit in (*model.transformer.h, model):
            fully_shard(unit, mesh=mesh)
        step(model, None, None)
    except ValueError as error:
        print("refused:", error)
    else:
        raise AssertionError("a shared parameter in two units was accepted")
    model = build()
    layers = model.transformer.h
    for unit in ([layers[1], layers[3]], layers[0], layers[2], model):
        fully_shard(unit, mesh=mesh)
    assert isinstance(layers[1].mlp.c_fc.weight, DTensor)
    assert_shared(model)
    before = whole(layers[3].mlp.c_fc.weight)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    first = step(model, optimizer, lambda loss: loss.backward())
    assert_shared(model)
    assert not torch.equal(whole(layers[3].mlp.c_fc.weight), before)
    for _ in range(3):
        last = step(model, optimizer, lambda loss: loss.backward())
    assert_shared(model)
    assert torch.equal(whole(layers[1].mlp.c_fc.weight), whole(layers[3].mlp.c_fc.weight))
    assert last < first

def prepared(ram_efficient):
    # what Accelerate does on GPUs; on CPU, where it would not shard, it is called by hand
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=ram_efficient
    )
    rank = dist.get_rank()
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="no", is_main_process=rank == 0,
        device=torch.device("cpu"), torch_device_mesh=None,
    )
    model = build().eval()
    ids = torch.randint(3, 64, (2, 16), generator=torch.Generator().manual_seed(0))
    expected = model(input_ids=ids, labels=ids).loss
    try:
        fsdp2_prepare_model(accelerator, build())(input_ids=ids)
    except ValueError as error:
        print("refused:", error)
    else:
        raise AssertionError("Accelerate knows what to do with shared layers: one_unit_for_shared is not needed")
    before = plugin.transformer_cls_names_to_wrap
    stack = ExitStack()
    student = model
    stack.enter_context(unshard_after(student, True))
    with one_unit_for_shared(model, plugin):
        model = fsdp2_prepare_model(accelerator, model)
    assert plugin.transformer_cls_names_to_wrap == before
    assert isinstance(model.transformer.h[1].mlp.c_fc.weight, DTensor)
    assert_shared(model)
    # before any forward pass, after which the parameters of the root are whole ones
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids, labels=ids).loss, expected.detach())
    first = step(model, optimizer, lambda loss: loss.backward())
    for _ in range(3):
        last = step(model, optimizer, lambda loss: loss.backward())
    assert_shared(model)
    assert last < first
    with torch.no_grad():
        learnt = model(input_ids=ids, labels=ids).loss
    assert model is student
    stack.close()
    assert type(student) is type(build())
    assert not any(isinstance(module, FSDPModule) for module in student.modules())
    assert not any(isinstance(tensor, DTensor) for tensor in student.state_dict().values())
    assert_shared(student)
    if rank == 0:  # alone, which a sharded model could not do
        with torch.no_grad():
            torch.testing.assert_close(student(input_ids=ids, labels=ids).loss, learnt)
        with TemporaryDirectory() as folder:
            student.save_pretrained(folder)
            again = AutoFusedModel.from_pretrained(folder)
        assert torch.equal(again.transformer.h[3].mlp.c_fc.weight, student.transformer.h[1].mlp.c_fc.weight)
    alone = GPT2LMHeadModel(CONFIG)
    assert not shares_layers(alone)
    with one_unit_for_shared(alone, plugin):
        alone = fsdp2_prepare_model(accelerator, alone)
    assert all(isinstance(layer, FSDPModule) for layer in alone.transformer.h)

def linearised():
    mesh = init_device_mesh("cpu", (2,))
    ids = torch.randint(3, 64, (2, 16), generator=torch.Generator().manual_seed(0))
    found = []
    for split in (False, True):
        torch.manual_seed(0)
        plan = Plan("gpt2", 4, (Blend(1, faithful=True), Blend(3, faithful=True)))
        model = apply(GPT2LMHeadModel(CONFIG).eval(), plan)
        student, penalty = model, HomotopyPenalty(model, 40.0, progressive=True)
        with unshard_after(model, split):
            if split:
                for unit in (*model.transformer.h, model):
                    fully_shard(unit, mesh=mesh)
                assert all(isinstance(a, DTensor) for a in penalty.parameters)
            optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.0)
            way = []
            for done in range(8):
                model(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
                penalty.step(1e-2, (done + 1) / 8)
                optimizer.zero_grad()
                way.append([*penalty.values.values()])
        found.append((way, student(input_ids=ids).logits.detach()))
        if split:
            plan = linearize_mlps(student, threshold=0.5)[1]
            assert [edit.layer for edit in plan.edits] == [1, 3]
    (plain, logits), (both, again) = found
    assert plain[3][0] == plain[0][0] < 0.02 and plain[3][1] > 0.9, plain  # the last layer comes first
    torch.testing.assert_close(torch.tensor(both), torch.tensor(plain), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again, logits, rtol=1e-3, atol=1e-3)

if sys.argv[1] == "replicated":
    replicated()
else:
    dist.init_process_group("gloo")
    parts = {"sharded": sharded, "linearised": linearised}
    parts.get(sys.argv[1], lambda: prepared(sys.argv[1] == "ram efficient"))()
dist.barrier()
dist.destroy_process_group()
# Everything has been asserted. Gloo's worker threads may still hold tensors that Python owns (FSDP2 keeps the group
# alive), and a thread that lets go of one while the interpreter ends aborts the process: torch's, now and then.
sys.stdout.flush()
os._exit(0)
"""


REFUSED = "is shared with a parameter already managed by another FSDP group"


@pytest.mark.slow
def test_12_two_processes_keep_shared_weights_shared(tmp_path):
    """Under Accelerate with two processes, shared weights stay one tensor through a step, and are equal on both."""
    on_two_processes(tmp_path, PROGRAM, "replicated")


@pytest.mark.slow
def test_12_sharded_training_needs_one_unit_for_layers_that_share(tmp_path):
    """FSDP2 refuses a shared parameter in two units. With the sharing layers in one unit, it trains and the ties
    remain."""
    assert on_two_processes(tmp_path, PROGRAM, "sharded").count(REFUSED) == 2


@pytest.mark.slow
def test_12_sharded_activations_are_linearised_as_whole_ones(tmp_path):
    """Under FSDP2, each a moves to 1, one layer after the other, and read as on a single process."""
    on_two_processes(tmp_path, PROGRAM, "linearised")


@pytest.mark.slow
@pytest.mark.parametrize("loading", ["plain", "ram efficient"])
def test_12_accelerate_shards_what_shares_as_one_unit(tmp_path, loading):
    """Accelerate's own FSDP2 wrapping fails with shared layers; `one_unit_for_shared` trains them. Layers that share
    nothing are separate units."""
    assert on_two_processes(tmp_path, PROGRAM, loading).count(REFUSED) == 2


def test_13_layers_that_differ_by_config_need_a_class_that_reads_them():
    """Llama reads no `per_layer_config`: its classes ignore `skip`, and cannot be built with other fields in it."""
    model = causal_lm("llama")
    for fields, words in (
        ({"intermediate_size": 24}, "per_layer_config makes layers differ in intermediate_size, and LlamaForCausalLM"),
        ({"skip": ["mlp"]}, "per_layer_config skips mlp in layer 2, and no model of Transformers reads `skip`"),
    ):
        model.config.per_layer_config = {2: fields}
        assert model.config.is_heterogeneous
        for attempt in (
            lambda: fuse(model, keep_layers=3),
            lambda: apply(model, Plan("llama", LAYERS, (Drop("layer", 2),))),
        ):
            with pytest.raises(UnsupportedModelError, match=words):
                attempt()


def test_attention_that_depends_on_its_depth_is_refused():
    """GPT-2 with `scale_attn_by_inverse_layer_idx` divides by the depth, which fusion changes; the error gives the next
    step."""
    model = causal_lm("gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(
        UnsupportedModelError, match=r"scale_attn_by_inverse_layer_idx=True .*multiply the query weights"
    ):
        fuse(model, keep_layers=3)
    # the advice: the scale moved into the query weights and biases gives the same model
    stock = causal_lm("gpt2")
    for depth, layer in enumerate(stock.transformer.h):
        layer.attn.c_attn.weight.data[:, :32] /= depth + 1
        layer.attn.c_attn.bias.data[:32] /= depth + 1
    ids = dummy_inputs(model)
    with torch.inference_mode():
        torch.testing.assert_close(stock(**ids).logits, model(**ids).logits)
    assert fuse(stock, keep_layers=3).config.num_hidden_layers == 3
