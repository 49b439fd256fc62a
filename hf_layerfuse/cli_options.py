"""Options of the command line: their parsers, their values, and errors that name them."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args, get_type_hints

import shtab
import yaml

from .errors import LayerFuseError, RecipeError
from .recipe import SECTIONS, FusionRecipe, Recipe, add_fields

_EXAMPLES = """examples:
  hf-layerfuse run recipes/gpt2-wikitext2.yaml --heal.steps 0
  hf-layerfuse inspect openai-community/gpt2
  hf-layerfuse inspect path/to/config.json                          only sizes, from a config
  hf-layerfuse inspect path/to/bert --similarity cka --text lines.txt
  hf-layerfuse adapt path/to/model > table.py                       the table of an unknown architecture
  hf-layerfuse plan recipes/gpt2-wikitext2.yaml --fusion.keep_layers 6
  hf-layerfuse plan openai-community/gpt2 --keep_layers 8 --text lines.txt
  hf-layerfuse plan path/to/config.json --ratio 0.5 --mode share
  hf-layerfuse report outputs/demo                                  one HTML page about a run
"""

TEXT = ("model", "output_dir", "hub.push_to_hub", "hub.revision")
"""Options whose value is plain text. The values of all other options are YAML."""

RECIPE_USAGE = (
    "RECIPE [--model M] [--output_dir DIR] [--overwrite] [--with_code] "
    "[--push_to_hub NAME [--private] [--revision BRANCH]] [--section.field VALUE]"
)
RUN_DESCRIPTION = (
    "Make a pretrained model smaller with a recipe (fuse its layers, make MLPs linear, or merge convolutions), "
    "heal it, evaluate it and save it."
)
_RUN_OPTIONS: dict[str, Any] = {
    "allow_abbrev": False,
    "argument_default": argparse.SUPPRESS,
    "epilog": "Options replace the values in the file: --fusion.keep_layers 8, --heal.steps 0, --data.name null. "
    "Brackets show the default.",
}

_STACK: dict[str, Any] = {"metavar": "NAME", "help": "stack of layers, such as decoder, if the model has several"}

_TRUST: dict[str, Any] = {
    "action": "store_true",
    "help": "run the code that comes with the model (default: refuse such a model). Read it before",
}

OF_RECIPE: Mapping[type, str] = {Recipe: "", **{kind: f"{section}." for section, kind in SECTIONS.items()}}
"""Start of the option of a field, by the class that has it, in commands that take the recipe of a run."""

OF_FUSION: Mapping[type, str] = {FusionRecipe: ""}
"""The same for a command that takes the fields of a fusion."""


def recipe_parser(prog: str, usage: str) -> argparse.ArgumentParser:
    """Parser of the arguments of a run: the recipe, and an option for each of its fields."""
    parser = argparse.ArgumentParser(prog=prog, usage=usage, description=RUN_DESCRIPTION, **_RUN_OPTIONS)
    _add_recipe(parser)
    return parser


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    recipe = parser.add_argument("recipe", help="YAML file, such as recipes/gpt2-wikitext2.yaml")
    recipe.complete = shtab.FILE
    parser.add_argument("--model", help="Hub name or path that replaces the model of the recipe")
    parser.add_argument("--output_dir", help="directory that replaces the output_dir of the recipe")
    parser.add_argument("--overwrite", action="store_true", help="replace output_dir if it is not empty")
    parser.add_argument("--with_code", action="store_true", help="save the code needed to load without this library")
    parser.add_argument("--push_to_hub", dest="hub.push_to_hub", metavar="NAME", help="publish the result as user/name")
    parser.add_argument("--private", dest="hub.private", action="store_true", help="publish to a private repository")
    parser.add_argument("--revision", dest="hub.revision", metavar="BRANCH", help="branch to publish on")
    add_fields(parser, "the run", Recipe, skip=("model", "output_dir", "overwrite", "with_code"))
    for section, fields_of_section in SECTIONS.items():
        add_fields(parser, f"section {section}", fields_of_section, f"{section}.")


def main_parser() -> argparse.ArgumentParser:
    """Parser of `hf-layerfuse`, with its subcommands."""
    parser = argparse.ArgumentParser(
        prog="hf-layerfuse", description="Make models smaller with recipes, and inspect models and runs."
    )
    parser.add_argument("--version", action="version", version=f"hf-layerfuse {version('hf-layerfuse')}")
    shtab.add_argument_to(parser, "--print-completion", help="print the completion script of this command for a shell")
    commands = parser.add_subparsers(dest="command", required=True)
    run_parser = commands.add_parser(
        "run",
        usage=f"hf-layerfuse run {RECIPE_USAGE}",
        help="make a model smaller with a recipe, in one process",
        description=f"{RUN_DESCRIPTION} For several processes: accelerate launch -m hf_layerfuse RECIPE ...",
        **_RUN_OPTIONS,
    )
    _add_recipe(run_parser)
    shown: dict[str, Any] = {"epilog": _EXAMPLES, "formatter_class": argparse.RawDescriptionHelpFormatter}
    inspect = commands.add_parser(
        "inspect",
        help="show the layers of a model, their sizes and their similarity",
        description="Show the layers of a model, their sizes, their similarity, and the applicable methods.",
        **shown,
    )
    model = inspect.add_argument("model", help="checkpoint, Hub name, config.json, or directory of a config")
    inspect.add_argument(
        "--similarity",
        choices=get_args(get_type_hints(FusionRecipe)["similarity"]),
        help="distance between each layer and the next (default: cosine, of weights). Equal layers have distance 0, "
        "independent random weights about 1. These compare activations and need --text: cka, cka_unbiased, angular, "
        "block_influence",
    )
    text = inspect.add_argument(
        "--text", type=Path, metavar="FILE", help="text file whose lines are used to compare activations"
    )
    inspect.add_argument("--stack", **_STACK)
    inspect.add_argument("--trust_remote_code", **_TRUST)
    model.complete = text.complete = shtab.FILE
    adapt = commands.add_parser(
        "adapt",
        help="find the architecture table of a model, and print it as Python source",
        description="Find the architecture table of a model by running it on a batch, verify the table, and print it "
        "as Python\nsource to review and commit. The checks are comments at its end.",
        **shown,
    )
    model = adapt.add_argument("model", help="checkpoint or Hub name, with weights")
    batch = adapt.add_argument(
        "--batch",
        type=Path,
        metavar="FILE",
        help=".safetensors or .npz file with a tensor for each input of the model, such as input_ids (default: random "
        "inputs)",
    )
    adapt.add_argument("--stack", **_STACK)
    adapt.add_argument("--trust_remote_code", **_TRUST)
    model.complete = batch.complete = shtab.FILE
    plan = commands.add_parser(
        "plan",
        usage="hf-layerfuse plan RECIPE.yaml [options of hf-layerfuse run]\n"
        "       hf-layerfuse plan MODEL [--text FILE] --keep_layers N [--field VALUE ...]",
        help="show what a run will do, and the size and speed of the result",
        description="Show the plan of a run, and the size and the speed of the result, without writing anything. With "
        "a recipe,\nthe search is that of the run, on the same data, for all methods. With a model, it plans a "
        "fusion:\non lines of text with --text, and otherwise from the weights alone.",
        allow_abbrev=False,
        **shown,
    )
    model = plan.add_argument(
        "model",
        metavar="RECIPE.yaml|MODEL",
        help="recipe of a run, or a model as for inspect; with a config, layers form runs of about equal length",
    )
    text = plan.add_argument("--text", type=Path, metavar="FILE", help="text file whose lines are used to calibrate")
    model.complete = text.complete = shtab.FILE
    plan.add_argument("--trust_remote_code", **_TRUST)
    add_fields(plan, "the fusion of a MODEL (fields of FusionRecipe)", FusionRecipe)
    report = commands.add_parser(
        "report",
        help="write an HTML page about a run",
        description="Write one self-contained HTML file with the numbers, plots, plan and recipe of a run.",
        **shown,
    )
    report.add_argument("output_dir", help="output directory of a run").complete = shtab.DIRECTORY
    report.add_argument("--output", metavar="FILE", help="file to write (default: report.html in output_dir)")
    return parser


def underscored(arguments: Sequence[str]) -> list[str]:
    """Arguments whose option names have underscores, as the fields of recipes: `--keep-layers` is `--keep_layers`."""
    words = []
    for word in arguments:
        name, equals, value = word.partition("=")
        if word.startswith("--") and name != "--print-completion":
            word = f"--{name[2:].replace('-', '_')}{equals}{value}"
        words.append(word)
    return words


def parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    """Turn `["--heal.steps", "0", "--data.name=null"]` into `{"heal.steps": 0, "data.name": None}`; values are YAML.

    Raises:
        RecipeError: Argument that is not an option, or option without a value.
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


def check_options(words: Sequence[str], options: Mapping[type, str], command: str, others: Collection[str]) -> None:
    """Refuse options that a command does not have.

    Args:
        words: Arguments that its parser does not know.
        options: Start of the option of a field, by class.
        command: The command, for the message.
        others: Its options that are not fields.

    Raises:
        RecipeError: Unknown option; the message names the closest one.
    """
    known = {*others, *(f"{start}{field.name}" for kind, start in options.items() for field in fields(kind))}
    earlier = {f"{start}{name}" for kind, start in options.items() for name in kind._renamed}
    for word in words:
        name = word[2:].partition("=")[0]
        if not word.startswith("--") or name in known | earlier:
            continue
        same = [each for each in sorted(known) if each.rpartition(".")[2] == name.rpartition(".")[2]]
        close = same or difflib.get_close_matches(name, sorted(known), n=1)
        hint = f" Did you mean --{close[0]}?" if close else ""
        raise RecipeError(f"--{name} is not an option.{hint} `{command} --help` lists all options.")


def in_options(error: LayerFuseError, options: Mapping[type, str], default: type | None = None) -> str:
    """The message of an error with the options of the command line in place of the fields of recipes.

    Args:
        error: Error whose message names fields, such as `keep_layers=0` or `heal.steps`, or asks for `stack=`.
        options: Start of the option of a field, by class.
        default: Class of the fields in messages that do not belong to one class.
    """
    message = str(error)
    for section, kind in SECTIONS.items():
        if kind in options:
            names = "|".join(field.name for field in fields(kind))
            option = rf"--{options[kind]}\1"
            message = re.sub(rf"(?<![\w./-]){section}\.({names})\b(?!\.\w|/)", option, message)
    stack = f"--{options.get(default, '')}stack"
    message = message.replace("pass stack= ", f"give {stack} ").replace("leave stack= out", f"leave {stack} out")
    kind = getattr(error, "recipe", None) or default
    if not isinstance(error, RecipeError) or kind not in options:
        return message
    if f"{kind.__name__} has no field" in message or f"{kind.__name__} lacks" in message:
        place = f"section {options[kind]}".rstrip(".") if options[kind] else "the recipe"
        return message.replace(kind.__name__, place, 1)  # its names are those of a file
    words = {field.name for field in fields(kind)}
    names, alone = "|".join(words), "|".join(word for word in words if "_" in word)
    option = rf"--{options[kind]}\1"
    message = message.removeprefix(f"{kind.__name__}: ")
    # a name of one word may be plain English, unless a value follows
    message = re.sub(rf"(?<![\w./'\"-])({names})(?==| \()", option, message)
    return re.sub(rf"(?<![\w./'\"=-])({alone})\b(?![.(/=]\w)", option, message) if alone else message
