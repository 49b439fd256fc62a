"""Rows become the batches that the recipe requests: every file type, both label types, windows, and clear errors."""

import gc
import gzip
import json
import lzma
import subprocess
import sys
from collections import Counter
from itertools import chain
from pathlib import Path

import pytest
import torch
from datasets import ClassLabel, Dataset, IterableDataset
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoImageProcessor, BertConfig, PreTrainedTokenizerFast, ViTImageProcessor

from hf_layerfuse.data.labels import class_names
from hf_layerfuse.data.prepare import calibration_batches, loader, prepare, text_of
from hf_layerfuse.data.splits import load_splits
from hf_layerfuse.errors import DataError, RecipeError
from hf_layerfuse.recipe import DataRecipe

ROWS = [
    ("it 's \"good , really", "pos"),
    ("null", "neg"),
    ("NA", "pos"),
    ("bad", "neg"),
    ("awful", "neg"),
    ("ok", "pos"),
]
TEXT = " \n = Title = \n\n caf\u00e9 \u2028 one\ttwo \n" + "".join(f" line {i} of the text . \n" for i in range(40))


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte: lossless, and without a download."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, **{character: index + 1 for index, character in enumerate(alphabet)}}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", model_max_length=64)


def _write(path: Path, rows: list[tuple[str, object]]) -> Path:
    """Write rows in the format that the file name gives."""
    kind, *compression = path.name.split(".")[1:]
    if kind == "parquet":
        Dataset.from_dict({"text": [r[0] for r in rows], "label": [r[1] for r in rows]}).to_parquet(path)
        return path
    if kind == "jsonl":
        content = "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows)
    elif kind == "json":
        content = json.dumps([{"text": text, "label": label} for text, label in rows])
    elif kind == "tsv":
        content = "text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows)
    elif kind == "csv":
        quoted = [(text.replace('"', '""'), label) for text, label in rows]
        content = "text,label\n" + "".join(f'"{text}",{label}\n' for text, label in quoted)
    else:
        content = "".join(text for text, _ in rows)
    opener = {"xz": lzma.open, "gz": gzip.open}.get(compression[0]) if compression else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.write(content)
    return path


def _recipe(path: Path, **values) -> DataRecipe:
    return DataRecipe(**{"train": str(path), "held_out": 2, "max_length": 16, **values})


@pytest.mark.parametrize(
    "name", ["a.tsv", "a.tsv.xz", "a.csv", "a.csv.gz", "a.json", "a.jsonl", "a.jsonl.xz", "a.parquet", "odd[1].tsv"]
)
def test_every_file_type_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    """Quotes, commas and words such as "null" survive; the last rows are held out; classes are sorted by name."""
    splits = load_splits(_recipe(_write(tmp_path / name, ROWS)), "text-classification", seed=0)
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 4, "validation": 2}
    assert [*splits["train"]["text"], *splits["validation"]["text"]] == [text for text, _ in ROWS]
    assert [*splits["train"]["label"], *splits["validation"]["label"]] == [1, 0, 1, 0, 0, 1]
    assert splits["train"].features["label"] == ClassLabel(names=["neg", "pos"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.xz", "a.txt.gz"])
def test_text_comes_back_exactly(tmp_path: Path, name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """Joined rows equal the file. Evaluation windows hold all of it; training windows leave out an incomplete last
    one."""
    data = _recipe(_write(tmp_path / name, [(TEXT, 0)]), test=str(tmp_path / name))
    splits = load_splits(data, "causal-lm", seed=0)
    assert text_of(splits["train"], data) + text_of(splits["validation"], data) == TEXT

    tested = prepare(splits["test"], tokenizer, data, "causal-lm", training=False)
    assert tokenizer.decode(list(chain.from_iterable(tested["input_ids"]))) == TEXT
    trained = prepare(splits["test"], tokenizer, data, "causal-lm", training=True)
    size = len(TEXT.encode())
    assert size % 16
    assert {len(window) for window in trained["input_ids"]} == {16}
    assert len(trained) == size // 16 == len(tested) - 1
    assert trained["labels"][:] == trained["input_ids"][:]


@pytest.mark.parametrize("task", ["causal-lm", "feature-extraction"])
def test_processes_that_tokenise_do_not_matter(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, task) -> None:
    """Two tokenising processes make the same rows as one, in the same order."""
    rows = load_splits(_recipe(_write(tmp_path / "a.txt", [(TEXT, 0)])), "causal-lm", seed=0)["train"]
    one, two = (
        prepare(rows, tokenizer, _recipe(tmp_path / "a.txt", num_proc=count), task, training=True)
        for count in (None, 2)
    )
    assert two["input_ids"][:] == one["input_ids"][:]


def test_rows_that_end_with_a_newline_get_no_second_one() -> None:
    """The Hub's WikiText keeps the newline of each line, and local files do not. Both give the same text."""
    rows = Dataset.from_dict({"text": ["a\n", "b", ""]})
    assert text_of(rows, DataRecipe()) == "a\nb\n\n"


def test_padding_is_masked_and_never_a_label(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """The ragged last window is padded on the right with mask 0 and label -100."""
    data = _recipe(_write(tmp_path / "a.txt", [(TEXT, 0)]), test=str(tmp_path / "a.txt"))
    rows = load_splits(data, "causal-lm", seed=0)["test"]
    tokenizer.pad_token = None
    prepared = prepare(rows, tokenizer, data, "causal-lm", training=False)
    *_, last = loader(prepared, tokenizer, len(prepared), shuffle=False, seed=0, task="causal-lm")
    rest = len(TEXT.encode()) % 16
    assert last["attention_mask"][-1].tolist() == [1] * rest + [0] * (16 - rest)
    assert torch.equal(last["labels"] == -100, last["attention_mask"] == 0)
    with pytest.raises(DataError, match="padding token"):
        loader(prepared, tokenizer, 2, shuffle=False, seed=0, task="feature-extraction")


def test_classification_batches(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Texts are cut at max_length and padded to the longest of their batch; the same seed gives the same order."""
    data = _recipe(_write(tmp_path / "a.tsv", ROWS), max_length=5, max_train_samples=3)
    train = load_splits(data, "text-classification", seed=0)["train"]
    prepared = prepare(train, tokenizer, data, "text-classification", training=True)
    assert len(prepared) == 3
    batch = next(iter(loader(prepared, tokenizer, 3, shuffle=False, seed=0, task="text-classification")))
    assert batch["attention_mask"].sum(1).tolist() == [5, 4, 2]
    assert batch["labels"].tolist() == [1, 0, 1]

    def epochs(seed: int) -> list[list[int]]:
        batches = loader(prepared, tokenizer, 1, shuffle=True, seed=seed, task="text-classification")
        return [[len(b["input_ids"][0]) for b in batches] for _ in range(6)]

    assert epochs(0) == epochs(0) != epochs(1)
    assert len({tuple(order) for order in epochs(0)}) > 1
    features = prepare(train, tokenizer, data, "feature-extraction", training=True)
    assert "labels" not in features.column_names
    with pytest.raises(DataError, match="batch of 4"):
        loader(prepared, tokenizer, 4, shuffle=True, seed=0, task="text-classification")


def test_texts_of_a_length_share_a_batch(tokenizer: PreTrainedTokenizerFast) -> None:
    """Batches have little padding. An epoch has every row once, in its own order, which the seed reproduces."""
    lengths = torch.randint(1, 60, (800,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = Dataset.from_dict({"input_ids": [[1] * length for length in lengths], "labels": list(range(800))})

    def epoch(number: int, seed: int = 3) -> list[dict[str, torch.Tensor]]:
        batches = loader(rows, tokenizer, 8, shuffle=True, seed=seed, task="text-classification")
        batches.sampler.set_epoch(number)
        return list(batches)

    first, second = epoch(0), epoch(1)
    masks = [batch["attention_mask"] for batch in first]
    padding = sum(int((1 - mask).sum()) for mask in masks) / sum(mask.numel() for mask in masks)
    assert padding < 0.1, "batches in random order are padded by two fifths"
    orders = [torch.cat([batch["labels"] for batch in batches]).tolist() for batches in (first, second)]
    assert [sorted(order) for order in orders] == [list(range(800))] * 2
    assert orders[0] != orders[1]
    assert torch.cat([batch["labels"] for batch in epoch(1)]).tolist() == orders[1]
    assert torch.cat([batch["labels"] for batch in epoch(1, seed=4)]).tolist() != orders[1]


def test_calibration_is_a_seeded_sample_of_train(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """The requested number of windows is drawn without repetition, and is the same for the same seed. If there are
    fewer windows, all are used."""
    data = _recipe(_write(tmp_path / "a.txt", [(TEXT, 0)]), calibration_samples=5)
    train = load_splits(data, "causal-lm", seed=0)["train"]
    prepared = prepare(train, tokenizer, data, "causal-lm", training=True)

    def sample(seed: int, size: int = 5) -> list[tuple[int, ...]]:
        some = _recipe(tmp_path / "a.txt", calibration_samples=size)
        batches = calibration_batches(prepared, tokenizer, some, "causal-lm", batch_size=2, seed=seed)
        return [tuple(row.tolist()) for batch in batches for row in batch["input_ids"]]

    windows = Counter(map(tuple, prepared["input_ids"]))
    assert len(sample(0)) == 5
    assert Counter(sample(0)) <= windows
    assert sample(0) == sample(0) != sample(1)
    assert Counter(sample(0, 10_000)) == windows


def test_labels_follow_the_model(tmp_path: Path) -> None:
    """Ids are those of the model, in any case of letters. Unknown names, and names for a model that has only
    placeholders, are refused."""
    data = _recipe(_write(tmp_path / "a.tsv", ROWS))

    def train_labels(classes: list[str] | None) -> list[int]:
        return load_splits(data, "text-classification", seed=0, classes=classes)["train"]["label"][:]

    assert train_labels(["POS", "NEG"]) == [0, 1, 0, 1]
    assert train_labels(["pos", "other", "neg"]) == [0, 2, 0, 2]
    assert train_labels(["POS", "pos", "NEG", "neg"]) == [1, 3, 1, 3], "case matters where it is all that differs"
    assert train_labels(None) == [1, 0, 1, 0]
    for classes, message in (
        (["LABEL_0", "LABEL_1"], "order is unknown: set id2label"),
        (["cat", "dog"], r"train has the classes \['neg', 'pos'\]; the known ones are \['cat', 'dog'\]"),
        (["pos", "negative"], r"train has the classes \['neg'\]"),
        (["pos", "neg", "neg"], r"several classes the names \['neg'\]"),
    ):
        with pytest.raises(DataError, match=message):
            train_labels(classes)


def test_numbers_in_quotes_are_ids(tmp_path: Path) -> None:
    """They are compared as numbers, unless the model has classes of these names."""
    rows = [(f"row {number}", str(number)) for number in (10, 2, 0, 1, 2, 10, 0, 1)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    data = DataRecipe(train=str(path), held_out=2)

    def ids(classes: list[str] | None) -> list[int]:
        return load_splits(data, "text-classification", seed=0, classes=classes)["train"]["label"][:]

    assert ids(None) == ids([f"LABEL_{i}" for i in range(11)]) == [10, 2, 0, 1, 2, 10]
    assert ids([str(10 - i) for i in range(11)])[:3] == [0, 8, 10], "names of the model come first"
    with pytest.raises(DataError, match=r"labels from 0 to 10; .* the model has 3 classes"):
        ids(["a", "b", "c"])


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({"id2label": {0: "pos", 1: "neg"}}, ["pos", "neg"]),
        ({"id2label": {"0": "pos", "1": "neg"}, "label2id": None}, ["pos", "neg"]),
        ({"id2label": {0: "pos", 1: "neg"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}}, ["pos", "neg"]),
        ({"id2label": {1: "neg", 0: "pos"}, "label2id": {"neg": 0, "pos": 1}}, ["pos", "neg"]),
        ({"num_labels": 3}, ["LABEL_0", "LABEL_1", "LABEL_2"]),
    ],
)
def test_class_names_of_a_model(tmp_path: Path, names: dict, expected: list[str]) -> None:
    """`id2label` decides, whatever `label2id` says, in memory and after a round trip."""
    config = BertConfig(**names)
    assert class_names(config) == expected
    config.save_pretrained(tmp_path)
    assert class_names(BertConfig.from_pretrained(tmp_path)) == expected


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet", "a.txt.xz"])
def test_pointers_of_git_lfs_are_refused(tmp_path: Path, name: str) -> None:
    """A text file that is one would be read as three lines of text."""
    (tmp_path / name).write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'ab' * 32}\nsize 5481\n")
    with pytest.raises(DataError, match=r"is a pointer of git-lfs.*git lfs pull"):
        load_splits(DataRecipe(train=str(tmp_path / name)), "causal-lm", seed=0)


def test_classes_are_numbered_from_zero() -> None:
    with pytest.raises(DataError, match="number the classes from 0"):
        class_names(BertConfig(id2label={1: "pos", 2: "neg"}))


def test_unknown_and_missing_classes_are_errors(tmp_path: Path) -> None:
    """Errors name a class that train lacks, a split without labels (-1), and a class that the model lacks."""
    data = _recipe(_write(tmp_path / "a.tsv", ROWS), test=str(_write(tmp_path / "b.tsv", [("x", "maybe")])))
    with pytest.raises(DataError, match=r"test has the classes \['maybe'\]"):
        load_splits(data, "text-classification", seed=0)
    data = _recipe(_write(tmp_path / "c.jsonl", [("x", 0), ("y", -1), ("z", 1)]))
    with pytest.raises(DataError, match="from -1 to 1"):
        load_splits(data, "text-classification", seed=0)
    data = _recipe(_write(tmp_path / "d.jsonl", [("x", 0), ("y", 2), ("z", 1)]))
    with pytest.raises(DataError, match="has 2 classes"):
        load_splits(data, "text-classification", seed=0, classes=["no", "yes"])


def test_rows_grouped_by_class_are_shuffled_first(tmp_path: Path) -> None:
    """Rows sorted by class (as in IMDB) are shuffled before a split; mixed rows keep their order."""
    path = _write(tmp_path / "sorted.tsv", [(f"row {i}", i // 50) for i in range(100)])
    splits = load_splits(_recipe(path, held_out=20), "text-classification", seed=0)
    assert set(splits["validation"]["label"]) == {0, 1}
    assert set(splits["train"]["text"]).isdisjoint(splits["validation"]["text"])
    again = load_splits(_recipe(path, held_out=20), "text-classification", seed=0)
    assert splits["train"]["text"][:] == again["train"]["text"][:]


def test_image_folder(tmp_path: Path) -> None:
    """Class subfolders become labels. Pixels come from the processor, also for grey images."""
    for split, count in (("train", 6), ("test", 2)):
        for index, animal in enumerate(("cat", "dog")):
            folder = tmp_path / split / animal
            folder.mkdir(parents=True)
            for number in range(count):
                picture = Image.new(
                    "L" if number == 0 else "RGB", (12, 10), color=(index * 200 if number == 0 else (index * 200,) * 3)
                )
                picture.save(folder / f"{number}.png")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "processor")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "processor")
    data = DataRecipe(train=str(tmp_path / "train"), test=str(tmp_path / "test"), held_out=4, max_test_samples=3)
    splits = load_splits(data, "image-classification", seed=0, classes=["dog", "cat"])
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 8, "validation": 4, "test": 4}

    prepared = prepare(splits["test"], processor, data, "image-classification", training=False)
    batch = next(iter(loader(prepared, processor, 8, shuffle=False, seed=0, task="image-classification")))
    assert batch["pixel_values"].shape == (3, 3, 8, 8)
    brightness = batch["pixel_values"].mean(dim=(1, 2, 3))
    assert torch.equal(brightness > 0, batch["labels"] == 0), "dogs are the bright ones and have id 0"
    calibration = calibration_batches(prepared, processor, data, "image-classification", batch_size=2, seed=0)
    assert [len(batch["labels"]) for batch in calibration] == [2, 1]


def _broken(tmp_path: Path, case: str) -> tuple[DataRecipe, str]:
    good = _write(tmp_path / "good.tsv", ROWS)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "header.csv").write_text("text,label\n")
    (tmp_path / "damaged.txt.xz").write_bytes(b"nonsense")
    (tmp_path / "a.docx").write_bytes(b"")
    (tmp_path / "a.parquet.xz").write_bytes(b"")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "null.jsonl").write_text('{"text": "a", "label": 0}\n{"text": null, "label": 1}\n')
    (tmp_path / "numbers.csv").write_text("text,label\n1,0\n2,1\n3,0\n")
    return {
        "missing file": (_recipe(tmp_path / "absent.tsv"), "no such file"),
        "default split": (DataRecipe(), "set data.name"),
        "empty": (_recipe(tmp_path / "empty.txt"), "empty"),
        "only a header": (_recipe(tmp_path / "header.csv"), "empty"),
        "damaged": (_recipe(tmp_path / "damaged.txt.xz"), "not supported by decoder"),
        "unknown kind": (_recipe(tmp_path / "a.docx"), r"\.parquet"),
        "compressed parquet": (_recipe(tmp_path / "a.parquet.xz"), "all but .parquet"),
        "empty folder": (_recipe(tmp_path / "nothing"), "cannot be loaded"),
        "no column": (_recipe(good, text_column="sentence"), "its columns are text, label"),
        "missing value": (_recipe(tmp_path / "null.jsonl"), "missing values"),
        "wrong column type": (_recipe(tmp_path / "numbers.csv"), "cannot read"),
        "too small": (_recipe(good, held_out=6), "held_out=6"),
        "not in the cache": (DataRecipe(name="nobody/nothing"), "nobody/nothing"),
    }[case]


@pytest.mark.parametrize(
    "case",
    [
        *("missing file", "default split", "empty", "only a header", "damaged", "unknown kind", "compressed parquet"),
        *("empty folder", "no column", "missing value", "wrong column type", "too small", "not in the cache"),
    ],
)
def test_errors_say_what_is_wrong(tmp_path: Path, case: str) -> None:
    """Every kind of missing data is a DataError that names it."""
    data, message = _broken(tmp_path, case)
    with pytest.raises(DataError, match=message):
        load_splits(data, "text-classification", seed=0)


def test_windows_must_fit_the_model_and_the_text(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """A max_length above the model's, and a text shorter than one window, are errors."""
    data = _recipe(_write(tmp_path / "a.txt", [("a\nb\nc\n", 0)]), max_length=65)
    rows = load_splits(data, "causal-lm", seed=0)["train"]
    with pytest.raises(DataError, match="64 tokens"):
        prepare(rows, tokenizer, data, "causal-lm", training=True)
    with pytest.raises(DataError, match="2 tokens"):
        prepare(rows, tokenizer, _recipe(tmp_path / "a.txt"), "causal-lm", training=True)


@pytest.mark.slow
def test_another_process_prepares_the_same_rows(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """The cache key of the tokenised rows is the same in a second process, so ranks share one cache file."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    _write(tmp_path / "a.tsv", ROWS)
    program = """
import sys
from transformers import AutoTokenizer
from hf_layerfuse.data.prepare import prepare
from hf_layerfuse.data.splits import load_splits
from hf_layerfuse.recipe import DataRecipe

def fingerprint(folder):
    data = DataRecipe(train=f"{folder}/a.tsv", held_out=2, max_length=16)
    rows = load_splits(data, "text-classification", seed=0)["train"]
    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/tokenizer")
    return prepare(rows, tokenizer, data, "text-classification", training=True)._fingerprint

if __name__ == "__main__":
    print(fingerprint(sys.argv[1]))
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    here: dict = {"__name__": "here"}
    exec(program, here)
    assert output.strip() == here["fingerprint"](tmp_path)


# the csv builder of datasets (5.2) leaves the file that it streams to the garbage collector
_LEFT_OPEN = "ignore:Exception ignored in. <_io.FileIO:pytest.PytestUnraisableExceptionWarning"


SLOW_TO_CLOSE = pytest.param("rows.parquet", marks=pytest.mark.slow)


@pytest.fixture
def collected():
    """Collect garbage, so that files left open by a test are found in this test and not in the next one."""
    yield
    gc.collect()


@pytest.mark.filterwarnings(_LEFT_OPEN)
@pytest.mark.usefixtures("collected")
@pytest.mark.parametrize("name", ["rows.tsv", "rows.csv.gz", "rows.jsonl", SLOW_TO_CLOSE])
@pytest.mark.parametrize("numbers", [False, True])
def test_streamed_rows_are_those_of_the_file(tmp_path, tokenizer, name, numbers):
    """Streamed rows equal those of a table, with labels. Their order depends on the seed and the epoch, every epoch has
    all of them, and calibration rows are among them."""
    rows = [(text, ["neg", "pos"].index(label) if numbers else label) for text, label in ROWS]
    train, other = (_write(tmp_path / f"{split}-{name}", rows) for split in ("train", "validation"))
    batches = {}
    for streaming in (False, True):
        data = DataRecipe(train=str(train), validation=str(other), max_length=16, streaming=streaming)
        splits = load_splits(data, "text-classification", 0, classes=["POS", "NEG"] if not numbers else None)
        prepared = prepare(splits["train"], tokenizer, data, "text-classification", training=True)
        options = {"seed": 3, "task": "text-classification"}
        batches[streaming] = list(loader(prepared, tokenizer, 6, shuffle=False, **options))
    assert isinstance(splits["train"], IterableDataset)
    (table,), (stream,) = batches[False], batches[True]
    assert table.keys() == stream.keys()
    assert all(torch.equal(table[key], stream[key]) for key in table)

    shuffled = loader(prepared, tokenizer, 2, shuffle=True, **options)
    first, again = (torch.cat([batch["labels"] for batch in shuffled]) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(first.sort().values, stream["labels"].sort().values)
    calibration = calibration_batches(prepared, tokenizer, data, "text-classification", batch_size=2, seed=0)
    assert sum(len(batch["labels"]) for batch in calibration) == len(ROWS)


def test_streamed_text_is_packed(tmp_path, tokenizer):
    """Windows of streamed text equal those of a table within each chunk of lines."""
    train = tmp_path / "train.txt"
    train.write_text(TEXT, encoding="utf-8")
    found = []
    for streaming in (False, True):
        data = DataRecipe(
            train=str(train), validation=str(train), max_length=32, streaming=streaming, max_train_samples=7
        )
        splits = load_splits(data, "causal-lm", 0)
        prepared = prepare(splits["train"], tokenizer, data, "causal-lm", training=True)
        found.append([row["input_ids"] for row in prepared])
    assert found[0] == found[1]
    assert len(found[0]) == 7


def test_streamed_images_and_masked_words(tmp_path, tokenizer):
    """Random draws of a streamed row depend on its number, the seed and the epoch, as in a table."""
    for split in ("train", "validation"):
        for number, name in enumerate("ab"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8), (40 * number, 90, 7)).save(tmp_path / split / name / "one.png")
    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    found = []
    for streaming in (False, True):
        data = DataRecipe(train=str(tmp_path / "train"), validation=str(tmp_path / "validation"), streaming=streaming)
        splits = load_splits(data, "image-classification", 0)
        prepared = prepare(splits["train"], processor, data, "image-classification", training=True)
        found.append(next(iter(loader(prepared, processor, 2, shuffle=False, seed=0, task="image-classification"))))
    for key in ("pixel_values", "labels"):
        assert torch.equal(found[0][key], found[1][key])
    moved = loader(prepared, processor, 2, shuffle=True, seed=0, task="image-classification", augment=True)
    assert next(iter(moved))["pixel_values"].shape == (2, 3, 8, 8)


@pytest.mark.filterwarnings(_LEFT_OPEN)
@pytest.mark.usefixtures("collected")
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": None, "label": 0}, "no value in column 'text'"),
        ({"text": "what", "label": None}, "no value in column 'label'"),
        ({"text": "what", "label": 2}, "the label 2; .* the model has 2 classes"),
        ({"text": "what", "label": -1}, "the label -1"),
    ],
)
def test_streamed_rows_are_checked_when_they_are_read(tmp_path, tokenizer, row, message):
    """An invalid row gives a clear DataError, and not an error of the code that reads it."""
    good = [{"text": "good", "label": 0}, {"text": "bad", "label": 1}]
    for name, lines in (("train", [*good, row]), ("validation", good)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    paths = {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "validation")}
    data = DataRecipe(**paths, text_column="text", label_column="label", streaming=True, max_length=8)
    rows = load_splits(data, "text-classification", 0, classes=["LABEL_0", "LABEL_1"])["train"]
    with pytest.raises(DataError, match=message):
        list(prepare(rows, tokenizer, data, "text-classification", training=True))


def test_streaming_needs_validation():
    with pytest.raises(RecipeError, match=r"data\.validation"):
        DataRecipe(train="x.txt", streaming=True)


@pytest.mark.filterwarnings(_LEFT_OPEN)
@pytest.mark.usefixtures("collected")
def test_a_streamed_class_that_validation_lacks(tmp_path, tokenizer):
    train = _write(tmp_path / "train.tsv", [*ROWS, ("what", "none")])
    other = _write(tmp_path / "validation.tsv", ROWS)
    data = DataRecipe(train=str(train), validation=str(other), streaming=True)
    rows = load_splits(data, "text-classification", 0)["train"]
    with pytest.raises(DataError, match="'none'"):
        list(rows)
    with pytest.raises(DataError, match="has no column 'word'"):
        load_splits(
            DataRecipe(train=str(train), validation=str(other), streaming=True, text_column="word"),
            "text-classification",
            0,
        )
