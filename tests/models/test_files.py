"""Checkpoints as people have them: no class in the config, another data type, pointers, adapters, pickles, `~`."""

import json
from pathlib import Path

import pytest
import torch
from helpers import LAYERS, heads_of, tiny_model
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel, PreTrainedModel

from hf_layerfuse import AutoFusedModel, CheckpointError, Fuse, Plan, apply
from hf_layerfuse.models.files import stored_dtype, stored_names

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'ab' * 32}\nsize 548105171\n"


def change_config(path: Path, **fields: object) -> None:
    """Set fields of a config.json; None removes one."""
    config = json.loads((path / "config.json").read_text()) | fields
    (path / "config.json").write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


UNIQUE = [
    ("gpt2", "GPT2Model"),
    ("gpt2", "GPT2LMHeadModel"),  # tied: the file holds no weight of the head
    ("gpt2", "GPT2ForTokenClassification"),
    ("bert", "BertModel"),
    ("bert", "BertForPreTraining"),
    ("bert", "BertForTokenClassification"),
    ("llama", "LlamaModel"),
    ("llama", "LlamaForCausalLM"),
    ("llama", "LlamaForQuestionAnswering"),
    ("vit", "ViTModel"),
    ("vit", "ViTForImageClassification"),
]


@pytest.mark.parametrize(("model_type", "head"), UNIQUE)
def test_head_of_a_config_without_a_class(tmp_path: Path, model_type: str, head: str) -> None:
    """The class that takes all weights of the file is loaded, and its outputs are those of the saved model."""
    model = tiny_model(model_type, head)
    model.save_pretrained(tmp_path)
    change_config(tmp_path, architectures=None)
    loaded = AutoFusedModel.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("model_type", ["gpt2", "roberta", "distilbert", "deit", "mistral", "qwen3"])
def test_no_head_is_lost(tmp_path: Path, model_type: str) -> None:
    """Each class of an architecture is found, or refused by name where several take the same weights."""
    for number, head in enumerate(heads_of(model_type)):
        model: PreTrainedModel = tiny_model(model_type, head)
        path = tmp_path / str(number)
        model.save_pretrained(path)
        change_config(path, architectures=None)
        found = _loaded(path)
        assert found is head or (isinstance(found, str) and (head.__name__ in found or "no class fits" in found))


def _loaded(path: Path) -> type | str:
    """The class that a checkpoint loads as, or the message that refuses it."""
    try:
        return type(AutoFusedModel.from_pretrained(path))
    except CheckpointError as error:
        return str(error)


def test_fused_head_of_a_config_without_a_class(tmp_path: Path) -> None:
    model = apply(tiny_model("llama", "LlamaForCausalLM"), Plan("llama", LAYERS, (Fuse("layer", (1, 2), "share"),)))
    model.save_pretrained(tmp_path)
    change_config(tmp_path, architectures=None)
    assert type(AutoFusedModel.from_pretrained(tmp_path)) is type(model)


def test_layers_that_the_config_does_not_have_are_refused(tmp_path: Path) -> None:
    """A config cut by hand would load a truncated model; through an Auto class and for a body as well."""
    tiny_model("llama", "LlamaForCausalLM").save_pretrained(tmp_path)
    change_config(tmp_path, num_hidden_layers=4)
    with pytest.raises(CheckpointError, match=r"layers that its config does not have.*num_hidden_layers=4"):
        AutoFusedModel.from_pretrained(tmp_path)
    change_config(tmp_path, architectures=["LlamaModel"])
    with pytest.raises(CheckpointError, match="layers that its config does not have"):
        AutoFusedModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stated", [None, "float32", "bfloat16"])
def test_data_type_of_a_file(tmp_path: Path, stored: torch.dtype, stated: str | None) -> None:
    """The file decides, whatever its config says, in one file or in several."""
    model = tiny_model("gpt2", "GPT2LMHeadModel").to(stored)
    for name, size in (("one", "5GB"), ("several", "20KB")):
        model.save_pretrained(tmp_path / name, max_shard_size=size)
        change_config(tmp_path / name, dtype=stated)
        assert stored_dtype(str(tmp_path / name)) == stored
    files = list((tmp_path / "several").glob("*.safetensors"))
    assert len(files) > 1
    assert sorted(stored_names(str(tmp_path / "several"))) == sorted(name for file in files for name in load_file(file))


def test_data_type_without_safetensors(tmp_path: Path) -> None:
    assert stored_dtype(str(tmp_path)) is None


def save(path: Path) -> None:
    tiny_model("gpt2", "GPT2LMHeadModel").save_pretrained(path)


def weights_as_pointer(path: Path) -> None:
    save(path)
    (path / "model.safetensors").write_text(POINTER)


def config_as_pointer(path: Path) -> None:
    save(path)
    (path / "config.json").write_text(POINTER)


def adapters(path: Path) -> None:
    path.mkdir()
    (path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "gpt2"}')
    (path / "adapter_model.safetensors").write_bytes(b"")


def pickled(path: Path) -> None:
    save(path)
    (path / "model.safetensors").unlink()
    torch.save(tiny_model("gpt2", "GPT2LMHeadModel").state_dict(), path / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (weights_as_pointer, r"model\.safetensors in .* is a pointer of git-lfs.*git lfs pull"),
        (config_as_pointer, r"config\.json in .* is a pointer of git-lfs"),
        (adapters, "PEFT adapters, not a model.*merge_and_unload"),
        (pickled, r"its weights in pytorch_model\.bin.*use_safetensors=False"),
        (lambda path: torch.save({}, path), "is a file: give its directory"),
    ],
    ids=["weights", "config", "adapters", "pickle", "file"],
)
def test_what_is_no_checkpoint_is_named(tmp_path: Path, make, message: str) -> None:
    """The error says what the directory holds, and the next step."""
    make(tmp_path / "model")
    with pytest.raises(CheckpointError, match=message):
        AutoFusedModel.from_pretrained(tmp_path / "model")


def test_the_advice_for_pickled_weights_works(tmp_path: Path) -> None:
    pickled(tmp_path / "model")
    AutoFusedModel.from_pretrained(tmp_path / "model", use_safetensors=False).save_pretrained(tmp_path / "safe")
    assert AutoFusedModel.from_pretrained(tmp_path / "safe")


def test_pickled_weights_of_a_head_are_not_lost(tmp_path: Path) -> None:
    """Names in a pickle are known only when it is loaded."""
    pickled(tmp_path)
    change_config(tmp_path, architectures=None)
    torch.save(tiny_model("llama", "LlamaForCausalLM").state_dict(), tmp_path / "pytorch_model.bin")
    tiny_model("llama").config.save_pretrained(tmp_path)
    change_config(tmp_path, architectures=None)
    with pytest.raises(CheckpointError, match=r"LlamaModel has no place for lm_head\.weight"):
        AutoFusedModel.from_pretrained(tmp_path, use_safetensors=False)


def test_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`~` is the home directory, which a shell writes out only at the start of a word."""
    monkeypatch.setenv("HOME", str(tmp_path))
    save(tmp_path / "model")
    assert isinstance(AutoFusedModel.from_pretrained("~/model"), GPT2LMHeadModel)
