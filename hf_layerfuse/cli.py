"""The command behind `fuse.py`: from the words of a command line to a recipe."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from .errors import LayerFuseError, RecipeError
from .pipeline.run import run
from .recipe import SECTIONS, Recipe, add_fields, load_recipe
from .training.distributed import process_state


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a recipe. Returns 0, 130 after Ctrl-C, or 1 after an error that the user can mend.

    Those are every `LayerFuseError`, and what the operating system refuses, such as to write to a full disk. What it is
    goes to standard error, from whichever process has met it.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = _parser()
    known, rest = parser.parse_known_args(arguments)
    try:
        if arguments[0].startswith("-"):
            raise RecipeError(f"the recipe comes first, before {arguments[0]}: fuse.py RECIPE.yaml {arguments[0]} ...")
        given = {name: value for name, value in vars(known).items() if name != "recipe"}
        plain = {name: value for name, value in given.items() if value is True or name in _TEXT}
        overrides = plain | parse_overrides([*(f"--{name}={given[name]}" for name in given.keys() - plain), *rest])
        recipe = load_recipe(known.recipe, overrides)
        program = (
            ["-m", "hf_layerfuse"] if Path(sys.argv[0]).parts[-2:] == ("hf_layerfuse", "__main__.py") else ["fuse.py"]
        )
        run(recipe, command=shlex.join(["accelerate", "launch", *program, *arguments]))
    except LayerFuseError as error:
        _complain(str(error))
        return 1
    except OSError as error:
        _complain(f"{error}. When that is mended, the same command goes on from where it was.")
        return 1
    except KeyboardInterrupt:
        if process_state().is_main_process:
            print("fuse.py: interrupted; the same command goes on from the last checkpoint.", file=sys.stderr)
        return 130
    return 0


_TEXT = ("model", "output_dir", "hub.push_to_hub", "hub.revision")
"""Options whose value is text as it stands; that of others is YAML."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fuse.py",
        usage="accelerate launch fuse.py RECIPE [--model M] [--output_dir DIR] [--overwrite] [--with_code] "
        "[--push_to_hub NAME [--private] [--revision BRANCH]] [--section.field VALUE]",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        description="Make a pretrained model smaller by a recipe (fuse its layers, make MLPs linear, or merge "
        "convolutions), heal it, evaluate it and save it.",
        epilog="What is given here takes the place of what the file has: --fusion.keep_layers 8, --heal.steps 0, "
        "--data.name null. In brackets is what holds where neither says anything.",
    )
    parser.add_argument("recipe", help="YAML file, such as recipes/gpt2-wikitext2.yaml")
    parser.add_argument("--model", help="Hub name or path, in place of the recipe's")
    parser.add_argument("--output_dir", help="where to write, in place of the recipe's")
    parser.add_argument("--overwrite", action="store_true", help="replace output_dir if it is not empty")
    parser.add_argument("--with_code", action="store_true", help="let the result be loaded without this library")
    parser.add_argument("--push_to_hub", dest="hub.push_to_hub", metavar="NAME", help="publish it as user/name")
    parser.add_argument("--private", dest="hub.private", action="store_true", help="where not everybody can see it")
    parser.add_argument("--revision", dest="hub.revision", metavar="BRANCH", help="publish it on a branch")
    add_fields(parser, "the run", Recipe, skip=("model", "output_dir", "overwrite", "with_code"))
    for section, recipe in SECTIONS.items():
        add_fields(parser, f"section {section}", recipe, f"{section}.")
    return parser


def _complain(what: str) -> None:
    state = process_state()
    which = "" if state.is_main_process else f" (process {state.process_index})"
    print(f"fuse.py{which}: {what}", file=sys.stderr)


def parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    """`["--heal.steps", "0", "--data.name=null"]` to `{"heal.steps": 0, "data.name": None}`; values are YAML.

    Raises:
        RecipeError: a word that is not an option, or an option without a value.
    """
    overrides: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise RecipeError(f"{word!r} is not an option: write --section.field value, such as --heal.steps 0.")
        name, has_value, value = word[2:].partition("=")
        if not has_value:
            if not rest or rest[0].startswith("--"):
                raise RecipeError(f"{word} has no value: write {word} VALUE.")
            value = rest.pop(0)
        try:
            overrides[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise RecipeError(f"{word}: {value!r} is not a YAML value: {error}") from error
    return overrides
