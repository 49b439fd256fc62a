"""Random draws for a row depend only on the seed, the epoch and the row; batches otherwise hold the rows unchanged."""

import json

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hf_layerfuse.data.collate import ROW, CollateImages, CollateText
from hf_layerfuse.data.prepare import loader, prepare
from hf_layerfuse.data.splits import load_splits
from hf_layerfuse.errors import DataError
from hf_layerfuse.recipe import DataRecipe

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]", *(f"w{i}" for i in range(200)), "##y"]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Words w0 to w199. Each may end in y, which is a token of its own. Sentences are between [CLS] and [SEP]."""
    ids = {word: i for i, word in enumerate(WORDS)}
    backend = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])]
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", model_max_length=64, **names)


def text_rows(count: int, length: int = 40) -> list[dict]:
    ids = torch.randint(5, 205, (count, length), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": [1, *row.tolist(), 2], ROW: i} for i, row in enumerate(ids)]


def test_masked_words(tokenizer):
    """15% of the words are labels: 80% of these are hidden, 10% replaced, 10% unchanged. All other words are
    unchanged."""
    rows = text_rows(400)
    batch = CollateText(tokenizer, masks=True)(rows)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    ids = torch.tensor([row["input_ids"] for row in rows])
    chosen = batch["labels"] != -100
    assert torch.equal(batch["labels"][chosen], ids[chosen])
    assert torch.equal(batch["input_ids"][~chosen], ids[~chosen])
    assert not chosen[:, [0, -1]].any(), "special tokens are no words"
    shown = batch["input_ids"][chosen]
    assert chosen[:, 1:-1].float().mean().item() == pytest.approx(0.15, abs=0.01)
    assert (shown == 3).float().mean().item() == pytest.approx(0.8, abs=0.03)
    assert (shown == ids[chosen]).float().mean().item() == pytest.approx(0.1, abs=0.03)


def test_short_rows_have_something_to_predict(tokenizer):
    """In a row of one word, that word is the label; a row without words has no label."""
    batch = CollateText(tokenizer, masks=True)([{"input_ids": [1, 7, 2], ROW: i} for i in range(20)])
    assert (batch["labels"][:, 1] == 7).all()
    assert (CollateText(tokenizer, masks=True)([{"input_ids": [1, 2], ROW: 0}])["labels"] == -100).all()


def images(count: int = 30) -> list[dict]:
    pixels = torch.rand(count, 3, 16, 8, generator=torch.Generator().manual_seed(0)) + 1
    return [{"pixel_values": image, "labels": i % 3, ROW: i} for i, image in enumerate(pixels)]


@pytest.mark.parametrize("kind", ["text", "images"])
def test_draws_belong_to_the_row(tokenizer, kind):
    """A row has the same draws in any batch and at any position. Another epoch or seed has other draws."""
    rows = text_rows(30) if kind == "text" else images()
    name = "input_ids" if kind == "text" else "pixel_values"

    def collate(seed: int = 0):
        return CollateText(tokenizer, seed, masks=True) if kind == "text" else CollateImages(seed, moves=True)

    whole = collate()(rows)[name]
    assert torch.equal(collate()(rows[::-1])[name].flip(0), whole)
    assert torch.equal(torch.cat([collate()(rows[i : i + 7])[name] for i in range(0, 30, 7)]), whole)
    again = collate()
    again.set_epoch(1)
    later = again(rows)[name]
    assert not torch.equal(later, whole)
    again.set_epoch(0)
    assert torch.equal(again(rows)[name], whole)
    assert not torch.equal(collate(1)(rows)[name], whole)


def test_images_are_moved_and_mirrored():
    """Every result is the image, mirrored or not, shifted by up to an eighth, with zeros at the border."""
    rows, seen = images(200), set()
    for row, moved in zip(rows, CollateImages(moves=True)(rows)["pixel_values"], strict=True):
        found = None
        for mirrored in (False, True):
            image = row["pixel_values"].flip(-1) if mirrored else row["pixel_values"]
            padded = torch.nn.functional.pad(image, (1, 1, 2, 2))
            for top in range(5):
                for left in range(3):
                    if torch.equal(padded[:, top : top + 16, left : left + 8], moved):
                        found = (mirrored, top, left)
        assert found is not None
        seen.add(found)
    assert len(seen) == 2 * 5 * 3, "every shift, mirrored and not"
    plain = CollateImages()(rows)
    assert torch.equal(plain["pixel_values"], torch.stack([row["pixel_values"] for row in rows]))
    assert plain["labels"].tolist() == [row["labels"] for row in rows]


def test_words_have_their_labels(tmp_path, tokenizer):
    """The first token of a word has its label; its other tokens, special tokens and padding have none. Names become ids
    as in other classification."""
    rows = [
        {"tokens": ["w1", "w2y", "w3"], "tags": ["O", "NAME", "O"]},
        {"tokens": ["w4"], "tags": ["PLACE"]},
        {"tokens": ["w5", "w6"], "tags": ["O", "O"]},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataRecipe(
        train=str(tmp_path / "a.jsonl"), held_out=1, text_column="tokens", label_column="tags", max_length=16
    )
    names = ["NAME", "O", "PLACE"]
    splits = load_splits(data, "token-classification", seed=0, classes=names)
    assert splits["train"]["tags"][:] == [[1, 0, 1], [2]]
    prepared = prepare(splits["train"], tokenizer, data, "token-classification", training=True)
    (batch,) = loader(prepared, tokenizer, 2, shuffle=False, seed=0, task="token-classification")
    assert batch["labels"].tolist() == [[-100, 1, 0, -100, 1, -100], [-100, 2, -100, -100, -100, -100]]
    with pytest.raises(DataError, match="rename them"):
        load_splits(data, "token-classification", seed=0, classes=["A", "B"])
    plain = DataRecipe(train=str(tmp_path / "b.jsonl"), held_out=1)
    for row, message in (
        ({"text": "a b", "label": [0, 1]}, "token-classification cannot read"),
        ({"text": ["a", "b"], "label": 0}, "not a list of classes"),
    ):
        (tmp_path / "b.jsonl").write_text((json.dumps(row) + "\n") * 3)
        with pytest.raises(DataError, match=message):
            load_splits(plain, "token-classification", seed=0)


def test_lines_to_fill_in(tmp_path, tokenizer):
    """Empty lines are left out. The hidden words are the same each time an epoch is read, for any batch size."""
    (tmp_path / "a.txt").write_text("w1 w2 w3\n\n   \nw4 w5\nw6\nw7\n")
    data = DataRecipe(train=str(tmp_path / "a.txt"), held_out=1, max_length=16)
    rows = load_splits(data, "masked-lm", seed=0)["train"]
    prepared = prepare(rows, tokenizer, data, "masked-lm", training=True)
    assert len(prepared) == 3
    whole = next(iter(loader(prepared, tokenizer, 3, shuffle=False, seed=0, task="masked-lm")))
    assert set(whole) == {"input_ids", "attention_mask", "labels"}
    single = [b["input_ids"][0] for b in loader(prepared, tokenizer, 1, shuffle=False, seed=0, task="masked-lm")]
    for row, alone in zip(whole["input_ids"], single, strict=True):
        assert torch.equal(row[: len(alone)], alone)
    tokenizer.mask_token = None
    with pytest.raises(DataError, match="no mask token"):
        loader(prepared, tokenizer, 1, shuffle=False, seed=0, task="masked-lm")


def test_rows_are_numbered_where_something_is_drawn(tokenizer):
    """The number of a row does not reach the model."""
    rows = Dataset.from_dict({"input_ids": [[1, 5, 2]] * 2, ROW: [0, 1]})
    (batch,) = loader(rows, tokenizer, 2, shuffle=False, seed=0, task="feature-extraction")
    assert set(batch) == {"input_ids", "attention_mask"}
