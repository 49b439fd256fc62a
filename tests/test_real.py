"""Real checkpoints on real data: published results, and minimum quality after fusing."""

import lzma

import pytest
import torch
from transformers import AutoTokenizer

from hf_layerfuse import AutoFusedModel, Drop, FusionRecipe, Plan, apply, fuse
from hf_layerfuse.data.labels import class_names
from hf_layerfuse.data.prepare import loader, prepare
from hf_layerfuse.data.splits import load_splits
from hf_layerfuse.evaluation.metrics import bytes_on_disk, classification, perplexity
from hf_layerfuse.recipe import DataRecipe

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sentiment(shared):
    """MiniLM fine-tuned on SST-2, and the batches of its validation split."""
    path = shared / "models" / "minilm-l6-sst2"
    model = AutoFusedModel.from_pretrained(path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path)
    file = str(shared / "data" / "sst2" / "dev.tsv")
    data = DataRecipe(train=file, validation=file, text_column="sentence", max_length=128)
    task = "text-classification"
    rows = load_splits(data, task, 0, classes=class_names(model.config))["validation"]
    rows = prepare(rows, tokenizer, data, task, training=False)
    return model, list(loader(rows, tokenizer, 64, shuffle=False, seed=0, task=task))


def test_bert_and_its_dropped_mlps(sentiment):
    """The accuracy is the published 89.56%, and 89.79% and 86.70% without the MLP of layer 0 or 2; the norm after it
    stays."""
    model, batches = sentiment
    assert classification(model, batches)["accuracy"] == pytest.approx(0.8956, abs=5e-5)
    for layer, accuracy in ((0, 0.8979), (2, 0.8670)):
        dropped = apply(model, Plan("bert", 6, (Drop("mlp", layer),)))
        assert classification(dropped, batches)["accuracy"] == pytest.approx(accuracy, abs=5e-5)


@pytest.mark.parametrize("mode", ["depth", "share"])
def test_bert_with_four_of_six_layers(sentiment, tmp_path, mode):
    """Without healing, the result is far above chance; reloaded from disk, it has the same accuracy, and is smaller."""
    model, batches = sentiment
    small = fuse(model, keep_layers=4, mode=mode, effort="low", batches=batches)
    scores = classification(small, batches)
    assert scores["accuracy"] > 0.8
    small.save_pretrained(tmp_path / "small")
    model.save_pretrained(tmp_path / "original")
    assert classification(AutoFusedModel.from_pretrained(tmp_path / "small"), batches) == scores
    assert bytes_on_disk(tmp_path / "small") < 0.86 * bytes_on_disk(tmp_path / "original")


def test_gpt2_with_eight_of_twelve_layers(shared):
    """Fusing with calibration data keeps GPT-2 below twice its perplexity; averaging the same layers does not."""
    path = shared / "models" / "gpt2-wikitext2"
    model = AutoFusedModel.from_pretrained(path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path)
    text = lzma.decompress((shared / "data" / "wikitext2" / "valid.txt.xz").read_bytes()).decode()
    ids = tokenizer(text, verbose=False)["input_ids"]
    batches = [{"input_ids": torch.tensor(ids[-16 * 256 :]).view(16, 256)}]

    def score(which):
        options = {"max_length": 256, "batch_size": 16, "max_windows": 32, "bf16": True}
        return perplexity(which, tokenizer, text, **options)["token_perplexity"]

    plain = {"operator": "freeze", "cluster": "adjacent", "refit": "none", "effort": "low"}
    recipe = FusionRecipe(keep_layers=8, similarity="block_influence", **plain)
    original, frozen = score(model), score(fuse(model, recipe, batches=batches))
    averaged = score(fuse(model, recipe, batches=batches, operator="mean"))
    assert frozen < 2 * original
    assert averaged > frozen
