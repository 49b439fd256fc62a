"""`hf-layerfuse inspect` is correct for every architecture, with weights or without."""

import shutil
import subprocess

import pytest
import torch
from helpers import NETWORKS, TINY, network, tiny_model
from runs import causal_lm

from hf_layerfuse import FusionRecipe, cli
from hf_layerfuse.cli import main
from hf_layerfuse.methods.fusion.distances import block_distances
from hf_layerfuse.models.architectures import ARCHITECTURES, ConvGraphArchitecture, architecture_for
from hf_layerfuse.pipeline.inspect import overview
from hf_layerfuse.pipeline.report.tables import text_table
from hf_layerfuse.recipe import SECTIONS
from hf_layerfuse.recipe.fields import fields_of


@pytest.mark.parametrize("model_type", TINY)
def test_layers_and_blocks_are_counted(model_type) -> None:
    """Each layer has its parameters, and its blocks have no more; distances equal those of the fusion engine."""
    model = tiny_model(model_type)
    architecture = architecture_for(model)
    summary, layers = overview(model, "cosine")
    sizes = dict(map(tuple, summary))
    assert int(sizes["parameters"].replace(",", "")) == model.num_parameters()
    assert sizes["fuse()"] == sizes["collapse()"] == "yes"
    distances = block_distances(model, architecture.kinds, "cosine", None)
    for place, (row, layer) in enumerate(zip(layers[1:], architecture.layer_list(model), strict=True)):
        total, *blocks = (int(value.replace(",", "")) for value in row[1 : 2 + len(architecture.kinds)])
        assert total == sum(p.numel() for p in layer.parameters())
        assert all(block > 0 for block in blocks)
        assert sum(blocks) <= total
        if place + 1 < len(layers) - 1:
            apart = [float(value) for value in row[-len(architecture.kinds) :]]
            wanted = [distances[kind][place, place + 1].item() for kind in architecture.kinds]
            assert apart == pytest.approx(wanted, abs=6e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_convolutions_are_counted(name) -> None:
    model = network(name)
    tables = overview(model)
    graph = architecture_for(model, ConvGraphArchitecture).convolutions(model).graph(model)
    rows = dict(map(tuple, tables[-1]))
    assert int(rows["convolutions"]) == len(graph.nodes)
    assert int(rows["segments of two or more that can be one"]) > 0
    assert dict(map(tuple, tables[0]))["merge()"] == "yes"


def test_a_checkpoint_and_a_config_alone(tmp_path, capsys) -> None:
    """A config gives sizes but no distances; a similarity of weights is refused."""
    causal_lm(tmp_path)
    checkpoint = tmp_path / "model"
    capsys.readouterr()
    assert main(["inspect", str(checkpoint)]) == 0
    whole = capsys.readouterr().out
    assert "fuse()" in whole
    assert "attention to the next" in whole
    assert main(["inspect", str(checkpoint), "--similarity", "cka", "--text", str(tmp_path / "train.txt")]) == 0
    assert "attention to the next" in capsys.readouterr().out
    assert main(["inspect", str(checkpoint / "config.json")]) == 0
    sizes = capsys.readouterr().out
    assert "attention to the next" not in sizes
    assert sizes.splitlines()[1].split() == whole.splitlines()[1].split()  # parameters
    assert main(["inspect", str(checkpoint / "config.json"), "--similarity", "cosine"]) == 1
    assert "a config has no weights to compare" in capsys.readouterr().err


def test_bad_input_is_refused(tmp_path, capsys) -> None:
    causal_lm(tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"pickle")
    shutil.copy(tmp_path / "model" / "config.json", tmp_path / "pickled")
    for words, reason in (
        (["/nowhere/at/all"], "there is no directory"),
        ([str(tmp_path / "folder")], "neither a checkpoint nor a valid config"),
        ([str(tmp_path / "pickled")], "its weights in pytorch_model.bin"),
        ([str(tmp_path / "model"), "--similarity", "cka"], "give --text FILE"),
        ([str(tmp_path / "model"), "--text", str(tmp_path / "empty.txt")], "no lines of text"),
        ([str(tmp_path / "model"), "--text", str(tmp_path / "none.txt")], "none.txt"),
    ):
        assert main(["inspect", *words]) == 1
        assert reason in capsys.readouterr().err
    for words, reason in (
        (["--keep_layers", "40"], "fuses nothing"),
        (["--keep_layer", "2"], "Did you mean --keep_layers?"),
        (["--latency_budget", "0.5"], "needs measurements"),
        (["--keep_layers", "0"], "--keep_layers=0 leaves no layer"),
        ([], "exactly one target"),
    ):
        assert main(["plan", str(tmp_path / "model"), *words]) == 1
        assert reason in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["inspect", str(tmp_path / "model"), "--what", "1"])


def test_what_cannot_be_done_is_said() -> None:
    """The reason appears instead of `yes`."""
    model = tiny_model("gpt2", scale_attn_by_inverse_layer_idx=True)
    found = text_table(overview(model)[0])
    assert "no: " in found
    assert "scale_attn_by_inverse_layer_idx" in found
    with torch.device("meta"):
        assert "fuse()" not in text_table(overview(type(model)(model.config))[0])
    assert len(ARCHITECTURES) > len(TINY)


def test_help_explains_every_field(capsys) -> None:
    """`plan --help` has each field of `FusionRecipe` with its allowed values; `fuse.py --help` has all fields."""
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for field in fields_of(FusionRecipe):
        assert f"--{field.name} {field.kind}" in shown
        assert len(field.meaning) > 8
    with pytest.raises(SystemExit):
        cli.run(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for section, recipe in SECTIONS.items():
        for field in fields_of(recipe):
            assert f"--{section}.{field.name} {field.kind}" in shown
    assert "--seed N Seed of shuffling, sampling and dropout [0]" in shown


def test_words_complete(tmp_path, capsys) -> None:
    """The printed script completes subcommands, options and their values in bash."""
    with pytest.raises(SystemExit):
        main(["--print-completion", "bash"])
    (tmp_path / "complete").write_text(capsys.readouterr().out)
    for words, found in (
        ("hf-layerfuse pl", {"plan"}),
        ("hf-layerfuse plan model --kee", {"--keep_layers"}),
        ("hf-layerfuse plan model --mode ", {"depth", "share", "basis"}),
    ):
        *_, last = parts = words.split(" ")
        script = f"""source {tmp_path / "complete"}
COMP_WORDS=({" ".join(parts[:-1])} "{last}"); COMP_CWORD={len(parts) - 1}
_shtab_hf_layerfuse; printf '%s\\n' "${{COMPREPLY[@]}}" """
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
        assert set(done.stdout.split()) == found, done.stderr
