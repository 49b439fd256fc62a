"""The command line: `hf-layerfuse` and its subcommands. `fuse.py` runs `hf-layerfuse run` under its own name.

Modules that need torch are imported only after the arguments are parsed, so that `--help` is fast.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args, get_type_hints

import shtab
import yaml

from .errors import LayerFuseError, RecipeError
from .recipe import SECTIONS, FusionRecipe, Recipe, add_fields, load_recipe

_EXAMPLES = """examples:
  hf-layerfuse run recipes/gpt2-wikitext2.yaml --heal.steps 0
  hf-layerfuse inspect openai-community/gpt2
  hf-layerfuse inspect path/to/config.json                          only sizes, from a config
  hf-layerfuse inspect path/to/bert --similarity cka --text lines.txt
  hf-layerfuse plan openai-community/gpt2 --keep_layers 8
  hf-layerfuse plan path/to/config.json --ratio 0.5 --mode share
  hf-layerfuse report outputs/demo                                  one HTML page about a run
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand of `hf-layerfuse`. Returns 0, 130 after Ctrl-C, or 1 after an error that the user can fix.

    Error messages go to standard error.
    """
    arguments = _underscored(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    known, rest = parser.parse_known_args(arguments)
    if known.command == "run":
        words = arguments[1:]
        return _run("hf-layerfuse run", words, known, rest, ["hf-layerfuse", "run", *words])
    try:
        if rest and known.command != "plan":  # FusionRecipe reports unknown fields of a plan
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        _show(known, rest)
    except LayerFuseError as error:
        print(f"hf-layerfuse: {error}", file=sys.stderr)
        return 1
    return 0


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a recipe, as `fuse.py` does. Returns 0, 130 after Ctrl-C, or 1 after an error that the user can fix.

    Every `LayerFuseError` and every `OSError`, such as a full disk, counts as such an error. The process that raised
    it prints the message to standard error.
    """
    arguments = _underscored(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="fuse.py", usage=f"accelerate launch fuse.py {_RUN_USAGE}", description=_RUN_DESCRIPTION, **_RUN_OPTIONS
    )
    _add_recipe(parser)
    known, rest = parser.parse_known_args(arguments)
    module = Path(sys.argv[0]).parts[-2:] == ("hf_layerfuse", "__main__.py")
    program = ["-m", "hf_layerfuse"] if module else ["fuse.py"]
    return _run("fuse.py", arguments, known, rest, ["accelerate", "launch", *program, *arguments])


def _underscored(arguments: Sequence[str]) -> list[str]:
    """Arguments whose option names have underscores, as the fields of recipes: `--keep-layers` is `--keep_layers`."""
    words = []
    for word in arguments:
        name, equals, value = word.partition("=")
        if word.startswith("--") and name != "--print-completion":
            word = f"--{name[2:].replace('-', '_')}{equals}{value}"
        words.append(word)
    return words


def _run(prog: str, words: Sequence[str], known: argparse.Namespace, rest: Sequence[str], command: list[str]) -> int:
    """Run a recipe from parsed arguments: `words` holds all of them, `rest` those unknown to the parser."""
    try:
        if words[0].startswith("-"):
            raise RecipeError(f"the recipe comes first, before {words[0]}: {prog} RECIPE.yaml {words[0]} ...")
        given = {name: value for name, value in vars(known).items() if name not in ("command", "recipe")}
        plain = {name: value for name, value in given.items() if value is True or name in _TEXT}
        overrides = plain | parse_overrides([*(f"--{name}={given[name]}" for name in given.keys() - plain), *rest])
        recipe = load_recipe(known.recipe, overrides)
        from .pipeline.run import run as run_recipe

        run_recipe(recipe, command=shlex.join(command))
    except LayerFuseError as error:
        _complain(prog, str(error))
        return 1
    except OSError as error:
        _complain(prog, f"{error}. Fix this, then rerun the same command to resume.")
        return 1
    except KeyboardInterrupt:
        from .training.distributed import process_state

        if process_state().is_main_process:
            print(f"{prog}: interrupted. Rerun the same command to resume from the last checkpoint.", file=sys.stderr)
        return 130
    return 0


def _show(known: argparse.Namespace, rest: Sequence[str]) -> None:
    """Run `inspect`, `plan` or `report`, and print the result."""
    if known.command == "report":
        from .pipeline.report.page import write_page

        print(f"Written: {write_page(known.output_dir, known.output)}")
        return
    if known.command == "plan":
        names = vars(known).keys() & {field.name for field in fields(FusionRecipe)}
        given = [f"--{name}={getattr(known, name)}" for name in names]
        recipe = FusionRecipe(**parse_overrides([*given, *rest]))
    from .pipeline.inspect import inspect_tables, plan_tables
    from .pipeline.report.tables import text_table

    if known.command == "plan":
        tables = plan_tables(known.model, recipe, known.text)
    else:
        tables = inspect_tables(known.model, known.similarity, known.text)
    print("\n\n".join(map(text_table, tables)))


_TEXT = ("model", "output_dir", "hub.push_to_hub", "hub.revision")
"""Options whose value is plain text. The values of all other options are YAML."""

_RUN_USAGE = (
    "RECIPE [--model M] [--output_dir DIR] [--overwrite] [--with_code] "
    "[--push_to_hub NAME [--private] [--revision BRANCH]] [--section.field VALUE]"
)
_RUN_DESCRIPTION = (
    "Make a pretrained model smaller with a recipe (fuse its layers, make MLPs linear, or merge convolutions), "
    "heal it, evaluate it and save it."
)
_RUN_OPTIONS: dict[str, Any] = {
    "allow_abbrev": False,
    "argument_default": argparse.SUPPRESS,
    "epilog": "Options replace the values in the file: --fusion.keep_layers 8, --heal.steps 0, --data.name null. "
    "Brackets show the default.",
}


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a run: the recipe, and an option for each of its fields."""
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-layerfuse", description="Make models smaller with recipes, and inspect models and runs."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run_parser = commands.add_parser(
        "run",
        usage=f"hf-layerfuse run {_RUN_USAGE}",
        help="make a model smaller with a recipe, in one process",
        description=f"{_RUN_DESCRIPTION} For several processes: accelerate launch -m hf_layerfuse RECIPE ...",
        **_RUN_OPTIONS,
    )
    _add_recipe(run_parser)
    inspect = commands.add_parser(
        "inspect",
        help="show the layers of a model, their sizes and their similarity",
        description="Show the layers of a model, their sizes, their similarity, and the applicable methods.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
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
    model.complete = text.complete = shtab.FILE
    plan = commands.add_parser(
        "plan",
        usage="hf-layerfuse plan MODEL [--text FILE] --keep_layers N [--field VALUE ...]",
        help="show which layers a fusion would fuse, and the size of the result",
        description="Show the plan of a fusion without applying it. A latency budget, collapse and merge need "
        "measurements, so only a run plans them.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    model = plan.add_argument("model", help="as for inspect; with a config, layers form runs of about equal length")
    text = plan.add_argument("--text", type=Path, metavar="FILE", help="text file for a similarity of activations")
    model.complete = text.complete = shtab.FILE
    report = commands.add_parser(
        "report",
        help="write an HTML page about a run",
        description="Write one self-contained HTML file with the numbers, plots, plan and recipe of a run.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    report.add_argument("output_dir", help="output directory of a run").complete = shtab.DIRECTORY
    report.add_argument("--output", metavar="FILE", help="file to write (default: report.html in output_dir)")
    add_fields(plan, "the fusion (fields of FusionRecipe)", FusionRecipe)
    parser.add_argument("--version", action="version", version=f"hf-layerfuse {version('hf-layerfuse')}")
    shtab.add_argument_to(parser, "--print-completion", help="print the completion script of this command for a shell")
    return parser


def _complain(prog: str, what: str) -> None:
    from .training.distributed import process_state

    state = process_state()
    which = "" if state.is_main_process else f" (process {state.process_index})"
    print(f"{prog}{which}: {what}", file=sys.stderr)


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
