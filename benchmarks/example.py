"""Run the first example of the README on the real model, and keep what it prints.

    python benchmarks/example.py [--threads 2]

Checkpoint and text come from LAYERFUSE_DATA (default ../shared) in place of the Hub.
"""

import contextlib
import io
import os
import re
import tempfile
from unittest import mock

import common
import torch

README = common.ROOT / "README.md"
RESULT = common.RESULTS / "example.json"


def example() -> str:
    """Code of the first example."""
    return re.search(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)[1]


def local(code: str) -> str:
    """The code with the local checkpoint for its name on the Hub."""
    path = common.DATA / "models" / "minilm-l6"
    name = "sentence-transformers/all-MiniLM-L6-v2"
    if name not in code:
        raise ValueError(f"the example in {README} does not load {name!r}: name its local copy here.")
    return code.replace(name, str(path))


def output(code: str) -> str:
    """What the code prints. What it saves goes to a temporary folder."""
    code, printed, here = local(code), io.StringIO(), os.getcwd()
    with tempfile.TemporaryDirectory() as folder, mock.patch("datasets.load_dataset", wikitext):
        os.chdir(folder)
        try:
            with contextlib.redirect_stdout(printed):
                exec(compile(code, str(README), "exec"), {})
        finally:
            os.chdir(here)
    lines = printed.getvalue().splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith("["))  # logs of DeepSpeed, where it is installed


def wikitext(name: str, config: str, split: str) -> dict[str, list[str]]:
    """Lines of WikiText-2, as the data set on the Hub has them."""
    file = {"train": "train", "validation": "valid", "test": "test"}[split]
    return {"text": [f" {line} \n" for line in common.text(file).split("\n")]}


if __name__ == "__main__":
    options = common.parsed(common.command_line(__doc__, ()))
    common.save({"code": example(), "output": output(example()), "threads": torch.get_num_threads()}, RESULT)
    print(common.load(RESULT)["output"])
