"""The command line: `hf-layerfuse` and its subcommands. `fuse.py` runs `hf-layerfuse run` under its own name.

Modules that need torch are imported only after the arguments are parsed, so that `--help` is fast.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

from .cli_options import (
    OF_FUSION,
    OF_RECIPE,
    RECIPE_USAGE,
    TEXT,
    check_options,
    in_options,
    main_parser,
    parse_overrides,
    recipe_parser,
    underscored,
)
from .errors import LayerFuseError, RecipeError
from .recipe import FusionRecipe, Recipe, load_recipe

_SHORT = ("push_to_hub", "private", "revision")
"""Options of a run that are short for fields of the section `hub`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand of `hf-layerfuse`. Returns 0, 130 after Ctrl-C, or 1 after an error that the user can fix.

    Error messages go to standard error.
    """
    arguments = underscored(sys.argv[1:] if arguments is None else arguments)
    parser = main_parser()
    known, rest = parser.parse_known_args(arguments)
    words = arguments[1:]
    if known.command == "run":
        return _with_recipe("hf-layerfuse run", words, known, rest, ["hf-layerfuse", "run", *words], _run)
    if known.command == "plan" and known.model.endswith((".yaml", ".yml")):
        known, rest = recipe_parser("hf-layerfuse plan", f"hf-layerfuse plan {RECIPE_USAGE}").parse_known_args(words)
        return _with_recipe("hf-layerfuse plan", words, known, rest, ["hf-layerfuse", "plan", *words], _plan)
    try:
        if rest and known.command != "plan":
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        _show(known, rest)
    except LayerFuseError as error:
        print(f"hf-layerfuse: {in_options(error, OF_FUSION, FusionRecipe)}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"hf-layerfuse: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("hf-layerfuse: interrupted.", file=sys.stderr)
        return 130
    return 0


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a recipe, as `fuse.py` does. Returns 0, 130 after Ctrl-C, or 1 after an error that the user can fix.

    Every `LayerFuseError` and every `OSError`, such as a full disk, counts as such an error. The process that raised
    it prints the message to standard error.
    """
    arguments = underscored(sys.argv[1:] if arguments is None else arguments)
    known, rest = recipe_parser("fuse.py", f"accelerate launch fuse.py {RECIPE_USAGE}").parse_known_args(arguments)
    module = Path(sys.argv[0]).parts[-2:] == ("hf_layerfuse", "__main__.py")
    program = ["-m", "hf_layerfuse"] if module else ["fuse.py"]
    return _with_recipe("fuse.py", arguments, known, rest, ["accelerate", "launch", *program, *arguments], _run)


def _with_recipe(
    prog: str,
    words: Sequence[str],
    known: argparse.Namespace,
    rest: Sequence[str],
    command: list[str],
    carry_out: Callable[[Recipe, str], None],
) -> int:
    """Do something with a recipe from parsed arguments: `words` holds all, `rest` those unknown to the parser."""
    method = None
    try:
        if words[0].startswith("-"):
            raise RecipeError(f"the recipe comes first, before {words[0]}: {prog} RECIPE.yaml {words[0]} ...")
        check_options(rest, OF_RECIPE, prog, _SHORT)
        given = {
            name: value for name, value in vars(known).items() if name not in ("command", "recipe", "print_completion")
        }
        plain = {name: value for name, value in given.items() if value is True or name in TEXT}
        overrides = plain | parse_overrides([*(f"--{name}={given[name]}" for name in given.keys() - plain), *rest])
        recipe = load_recipe(known.recipe, overrides)
        method = type(recipe.method)
        carry_out(recipe, shlex.join(command))
    except LayerFuseError as error:
        _complain(prog, in_options(error, OF_RECIPE, method))
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


def _run(recipe: Recipe, command: str) -> None:
    from .pipeline.run import run as run_recipe

    run_recipe(recipe, command=command)


def _plan(recipe: Recipe, command: str) -> None:
    from .pipeline.planning import plan_run

    print(plan_run(recipe))


def _show(known: argparse.Namespace, rest: Sequence[str]) -> None:
    """Run `inspect`, `adapt`, `plan` of a model, or `report`, and print the result."""
    if known.command == "report":
        from .pipeline.report.page import write_page

        print(f"Written: {write_page(known.output_dir, known.output)}")
        return
    if known.command == "adapt":
        from .pipeline.adapt import adapt

        print(adapt(known.model, known.batch, known.stack, known.trust_remote_code))
        return
    if known.command == "plan":
        check_options(rest, OF_FUSION, "hf-layerfuse plan", ("text", "trust_remote_code"))
        names = vars(known).keys() & {field.name for field in fields(FusionRecipe)}
        given = [f"--{name}={getattr(known, name)}" for name in names]
        recipe = FusionRecipe(**parse_overrides([*given, *rest]))
        from .pipeline.planning import plan_model

        print(plan_model(known.model, recipe, known.text, known.trust_remote_code))
        return
    from .pipeline.inspect import inspect_tables
    from .pipeline.report.tables import text_table

    tables = inspect_tables(known.model, known.similarity, known.text, known.stack, known.trust_remote_code)
    print("\n\n".join(map(text_table, tables)))


def _complain(prog: str, what: str) -> None:
    from .training.distributed import process_state

    state = process_state()
    which = "" if state.is_main_process else f" (process {state.process_index})"
    print(f"{prog}{which}: {what}", file=sys.stderr)
