"""The command line: `hf-layerfuse` and its subcommands. `fuse.py` runs `hf-layerfuse run` under its own name.

The modules that do the work are imported after the words are parsed, so that help does not wait for torch.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import shtab
import yaml

from .errors import LayerFuseError, RecipeError
from .recipe import SECTIONS, FusionRecipe, Recipe, add_fields, load_recipe

_EXAMPLES = """examples:
  hf-layerfuse run recipes/gpt2-wikitext2.yaml --heal.steps 0
  hf-layerfuse inspect openai-community/gpt2
  hf-layerfuse inspect path/to/config.json                          sizes alone, from a config
  hf-layerfuse inspect path/to/bert --similarity cka --text lines.txt
  hf-layerfuse plan openai-community/gpt2 --keep_layers 8
  hf-layerfuse plan path/to/config.json --ratio 0.5 --mode share
  hf-layerfuse report outputs/demo                                  of what a run wrote there
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand of `hf-layerfuse`. Returns 0, 130 after Ctrl-C, or 1 after an error that the user can fix.

    Errors go to standard error.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = _parser()
    known, rest = parser.parse_known_args(arguments)
    if known.command == "run":
        words = arguments[1:]
        return _run("hf-layerfuse run", words, known, rest, ["hf-layerfuse", "run", *words])
    try:
        if rest and known.command != "plan":  # whose recipe says what is wrong with them
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        _show(known, rest)
    except LayerFuseError as error:
        print(f"hf-layerfuse: {error}", file=sys.stderr)
        return 1
    return 0


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a recipe, as `fuse.py` does. Returns 0, 130 after Ctrl-C, or 1 after an error that the user can fix.

    Those errors are every `LayerFuseError`, and every `OSError`, such as a full disk. The message goes to standard
    error, from the process that met the error.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(
        prog="fuse.py", usage=f"accelerate launch fuse.py {_RUN_USAGE}", description=_RUN_DESCRIPTION, **_RUN_OPTIONS
    )
    _add_recipe(parser)
    known, rest = parser.parse_known_args(arguments)
    module = Path(sys.argv[0]).parts[-2:] == ("hf_layerfuse", "__main__.py")
    program = ["-m", "hf_layerfuse"] if module else ["fuse.py"]
    return _run("fuse.py", arguments, known, rest, ["accelerate", "launch", *program, *arguments])


def _run(prog: str, words: Sequence[str], known: argparse.Namespace, rest: Sequence[str], command: list[str]) -> int:
    """Run a recipe from parsed words; `words` are all of them, and `rest` those that the parser does not know."""
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
        _complain(prog, f"{error}. When that is mended, the same command goes on from where it was.")
        return 1
    except KeyboardInterrupt:
        from .training.distributed import process_state

        if process_state().is_main_process:
            print(f"{prog}: interrupted; the same command goes on from the last checkpoint.", file=sys.stderr)
        return 130
    return 0


def _show(known: argparse.Namespace, rest: Sequence[str]) -> None:
    """Do what `inspect`, `plan` or `report` asks for, and print the result."""
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
"""Options whose value is text as it stands; that of others is YAML."""

_RUN_USAGE = (
    "RECIPE [--model M] [--output_dir DIR] [--overwrite] [--with_code] "
    "[--push_to_hub NAME [--private] [--revision BRANCH]] [--section.field VALUE]"
)
_RUN_DESCRIPTION = (
    "Make a pretrained model smaller by a recipe (fuse its layers, make MLPs linear, or merge convolutions), heal it, "
    "evaluate it and save it."
)
_RUN_OPTIONS: dict[str, Any] = {
    "allow_abbrev": False,
    "argument_default": argparse.SUPPRESS,
    "epilog": "What is given here takes the place of what the file has: --fusion.keep_layers 8, --heal.steps 0, "
    "--data.name null. In brackets is what holds where neither says anything.",
}


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    """Declare the words of a run: the recipe, and an option for each of its fields."""
    recipe = parser.add_argument("recipe", help="YAML file, such as recipes/gpt2-wikitext2.yaml")
    recipe.complete = shtab.FILE
    parser.add_argument("--model", help="Hub name or path, in place of the recipe's")
    parser.add_argument("--output_dir", help="where to write, in place of the recipe's")
    parser.add_argument("--overwrite", action="store_true", help="replace output_dir if it is not empty")
    parser.add_argument("--with_code", action="store_true", help="let the result be loaded without this library")
    parser.add_argument("--push_to_hub", dest="hub.push_to_hub", metavar="NAME", help="publish it as user/name")
    parser.add_argument("--private", dest="hub.private", action="store_true", help="where not everybody can see it")
    parser.add_argument("--revision", dest="hub.revision", metavar="BRANCH", help="publish it on a branch")
    add_fields(parser, "the run", Recipe, skip=("model", "output_dir", "overwrite", "with_code"))
    for section, fields_of_section in SECTIONS.items():
        add_fields(parser, f"section {section}", fields_of_section, f"{section}.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-layerfuse", description="Make models smaller by recipes, and look at models and runs."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run_parser = commands.add_parser(
        "run",
        usage=f"hf-layerfuse run {_RUN_USAGE}",
        help="make a model smaller by a recipe, in one process",
        description=f"{_RUN_DESCRIPTION} For several processes: accelerate launch -m hf_layerfuse RECIPE ...",
        **_RUN_OPTIONS,
    )
    _add_recipe(run_parser)
    inspect = commands.add_parser(
        "inspect",
        help="the layers of a model, their sizes and how alike they are",
        description="Show what a model is made of, how alike its layers are, and what can be done with it.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    model = inspect.add_argument("model", help="checkpoint or Hub name; or a config: config.json, or its directory")
    inspect.add_argument(
        "--similarity",
        choices=get_args(get_type_hints(FusionRecipe)["similarity"]),
        help="distance of each layer to the next; default: cosine, of weights. 0 is equal, and independent random "
        "weights are about 1 apart. cka, cka_unbiased, angular, block_influence compare what layers compute, and need "
        "--text",
    )
    text = inspect.add_argument("--text", type=Path, metavar="FILE", help="lines of text to compare activations on")
    model.complete = text.complete = shtab.FILE
    plan = commands.add_parser(
        "plan",
        usage="hf-layerfuse plan MODEL [--text FILE] --keep_layers N [--field VALUE ...]",
        help="which layers a fusion would make one, and how large the result would be",
        description="Show what a fusion would do, and do nothing. What is chosen by measuring (a latency budget, "
        "collapse, merge) is planned by fuse.py alone.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    model = plan.add_argument("model", help="as for inspect; of a config alone, runs of even length become one")
    text = plan.add_argument("--text", type=Path, metavar="FILE", help="lines of text, for a similarity of activations")
    model.complete = text.complete = shtab.FILE
    report = commands.add_parser(
        "report",
        help="a page about what fuse.py has done",
        description="Write one HTML file with the figures, pictures, plan and recipe of a run, which needs nothing "
        "beside it.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    report.add_argument("output_dir", help="what fuse.py wrote").complete = shtab.DIRECTORY
    report.add_argument("--output", metavar="FILE", help="where to; default: report.html in output_dir")
    add_fields(plan, "what it is to be (fields of FusionRecipe)", FusionRecipe)
    shtab.add_argument_to(parser, "--print-completion", help="print what completes this command in a shell")
    return parser


def _complain(prog: str, what: str) -> None:
    from .training.distributed import process_state

    state = process_state()
    which = "" if state.is_main_process else f" (process {state.process_index})"
    print(f"{prog}{which}: {what}", file=sys.stderr)


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
