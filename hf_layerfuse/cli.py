"""The command behind `fuse.py`: from the words of a command line to a recipe."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import yaml

from .errors import LayerFuseError, RecipeError
from .job import run
from .processes import process_state
from .recipe import load_recipe


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a recipe. Returns 0, 130 after Ctrl-C, or 1 after an error that the user can mend.

    Those are every `LayerFuseError`, and what the operating system refuses, such as to write to a full disk. What it is
    goes to standard error, from whichever process has met it.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(
        prog="fuse.py",
        usage="accelerate launch fuse.py RECIPE [--model M] [--output_dir DIR] [--overwrite] [--with_code] "
        "[--push_to_hub NAME [--private] [--revision BRANCH]] [--section.field VALUE]",
        allow_abbrev=False,
        description="Make a pretrained model smaller by a recipe (fuse its layers, or make MLPs linear), heal it, "
        "evaluate it and save it.",
        epilog="Every field of the recipe can be set: --section.field value, such as --fusion.keep_layers 8 or "
        "--heal.steps 0. A field that is not in a section goes without one: --seed 1.",
    )
    parser.add_argument("recipe", help="YAML file, such as recipes/gpt2-wikitext2.yaml")
    parser.add_argument("--model", help="Hub name or path, in place of the recipe's")
    parser.add_argument("--output_dir", help="where to write, in place of the recipe's")
    parser.add_argument("--overwrite", action="store_true", help="replace output_dir if it is not empty")
    parser.add_argument("--with_code", action="store_true", help="let the result be loaded without this library")
    parser.add_argument("--push_to_hub", metavar="NAME", help="publish the result as user/name on the Hub")
    parser.add_argument("--private", action="store_true", help="where only you, or your organisation, can see it")
    parser.add_argument("--revision", metavar="BRANCH", help="publish it on a branch")
    known, rest = parser.parse_known_args(arguments)
    try:
        if arguments[0].startswith("-"):
            raise RecipeError(f"the recipe comes first, before {arguments[0]}: fuse.py RECIPE.yaml {arguments[0]} ...")
        overrides = parse_overrides(rest)
        overrides |= {name: value for name in ("model", "output_dir") if (value := getattr(known, name)) is not None}
        overrides |= {name: True for name in ("overwrite", "with_code") if getattr(known, name)}
        for name in ("push_to_hub", "private", "revision"):
            if value := getattr(known, name):
                overrides[f"hub.{name}"] = value
        recipe = load_recipe(known.recipe, overrides)
        run(recipe, command=shlex.join(["accelerate", "launch", "fuse.py", *arguments]))
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
