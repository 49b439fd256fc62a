"""Files beside the weights of an original go with its smaller model."""

import json
from pathlib import Path

import pytest
from runs import feature_extraction

from hf_layerfuse import CheckpointError
from hf_layerfuse.cli import run
from hf_layerfuse.pipeline.companions import companions_of, copy_companions

POOLING = {"word_embedding_dimension": 32, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}


def write(path: Path, files: dict[str, object]) -> None:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(content if isinstance(content, str) else json.dumps(content))


def modules(*folders: str) -> list[dict[str, object]]:
    return [{"idx": i, "name": str(i), "path": folder, "type": "..."} for i, folder in enumerate(("", *folders))]


PIPELINE = {
    "modules.json": modules("1_Pooling", "2_Dense", "3_Normalize"),
    "1_Pooling/config.json": POOLING,
    "2_Dense/config.json": {"in_features": 32, "out_features": 8},
    "2_Dense/model.safetensors": "weights",
    "sentence_bert_config.json": {"max_seq_length": 256},
    "config_sentence_transformers.json": {"prompts": {"query": "query: "}},
}
OTHERS = {"LICENSE": "free", "chat_template.jinja": "{{ messages }}", "preprocessor_config.json": {"size": 8}}
STALE = {
    "README.md": "89.1%",
    "pytorch_model.bin": "weights",
    "onnx/model.onnx": "graph",
    "training_args.bin": "pickle",
    "config.json": {},
    "4_Other/config.json": {},
}


def test_companions_that_stay_valid(tmp_path: Path) -> None:
    """Poolings, licences and templates are copied; weights, exports and cards of the original are not."""
    write(tmp_path / "model", {**PIPELINE, **OTHERS, **STALE})
    found = companions_of(str(tmp_path / "model"))
    assert found.keys() == PIPELINE.keys() | OTHERS.keys()
    write(tmp_path / "small", {"LICENSE": "new"})
    copy_companions(found, tmp_path / "small")
    assert (tmp_path / "small" / "LICENSE").read_text() == "new", "files of the result stay"
    assert json.loads((tmp_path / "small" / "1_Pooling" / "config.json").read_text()) == POOLING


def test_folders_outside_the_model_are_not_copied(tmp_path: Path) -> None:
    write(tmp_path / "secret", {"key": "value"})
    write(tmp_path / "model", {"modules.json": modules("../secret", str(tmp_path / "secret"))})
    assert companions_of(str(tmp_path / "model")).keys() == {"modules.json"}


@pytest.mark.parametrize("content", ["{", "{}", '[{"path": ""}, {"type": "no path"}]', "[1, 2]"])
def test_damaged_modules_are_refused(tmp_path: Path, content: str) -> None:
    write(tmp_path / "model", {"modules.json": content})
    with pytest.raises(CheckpointError, match="not a list of modules"):
        companions_of(str(tmp_path / "model"))


def test_models_that_cannot_be_reached_have_none() -> None:
    assert companions_of("nobody/nothing") == {}


def test_a_run_keeps_the_pipeline(tmp_path: Path) -> None:
    """The result of a run on a folder of sentence-transformers is such a folder again."""
    words = feature_extraction(tmp_path)
    write(tmp_path / "model", PIPELINE)
    assert run([*words, "--heal.steps", "0", "--evaluate.latency", "false"]) == 0
    for name in PIPELINE:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()
