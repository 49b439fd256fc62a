"""Example inputs run through every head class of every supported architecture."""

import inspect
from importlib import import_module

import pytest
import torch
from helpers import tiny_model
from torch import nn
from transformers import PreTrainedModel

from hf_layerfuse import verify
from hf_layerfuse.errors import UnsupportedModelError
from hf_layerfuse.evaluation.dummy_inputs import dummy_inputs
from hf_layerfuse.evaluation.latency import latency

_WIDTH = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
_TEXT = {"vocab_size": 60, "max_position_embeddings": 24, "pad_token_id": 1}
_IMAGE = {"image_size": 8, "patch_size": 4, "encoder_stride": 4}
_DECODER = {**_WIDTH, **_TEXT, "num_key_value_heads": 1}

ARCHITECTURES = {
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 24, "vocab_size": 60, "pad_token_id": 1},
    "bert": {**_WIDTH, **_TEXT},
    "roberta": {**_WIDTH, **_TEXT},
    "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, **_TEXT},
    "vit": {**_WIDTH, **_IMAGE},
    "deit": {**_WIDTH, **_IMAGE},
    "llama": _DECODER,
    "mistral": _DECODER,
    "qwen2": _DECODER,
    "qwen3": {**_DECODER, "head_dim": 8},
}


def _heads() -> list[tuple[str, str]]:
    found = []
    for architecture in ARCHITECTURES:
        module = import_module(f"transformers.models.{architecture}.modeling_{architecture}")
        for name in module.__all__:
            member = getattr(module, name)
            if inspect.isclass(member) and issubclass(member, PreTrainedModel) and "PreTrainedModel" not in name:
                found.append((architecture, name))
    return found


def _build(architecture: str, class_name: str) -> PreTrainedModel:
    module = import_module(f"transformers.models.{architecture}.modeling_{architecture}")
    head = getattr(module, class_name)
    torch.manual_seed(0)
    return head(head.config_class(**ARCHITECTURES[architecture])).eval()


@pytest.mark.parametrize(("architecture", "class_name"), _heads())
def test_every_head_accepts_its_example(architecture: str, class_name: str) -> None:
    """The batch runs, every output is finite, and a batch of three has three rows."""
    model = _build(architecture, class_name)
    batch = dummy_inputs(model, batch_size=3, sequence_length=100, seed=1)
    with torch.inference_mode():
        outputs = model(**batch)
    first = next(value for value in outputs.to_tuple() if isinstance(value, torch.Tensor) and value.dim() > 0)
    assert first.shape[0] == 3
    assert first.isfinite().all()


def test_the_same_seed_gives_the_same_batch_without_padding() -> None:
    """Two calls agree, another seed differs, and no token is the padding token."""
    model = _build("roberta", "RobertaModel")
    batch, again = (dummy_inputs(model, 8, 16, seed=3)["input_ids"] for _ in range(2))
    assert torch.equal(batch, again)
    assert not torch.equal(batch, dummy_inputs(model, 8, 16, seed=4)["input_ids"])
    assert (batch != model.config.pad_token_id).all()


def test_length_is_capped_by_the_positions_that_can_be_used() -> None:
    """RoBERTa with 24 positions and padding id 1 reads 22 tokens at most; BERT reads all 24."""
    assert dummy_inputs(_build("roberta", "RobertaModel"), 1, 100)["input_ids"].shape == (1, 22)
    assert dummy_inputs(_build("bert", "BertModel"), 1, 100)["input_ids"].shape == (1, 24)
    assert dummy_inputs(_build("gpt2", "GPT2Model"), 1, 10)["input_ids"].shape == (1, 10)


def test_images_have_the_dtype_of_the_model() -> None:
    """A half-precision image model gets half-precision pixels."""
    model = _build("vit", "ViTModel").to(torch.bfloat16)
    assert dummy_inputs(model)["pixel_values"].dtype == torch.bfloat16


def test_other_inputs_are_refused() -> None:
    """A module without a main input gives an error that says which inputs exist."""
    with pytest.raises(UnsupportedModelError, match="pixel_values"):
        dummy_inputs(nn.Linear(2, 2))


def test_a_model_that_cannot_run_is_named(monkeypatch):
    """Its own errors become one that names the model and the config; errors of the library stay as they are."""
    model = tiny_model("gpt2")

    def broken(*_, **__):
        raise TypeError("'NoneType' object cannot be interpreted as an integer")

    monkeypatch.setattr(model, "forward", broken)
    for call in (verify, latency):
        with pytest.raises(UnsupportedModelError, match=r"GPT2\w+ cannot run: TypeError: .*correct its config.json"):
            call(model)
