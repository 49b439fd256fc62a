"""Random configs, plans, recipes, data and calibration batches end in a result that verifies, or in a clear error.

Hypothesis draws the same 300 cases every time.
"""

import contextlib
import copy
import json
from typing import Any

import pytest
import torch
import yaml
from helpers import LAYERS, TINY, tiny_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runs import save_text_model

from hf_layerfuse import AutoFusedModel, LayerFuseError, Plan, apply, fuse, verify
from hf_layerfuse.cli import run
from hf_layerfuse.data.labels import class_names
from hf_layerfuse.data.prepare import loader, prepare
from hf_layerfuse.data.splits import load_splits
from hf_layerfuse.pipeline.inspect import inspect_tables
from hf_layerfuse.pipeline.planning import plan_model
from hf_layerfuse.recipe import DataRecipe, FusionRecipe, load_recipe

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::hf_layerfuse.LayerFuseWarning")]

EXPECTED = (LayerFuseError, OSError)
CASES = 60

fuzzed = settings(
    max_examples=CASES,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)

odd = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 70),
    st.sampled_from([0.5, -1.0, float("nan"), float("inf"), 1e30]),
    st.sampled_from(["", "gelu", "relu", "eager", "sdpa", "none", "float16", "\x00", "~/x", "é"]),
    st.lists(st.integers(-1, 7), max_size=8),
    st.dictionaries(st.sampled_from(["0", "1", "a"]), st.integers(-1, 3), max_size=3),
)


@st.composite
def changed(draw: st.DrawFn, tree: dict[str, Any], most: int = 3) -> dict[str, Any]:
    """A tree of JSON types with some of its values, at any depth, replaced, removed or added."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, most))):
        place = tree
        while True:
            names = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not names:
                break
            name = draw(st.sampled_from(names))
            if isinstance(place[name], dict | list) and place[name] and draw(st.booleans()):
                place = place[name]
                continue
            if draw(st.integers(0, 4)):
                place[name] = draw(odd)
            else:
                del place[name]
            break
    if isinstance(tree, dict) and not draw(st.integers(0, 9)):
        tree[draw(st.sampled_from(["extra", "format_version", "num_hidden_layers", "mode"]))] = draw(odd)
    return tree


@fuzzed
@given(data=st.data())
def test_configs(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """A checkpoint with a changed config.json loads, is inspected, planned and fused, or is refused."""
    path = tmp_path_factory.mktemp("model")
    model_type = data.draw(st.sampled_from(sorted(TINY)))
    tiny_model(model_type).save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(data.draw(changed(config))))
    try:
        small = fuse(AutoFusedModel.from_pretrained(path), keep_layers=3)
    except EXPECTED:
        pass
    else:
        verify(small)
    for tables in (lambda: inspect_tables(str(path)), lambda: plan_model(str(path), FusionRecipe(keep_layers=3))):
        with contextlib.suppress(*EXPECTED):
            assert str(tables()), "the tables can be printed"


PLAN = {
    "format_version": 1,
    "model_type": "bert",
    "num_layers": LAYERS,
    "edits": [
        {"type": "fuse", "kind": "layer", "layers": [1, 2], "mode": "share", "operator": "mean", "rank": 2},
        {"type": "drop", "kind": "mlp", "layer": 3},
        {"type": "linearize", "layer": 5},
    ],
    "notes": {},
}


@fuzzed
@given(tree=changed(PLAN))
def test_plans(tree: dict[str, Any]) -> None:
    """A changed plan applies to a model and the result verifies, or is refused."""
    try:
        plan = Plan.from_dict(tree)
        assert Plan.from_dict(json.loads(plan.to_json())) == plan
        made = apply(tiny_model("bert"), plan)
    except EXPECTED:
        return
    verify(made)


RECIPE = {
    "model": "nobody/nothing",
    "task": "causal-lm",
    "output_dir": "out",
    "seed": 0,
    "data": {"train": "train.txt", "validation": "v.txt", "max_length": 16, "calibration_samples": 8},
    "fusion": {"keep_layers": 4, "mode": "depth", "operator": "auto", "effort": "low"},
    "heal": {"steps": 3, "batch_size": 8, "learning_rate": 1e-4, "eval_every": 2},
    "evaluate": {"latency_repeats": 1, "batch_size": 4},
    "hub": {"private": False},
}


@fuzzed
@given(tree=changed(RECIPE, most=4))
def test_recipes(tmp_path_factory: pytest.TempPathFactory, tree: dict[str, Any]) -> None:
    """A changed recipe is read, or refused; the command ends with exit status 1 for a model that is not there."""
    folder = tmp_path_factory.mktemp("recipe")
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    try:
        recipe = load_recipe(path)
    except EXPECTED:
        recipe = None
    else:
        assert recipe.method is not None
    assert run([str(path), "--output_dir", str(folder / "out")]) == 1


values = st.one_of(
    st.none(),
    st.sampled_from(["", " ", "w3 w4", "w5 " * 60, "unheard of", "\x00", "é\u2028"]),
    st.integers(-1, 3),
    st.sampled_from([1.5, float("nan")]),
    st.booleans(),
    st.lists(st.sampled_from(["w3", "w7", ""]), max_size=3),
)
rows = st.dictionaries(st.sampled_from(["text", "label", "other"]), values, max_size=3)
files = st.one_of(
    st.lists(rows, max_size=6).map(lambda rows: "".join(json.dumps(row) + "\n" for row in rows)),
    st.text(max_size=60),
    st.sampled_from(["", "{", "[]", "text\tlabel\n", "text\tlabel\nw3\t1\nw4 w5\t0\nw6\t1\n"]),
)


@fuzzed
@given(
    content=files,
    suffix=st.sampled_from(["jsonl", "tsv", "csv", "txt", "json", "parquet", "txt.gz"]),
    task=st.sampled_from(["text-classification", "token-classification", "causal-lm", "masked-lm"]),
)
def test_data_files(tmp_path_factory: pytest.TempPathFactory, content: str, suffix: str, task: str) -> None:
    """Files with any content become batches that the model accepts, or are refused."""
    folder = tmp_path_factory.mktemp("data")
    (folder / f"train.{suffix}").write_text(content, encoding="utf-8", errors="surrogatepass")
    heads = {"text": "BertForSequenceClassification", "toke": "BertForTokenClassification"}
    model = save_text_model(folder / "model", heads.get(task[:4], "BertForMaskedLM"))
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    recipe = DataRecipe(train=str(folder / f"train.{suffix}"), held_out=1, max_length=16)
    try:
        classes = class_names(model.config) if "classification" in task else None
        splits = load_splits(recipe, task, 0, classes=classes)
        prepared = prepare(splits["train"], tokenizer, recipe, task, training=True)
        batches = list(loader(prepared, tokenizer, 2, shuffle=False, seed=0, task=task))
    except EXPECTED:
        return
    for batch in batches:
        model(**batch)


def tensors(dtype: torch.dtype) -> st.SearchStrategy[torch.Tensor]:
    shapes = st.lists(st.integers(0, 12), min_size=0, max_size=3)
    return st.builds(
        lambda shape, low, high: torch.randint(low, high, shape).to(dtype),
        shapes,
        st.integers(-1, 3),
        st.integers(4, 70),
    )


tensor = st.one_of(tensors(torch.long), tensors(torch.int32), tensors(torch.float32), tensors(torch.bool))
inputs = st.sampled_from(["input_ids", "attention_mask", "token_type_ids", "labels", "pixel_values", "extra"])
good = st.builds(lambda rows: {"input_ids": torch.randint(3, 60, (rows, 8))}, st.integers(1, 3))
batches = st.lists(
    st.one_of(
        good,
        st.builds(lambda batch, more: {**batch, **more}, good, st.dictionaries(inputs, tensor, max_size=2)),
        st.dictionaries(inputs, st.one_of(tensor, odd), max_size=3),
        odd,
    ),
    max_size=3,
)


@fuzzed
@given(batches=batches, model_type=st.sampled_from(["gpt2", "bert", "vit"]))
def test_calibration_batches(batches: list[Any], model_type: str) -> None:
    """Any calibration batches give a result that verifies, or are refused."""
    model = tiny_model(model_type)
    torch.manual_seed(0)
    try:
        small = fuse(model, keep_layers=3, effort="low", batches=batches)
    except EXPECTED:
        return
    verify(small)
