"""`hf-layerfuse adapt` prints the architecture table of a checkpoint."""

import json
import shutil

import numpy as np
import pytest
import torch
from families import family_inputs, family_model
from helpers import tiny_model
from repeated import repeated
from runs import causal_lm
from safetensors.torch import save_file
from transformers import BartForCausalLM

from hf_layerfuse import DataError
from hf_layerfuse.cli import main
from hf_layerfuse.models.architectures import ARCHITECTURES
from hf_layerfuse.pipeline.adapt import read_batch


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("gpt2")
    tiny_model("gpt2", "GPT2LMHeadModel").save_pretrained(path)
    return path


def test_adapt_prints_source_and_checks(checkpoint, tmp_path, capsys):
    """The output is a Python file: the table, and the checks as comments."""
    save_file({"input_ids": torch.arange(24).view(2, 12)}, tmp_path / "batch.safetensors")
    assert main(["adapt", str(checkpoint), "--batch", str(tmp_path / "batch.safetensors")]) == 0
    printed = capsys.readouterr().out
    compile(printed, "table.py", "exec")
    assert '    attention = {"norm": "ln_1", "qkv": "attn.c_attn", "out": "attn.c_proj"}' in printed.splitlines()
    checks = [line for line in printed.splitlines() if line.startswith("# ")]
    assert len(checks) == 4
    assert all(line.endswith("holds") for line in checks[1:])


def test_adapt_asks_in_options(tmp_path, capsys):
    """A model with several stacks asks for `--stack`."""
    model = family_model("bart")
    model.save_pretrained(tmp_path)
    assert main(["adapt", str(tmp_path)]) == 1
    assert "give --stack with one of 'encoder' (model.encoder.layers, 6 layers" in capsys.readouterr().err
    assert main(["adapt", str(tmp_path), "--stack", "encoder"]) == 0
    assert 'layers = "encoder.layers"' in capsys.readouterr().out
    assert main(["adapt", str(tmp_path), "--stack", "middle"]) == 1
    assert "has no stack 'middle'. It has 'encoder'" in capsys.readouterr().err


def test_a_config_is_refused(checkpoint, capsys):
    """A config has no weights to run."""
    assert main(["adapt", str(checkpoint / "config.json")]) == 1
    assert "an architecture is found by running a model: name a checkpoint with weights" in capsys.readouterr().err


def test_code_of_a_checkpoint_is_not_run(checkpoint, tmp_path, capsys):
    """A checkpoint with code of its own is refused with how to load it."""
    shutil.copytree(checkpoint, tmp_path / "own")
    config = json.loads((tmp_path / "own" / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}}
    (tmp_path / "own" / "config.json").write_text(json.dumps(config))
    (tmp_path / "own" / "own.py").write_text("raise AssertionError")
    assert main(["adapt", str(tmp_path / "own")]) == 1
    assert "has code of its own, which is not run unasked: read it, then pass" in capsys.readouterr().err


OWN = """
from transformers import GPT2Config, GPT2LMHeadModel

class OwnConfig(GPT2Config):
    model_type = "own"

class Own(GPT2LMHeadModel):
    config_class = OwnConfig
"""


def test_code_of_a_checkpoint_is_run_on_request(checkpoint, tmp_path, capsys, monkeypatch):
    """Every command that loads a model runs its code with `--trust_remote_code`, and refuses it without. Only `adapt`
    needs no registration of its classes."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    path = tmp_path / "own_code"
    shutil.copytree(checkpoint, path)
    config = json.loads((path / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["Own"]}
    config |= {"auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}}
    (path / "config.json").write_text(json.dumps(config))
    (path / "own.py").write_text(OWN)
    for words in (["inspect"], ["plan", "--keep_layers", "3"]):
        command = [words[0], str(path), *words[1:]]
        assert main(command) == 1
        assert "add --trust_remote_code to `inspect`" in capsys.readouterr().err
        assert main([*command, "--trust_remote_code"]) == 1
        assert "call AutoConfig.register('own', YourConfig)" in capsys.readouterr().err
    assert main(["adapt", str(path)]) == 1
    assert main(["adapt", str(path), "--trust_remote_code"]) == 0
    assert "class Own" in capsys.readouterr().out


def test_batches_are_read_without_pickle(tmp_path):
    """Files of safetensors and numpy are read; pickles, in whatever file, are not."""
    expected = family_inputs("llama", family_model("llama"))["input_ids"]
    np.savez(tmp_path / "batch.npz", input_ids=expected.numpy())
    assert torch.equal(read_batch(tmp_path / "batch.npz")["input_ids"], expected)
    np.savez(tmp_path / "objects.npz", input_ids=np.array([{"a": 1}], dtype=object))
    torch.save({"input_ids": expected}, tmp_path / "batch.pt")
    (tmp_path / "broken.safetensors").write_text("nothing")
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "half.npz").write_bytes((tmp_path / "batch.npz").read_bytes()[:100])
    with (tmp_path / "unnamed.npz").open("wb") as file:
        np.save(file, expected.numpy())
    np.savez(tmp_path / "nothing.npz")
    wrong = (
        "nothing.npz",
        "objects.npz",
        "batch.pt",
        "broken.safetensors",
        "missing.npz",
        "empty.npz",
        "half.npz",
        "unnamed.npz",
    )
    for name in wrong:
        with pytest.raises(DataError, match=f"--batch .*{name}"):
            read_batch(tmp_path / name)


def test_inspect_knows_discovered_tables(tmp_path, capsys):
    """`hf-layerfuse inspect` shows a model of an unknown architecture by its discovered table, and says so."""
    repeated().save_pretrained(tmp_path)
    try:
        assert main(["inspect", str(tmp_path)]) == 0
    finally:
        ARCHITECTURES.pop("repeated", None)
    shown = capsys.readouterr()
    assert shown.out.count("yes") == 2
    assert "warning: unknown architecture 'repeated': RepeatedArchitecture was discovered" in shown.err
    assert f"`hf-layerfuse adapt {tmp_path}` prints this table" in shown.err


def test_inspect_shows_the_chosen_stack(tmp_path, capsys):
    """`--stack` chooses the stack that `inspect` shows. Without it, a decoder alone is refused with the option."""
    model = family_model("bart")
    BartForCausalLM(model.config).save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 1
    assert "give --stack to choose another of its stacks (decoder)" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path), "--stack", "decoder"]) == 0
    assert "attention to the next" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path), "--stack", "middle"]) == 1
    assert "'bart' has no stack 'middle'. It has: encoder, decoder" in capsys.readouterr().err


@pytest.mark.slow
def test_recipes_use_discovered_tables(tmp_path, capsys, monkeypatch):
    """A run of a recipe on an unknown architecture discovers its table, says so, and ends with a verified result."""
    monkeypatch.delitem(ARCHITECTURES, "gpt2")
    assert main(["run", *causal_lm(tmp_path), "--heal.steps", "0"]) == 0
    assert "warning: unknown architecture 'gpt2': Gpt2Architecture was discovered" in capsys.readouterr().err
