"""Saving, loading and using fused checkpoints, with and without this library."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import LAYERS, TINY, heads_of, in_turn, network, tiny_model
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    ViTImageProcessorPil,
    pipeline,
)

from hf_layerfuse import (
    AutoFusedModel,
    CheckpointError,
    ConvGraphArchitecture,
    Drop,
    Fuse,
    FusionRecipe,
    LayerFuseError,
    MergeConvs,
    Plan,
    PlanError,
    RecipeError,
    apply,
    architecture_for,
)
from hf_layerfuse.evaluation.dummy_inputs import dummy_inputs
from hf_layerfuse.models.verify import prediction
from hf_layerfuse.plan import CONV_GRAPH_KINDS

SHARE = (Fuse("layer", (1, 3), "share", "mean"), Fuse("mlp", (4, 5), "share"))
PARTS = (Drop("attention", 0), Fuse("mlp", (3, 4)))
RESIDUAL = (Fuse("layer", (1, 3), "share", "mean", rank=3),)
BASIS = (Fuse("layer", (0, 2, 4), "basis", rank=8),)


def fused(model_type, edits=SHARE, head=None, **changes):
    return apply(tiny_model(model_type, head, **changes), Plan(model_type, LAYERS, edits))


def outputs(model):
    with torch.inference_mode():
        return prediction(model(**dummy_inputs(model)))


def python(code, *args):
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_fresh_process_gives_the_same_logits(tmp_path):
    """A new process with only the path and the library computes the outputs to the bit, with the right class."""
    every = [SHARE, PARTS, (Fuse("layer", (1, 2)),), RESIDUAL, BASIS]
    models = [
        fused(model_type, edits, heads_of(model_type)[-1])
        for model_type, edits in in_turn(every, rest=[name for name in TINY if name != "gpt2"])
    ]
    for name in ("bottleneck", "mobilenet"):
        model = copy.deepcopy(network(name)).float()
        graph = architecture_for(model, ConvGraphArchitecture).convolutions(model).graph(model)
        start, end = next((i, j) for i, j in graph.segments() if j - i == 2)
        edit = MergeConvs(start, end, (start + 1, end))
        models.append(apply(model, Plan(model.config.model_type, len(graph.nodes), (edit,), kinds=CONV_GRAPH_KINDS)))
    for i, model in enumerate(models):
        model.save_pretrained(tmp_path / str(i))
        torch.save(outputs(model), tmp_path / f"{i}.pt")
    code = (
        "import sys, torch\n"
        "torch.set_num_threads(1)\n"
        "from hf_layerfuse import AutoFusedModel\n"
        "from hf_layerfuse.evaluation.dummy_inputs import dummy_inputs\n"
        "from hf_layerfuse.evaluation.divergence import prediction\n"
        "for path in sys.argv[1:]:\n"
        "    model = AutoFusedModel.from_pretrained(path)\n"
        "    with torch.inference_mode(): got = prediction(model(**dummy_inputs(model)))\n"
        "    assert torch.equal(got, torch.load(path + '.pt', weights_only=True))\n"
        "    print(type(model).__name__)\n"
    )
    done = python(code, *(tmp_path / str(i) for i in range(len(models))))
    assert done.stdout.split() == [type(model).__name__ for model in models], done.stderr


@pytest.mark.slow
def test_without_the_library(tmp_path):
    """Stock transformers loads depth-fused and expanded checkpoints, and refuses the others by their model type."""
    for name, model, options in (
        ("depth", fused("gpt2", (Fuse("layer", (1, 2)), Drop("layer", 4)), "GPT2Model"), {}),
        ("expanded", fused("gpt2", SHARE, "GPT2Model"), {"expanded": True}),
        ("shared", fused("gpt2", SHARE, "GPT2Model"), {}),
    ):
        model.save_pretrained(tmp_path / name, **options)
        torch.save(outputs(model), tmp_path / f"{name}.pt")
    code = (
        "import json, sys, torch\n"
        "torch.set_num_threads(1)\n"
        "from transformers import AutoModel\n"
        "ids = torch.tensor(json.loads(sys.argv[1]))\n"
        "for path in sys.argv[2:]:\n"
        "    model = AutoModel.from_pretrained(path)\n"
        "    with torch.inference_mode(): got = model(ids)[0]\n"
        "    assert torch.equal(got, torch.load(path + '.pt', weights_only=True))\n"
        "    assert 'hf_layerfuse' not in sys.modules\n"
        "    print(path)\n"
    )
    ids = dummy_inputs(fused("gpt2", SHARE, "GPT2Model"))["input_ids"].tolist()
    done = python(code, ids, *(tmp_path / name for name in ("depth", "expanded", "shared")))
    assert done.stdout.split() == [str(tmp_path / name) for name in ("depth", "expanded")], done.stderr
    assert done.returncode != 0
    assert "fused_gpt2" in done.stderr
    assert "does not recognize this architecture" in done.stderr


def test_auto_classes_and_pipelines(tmp_path):
    """After `import hf_layerfuse`, the ordinary Auto classes and pipeline() load fused checkpoints."""
    vocabulary = {f"w{i}": i for i in range(63)} | {"<unk>": 63}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="w0", eos_token="w2")

    cases = [
        ("gpt2", "GPT2LMHeadModel", AutoModelForCausalLM, "text-generation"),
        ("bert", "BertForSequenceClassification", AutoModelForSequenceClassification, "text-classification"),
        ("vit", "ViTForImageClassification", AutoModelForImageClassification, "image-classification"),
        ("roberta", "RobertaModel", AutoModel, "feature-extraction"),
    ]
    for model_type, head, auto_class, task in cases:
        path = tmp_path / head
        model = fused(model_type, SHARE, head)
        model.save_pretrained(path)
        if model_type == "vit":
            ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(path)
        else:
            tokenizer.save_pretrained(path)
        loaded = auto_class.from_pretrained(path)
        assert type(loaded) is type(model)
        assert torch.equal(outputs(loaded), outputs(model))
        if model_type == "vit":
            from PIL import Image

            answer = pipeline(task, str(path))(Image.new("RGB", (10, 10)))
        elif task == "text-generation":
            answer = pipeline(task, str(path))("w5 w6", max_new_tokens=3, max_length=None)
        else:
            answer = pipeline(task, str(path))("w5 w6")
        assert answer


def test_another_head_on_a_fused_base(tmp_path):
    """As with stock checkpoints, another head loads the body and is initialised."""
    fused("bert", SHARE, "BertModel").save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(model).__name__ == "FusedBertForSequenceClassification"
    body = AutoFusedModel.from_pretrained(tmp_path)
    assert torch.equal(model.bert.encoder.layer[3].output.dense.weight, body.encoder.layer[1].output.dense.weight)


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "vit"])
def test_sharded_dtype_and_device_map(tmp_path, model_type):
    """Sharded checkpoints, another dtype and a device map load, and each shared weight is one tensor."""
    model = fused(model_type)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    for options in ({}, {"dtype": torch.bfloat16}, {"device_map": "cpu"}, {"device_map": "auto"}):
        loaded = AutoFusedModel.from_pretrained(tmp_path, **options)
        assert loaded.num_parameters() == model.num_parameters()
        assert loaded.dtype == options.get("dtype", torch.float32)
        if "dtype" not in options:
            assert torch.equal(outputs(loaded), outputs(model))


def test_file_holds_shared_weights_once(tmp_path):
    """The file of a shared model is smaller by the shared weights, and ViT keeps its names on disk."""
    model = tiny_model("vit", "ViTForImageClassification")
    shared = apply(model, Plan("vit", LAYERS, SHARE))
    model.save_pretrained(tmp_path / "original")
    shared.save_pretrained(tmp_path / "shared")
    shared.save_pretrained(tmp_path / "expanded", expanded=True)
    names = {}
    for name in ("original", "shared", "expanded"):
        with safe_open(tmp_path / name / "model.safetensors", "pt") as file:
            names[name] = set(file.keys())
    assert names["expanded"] == names["original"]
    assert names["shared"] < names["original"]
    # six matrices of layer 3 and two of layer 5's MLP are the copies
    assert len(names["original"] - names["shared"]) == 8
    assert all(".encoder.layer." in name for name in names["original"] - names["shared"])


def test_fuses_at_load(tmp_path):
    """`AutoFusedModel.from_pretrained(path, recipe=...)` equals loading and then fusing."""
    model = tiny_model("gpt2")
    model.save_pretrained(tmp_path)
    small = AutoFusedModel.from_pretrained(tmp_path, recipe=FusionRecipe(keep_layers=3))
    assert type(small) is type(model)
    assert small.config.num_hidden_layers == 3
    with pytest.raises(RecipeError, match="without recipe"):
        AutoFusedModel.from_pretrained(tmp_path, batches=[])
    with pytest.raises(RecipeError, match="output_loading_info"):
        AutoFusedModel.from_pretrained(tmp_path, recipe=FusionRecipe(keep_layers=3), output_loading_info=True)


def test_loading_info(tmp_path):
    """`output_loading_info` works as in transformers, and tied copies do not count as missing."""
    fused("llama").save_pretrained(tmp_path)
    _, info = AutoFusedModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def damage(path: Path, **changes):
    config = json.loads((path / "config.json").read_text())
    config["layerfuse_plan"].update(changes.pop("plan", {}))
    (path / "config.json").write_text(json.dumps(config | changes))


def test_bad_checkpoints(tmp_path):
    """Missing, empty, truncated, tampered and foreign checkpoints each have their own clear error."""
    model = fused("gpt2")

    def load(name, **options):
        return AutoFusedModel.from_pretrained(tmp_path / name, **options)

    with pytest.raises(CheckpointError, match="there is no directory"):
        load("nowhere")
    with pytest.raises(CheckpointError, match="cannot load a model"):
        AutoFusedModel.from_pretrained("nobody/nothing")  # the network is off
    with pytest.raises(CheckpointError, match="in memory already"):
        AutoFusedModel.from_pretrained(model)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load("empty")
    (tmp_path / "not-json").mkdir()
    (tmp_path / "not-json" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not a valid JSON"):
        load("not-json")

    for name in ("truncated", "no-weights", "newer", "foreign", "depth", "less", "class"):
        model.save_pretrained(tmp_path / name)
    weights = tmp_path / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"incomplete|header|buffer"):
        load("truncated")
    model.save_pretrained(tmp_path / "sizes")
    damage(tmp_path / "sizes", n_embd=16)
    with pytest.raises(CheckpointError, match="mismatch"):
        load("sizes")
    damage(tmp_path / "sizes", n_embd="abc")
    with pytest.raises(CheckpointError, match=r"n_embd|hidden_size"):
        load("sizes")
    (tmp_path / "no-weights" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load("no-weights")
    damage(tmp_path / "newer", plan={"format_version": 99})
    with pytest.raises(PlanError, match="upgrade"):
        load("newer")
    damage(tmp_path / "foreign", plan={"model_type": "bert"})
    with pytest.raises(PlanError, match="bert"):
        load("foreign")
    damage(tmp_path / "depth", n_layer=4)
    with pytest.raises(PlanError, match="num_hidden_layers is 4"):
        load("depth")
    # a plan that shares less than the saved file, so that weights are missing
    damage(tmp_path / "less", plan={"edits": []})
    with pytest.raises(CheckpointError, match="lacks weights"):
        load("less")
    damage(tmp_path / "class", architectures=["FusedGPT2ForTeaMaking"])
    with pytest.raises(CheckpointError, match="TeaMaking"):
        load("class")


def test_takes_the_arguments_of_transformers(tmp_path):
    """Config fields, a given config, and the data type by either name work as in the Auto classes."""
    tiny_model("gpt2", "GPT2LMHeadModel").save_pretrained(tmp_path)
    assert AutoFusedModel.from_pretrained(tmp_path, output_hidden_states=True).config.output_hidden_states
    config = AutoConfig.from_pretrained(tmp_path, embd_pdrop=0.5)
    assert AutoFusedModel.from_pretrained(tmp_path, config=config).config.embd_pdrop == 0.5
    assert AutoFusedModel.from_pretrained(tmp_path, config=str(tmp_path)).config.embd_pdrop == 0.1
    assert AutoFusedModel.from_pretrained(tmp_path, dtype="bfloat16").dtype == torch.bfloat16
    assert AutoFusedModel.from_pretrained(tmp_path, attn_implementation="eager").config._attn_implementation == "eager"


def test_only_a_body_may_lack_its_pooler(tmp_path):
    """Published bodies may lack a pooler; a classifier without one would give random answers."""
    for head, prefix in (("BertModel", ""), ("BertForSequenceClassification", "bert.")):
        model = tiny_model("bert", head)
        weights = {k: v for k, v in model.state_dict().items() if not k.startswith(f"{prefix}pooler.")}
        model.save_pretrained(tmp_path / head, state_dict=weights)
    assert AutoFusedModel.from_pretrained(tmp_path / "BertModel")
    with pytest.raises(CheckpointError, match=r"bert\.pooler"):
        AutoFusedModel.from_pretrained(tmp_path / "BertForSequenceClassification")


def test_pickle_is_never_read(tmp_path):
    """A checkpoint with only pickled weights is refused."""
    fused("gpt2").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "model.old")
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(LayerFuseError, match="safetensors"):
        AutoFusedModel.from_pretrained(tmp_path)


GENERATING = {
    "depth": (Fuse("layer", (1, 2)), Drop("layer", 0)),
    "share": SHARE,
    "attention": (Drop("attention", 0), Drop("attention", 4)),
    "no-full-attention": (Drop("attention", 0), Drop("attention", 1), Drop("attention", 2)),
    "no-sliding-attention": (Drop("attention", 3), Drop("attention", 4), Drop("attention", 5)),
    "across-types": (Fuse("attention", (2, 3)), Drop("mlp", 0)),
}
WINDOWED = ["MistralForCausalLM", "Qwen2ForCausalLM"]


@pytest.mark.parametrize(
    ("causal_lm", "name"),
    in_turn(GENERATING, WINDOWED, ["GPT2LMHeadModel", "LlamaForCausalLM", "Qwen3ForCausalLM"]),
    indirect=["causal_lm"],
)
def test_generation_with_caches(causal_lm, name):
    """Greedy decoding with a dynamic or a static cache, also past the sliding window, equals decoding without a
    cache."""
    model = apply(causal_lm, Plan(causal_lm.config.model_type, LAYERS, GENERATING[name]))
    ids = dummy_inputs(model, 2, 9)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :3] = 0  # left padding
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "eos_token_id": -1}
    uncached = model.generate(ids, use_cache=False, **options)
    assert torch.equal(model.generate(ids, **options), uncached)
    assert torch.equal(model.generate(ids, cache_implementation="static", **options), uncached)
    if "layer_types" in model.config:
        assert len(model.config.layer_types) == model.config.num_hidden_layers
