"""The benchmarks: how their tables name models and write figures, and how their results are checked."""

import importlib
import json
import math
import sys

import pytest
import torch
from helpers import ROOT, tiny_model
from transformers import AutoConfig

BENCHMARKS = ROOT / "benchmarks"
RESULTS = {path.stem: json.loads(path.read_text()) for path in (BENCHMARKS / "results").glob("*.json")}


def script(name: str):
    """The module of a file in `benchmarks`."""
    if str(BENCHMARKS) not in sys.path:  # they import each other
        sys.path.insert(0, str(BENCHMARKS))
    return importlib.import_module(name)


@pytest.mark.slow  # imports every benchmark
def test_every_results_file_has_a_check():
    """`make bench-check` recomputes a row of each file, and nothing else."""
    assert script("check").CHECKS.keys() == RESULTS.keys()


@pytest.mark.slow  # imports every benchmark
def test_a_check_says_what_differs(monkeypatch):
    """A figure within the tolerance of its kind is the same, another one is different, and a skipped file says why."""
    check = script("check")

    def figures(results):
        yield check.Figure("a row", "quality", 50.0, 50.1)
        yield check.Figure("a row", "quality", 50.0, 51.0)
        yield check.Figure("a row", "count", 3, 3)

    monkeypatch.setitem(check.CHECKS, "heal", figures)
    assert [row[-1] for row in check.checked("heal")] == ["same", "DIFFERENT", "same"]
    assert check.checked("heal")[1][:4] == ["heal", "a row", "50", "51"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert check.checked("merge_cuda") == [["merge_cuda", "skipped: this machine has no GPU", "", "", "", ""]]


def test_figures_have_intervals():
    """Accuracies have Wilson's interval, other metrics the stored one; a figure without an interval stands alone."""
    figures = script("figures")
    right = {"accuracy": 0.8956422018348624, "examples": 872}
    assert figures.figure(right, "accuracy") == "89.56% ± 2.0"
    perplexity = {"token_perplexity": 46.18, "token_perplexity_interval": [41.7, 51.1]}
    assert figures.figure(perplexity, "token_perplexity") == "46.2 ± 4.7"
    assert figures.figure({"token_perplexity": 11272.9}, "token_perplexity") == "11,272.9"
    assert figures.difference(right, right, "accuracy") == "+0.00 ± 2.9 points"
    assert figures.difference({"token_perplexity": 11.0}, {"token_perplexity": 10.0}, "token_perplexity") == "+10.0%"


def test_the_perplexity_of_the_benchmarks_has_an_interval():
    """The perplexity is that of the mean loss over all tokens, and lies inside its interval."""
    model = tiny_model("gpt2", "GPT2LMHeadModel")
    ids = torch.randint(model.config.vocab_size, (12, 16))
    found = script("common").perplexity(model, [{"input_ids": part} for part in ids.split(5)])
    with torch.inference_mode():
        assert found["token_perplexity"] == pytest.approx(math.exp(model(ids, labels=ids).loss))
    low, high = found["token_perplexity_interval"]
    assert low < found["token_perplexity"] < high


@pytest.mark.parametrize("name", ["heal", "collapse_heal", "merge_heal"])
def test_models_that_healing_left_as_they_were_are_marked(name):
    """A table says so of each model whose kept step is 0, and of no other."""
    retraining, note = script("retraining"), script("figures").FOUND_NOTHING
    for job, known in RESULTS[name].items():
        rows = {(row[0], row[1]): row for row in retraining.table(RESULTS[name], job)[1:]}
        for target, models in known["models"].items():
            for method, row in models.items():
                assert (note in rows[target, method][4]) == (row["rounds"][-1]["best_step"] == 0)


def shape(config) -> str:
    """Layers x width of a model; a range of channels of a convolutional network."""
    if config.model_type == "resnet":
        return f"{sum(config.depths)} x {config.hidden_sizes[0]}-{config.hidden_sizes[-1]}"
    if config.model_type == "cifar_resnet":
        return f"{config.num_hidden_layers} x {config.widths[0]}-{config.widths[-1]}"
    if config.model_type == "mobilenet_v2":
        return {0.5: "half width"}[config.depth_multiplier]
    return f"{config.num_hidden_layers} x {config.hidden_size}"


def test_grown_models_are_named_by_their_size():
    """The sizes in the tables are those of the models that the benchmarks train."""
    models, merge = script("figures").MODELS, script("merge")
    grown = {
        "vit-cifar10": script("collapse").vit_config(),
        "resnet34": merge.resnet34_config(),
        "mobilenet-v2": merge.mobilenet_v2_config(),
    }
    for name, config in grown.items():
        assert models[name].split(", ")[1] == shape(config)


def test_checkpoints_are_named_by_their_size(shared):
    """The sizes in the tables are those of the checkpoints."""
    models = script("figures").MODELS
    folders = {"minilm": "minilm-l6", "minilm-sst2": "minilm-l6-sst2", "gpt2": "gpt2-wikitext2"}
    configs = {name: AutoConfig.from_pretrained(shared / "models" / folder) for name, folder in folders.items()}
    published = script("cifar_resnet").published
    configs["resnet56"] = published(shared / "models" / "resnet-cifar10" / "resnet56.safetensors").config
    for name, config in configs.items():
        assert models[name].split(", ")[1] == shape(config)
