"""Train the model that demo.yaml fuses: a small GPT-2, in about a minute, on text that every machine has.

    python recipes/demo.py outputs/demo-model

The text is the source of Python's standard library. Model, tokenizer and the three splits go to the directory.
"""

import sys
import sysconfig
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, set_seed

from hf_layerfuse.data.prepare import loader, prepare
from hf_layerfuse.data.splits import load_splits
from hf_layerfuse.pipeline.output import new_directory
from hf_layerfuse.recipe import DataRecipe, HealRecipe
from hf_layerfuse.training.heal import heal

LAYERS, WIDTH, HEADS, VOCABULARY, WINDOW = 6, 128, 4, 2048, 128
TRAIN_BYTES, TEST_BYTES = 3_000_000, 200_000
STEPS = 400


def write_splits(path: Path) -> None:
    """Every tenth module goes to validation, the one after it to test, the others to train."""
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py"))
    modules += sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*/[a-z]*.py"))
    modules = [module for module in modules if module.parent.name not in ("site-packages", "test", "idlelib")]
    parts = {
        "validation": (modules[::10], TEST_BYTES),
        "test": (modules[1::10], TEST_BYTES),
        "train": ([m for i, m in enumerate(modules) if i % 10 > 1], TRAIN_BYTES),
    }
    for split, (files, limit) in parts.items():
        text = "".join(file.read_text(encoding="utf-8", errors="ignore") for file in files)
        (path / f"{split}.txt").write_text(text[:limit], encoding="utf-8")


def main(output: str) -> None:
    if Path(output, "config.json").is_file():
        print(f"{output} is already there; delete it to train again")
        return
    set_seed(0)
    with new_directory(output) as path:
        write_splits(path)
        bpe = ByteLevelBPETokenizer()
        bpe.train(str(path / "train.txt"), vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"], show_progress=False)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=bpe._tokenizer,
            bos_token="<|endoftext|>",
            eos_token="<|endoftext|>",
            pad_token="<|endoftext|>",
            model_max_length=WINDOW,
        )
        config = GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=WINDOW,
            n_embd=WIDTH,
            n_layer=LAYERS,
            n_head=HEADS,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        model = GPT2LMHeadModel(config)
        data = DataRecipe(
            train=str(path / "train.txt"),
            validation=str(path / "validation.txt"),
            max_length=WINDOW,
            max_test_samples=64,
        )
        splits = load_splits(data, "causal-lm", seed=0)
        train = prepare(splits["train"], tokenizer, data, "causal-lm", training=True)
        validation = prepare(splits["validation"], tokenizer, data, "causal-lm", training=False)
        report = heal(
            model,
            loader(train, tokenizer, 16, shuffle=True, seed=0, task="causal-lm"),
            HealRecipe(steps=STEPS, learning_rate=2e-3, kl_weight=0.0, eval_every=STEPS),
            validation_batches=list(loader(validation, tokenizer, 16, shuffle=False, seed=0, task="causal-lm")),
        )
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
    loss = report.validation_loss[-1][1]
    print(
        f"trained {model.num_parameters():,} parameters on {len(train)} windows in {report.seconds:.0f} s with "
        f"{torch.get_num_threads()} threads: validation loss {loss:.2f}, written to {output}"
    )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
