"""The last lines of a run on the terminal: the result in one sentence, and the next commands."""

from __future__ import annotations

import shlex

from ...plan import Plan
from ...recipe import Recipe
from ...recipe.tasks import TASKS
from ..results import RunResults
from .tables import in_short


def closing(recipe: Recipe, plan: Plan, results: RunResults) -> str:
    """The result of a run in one sentence, its directory, and how to load it and write its report."""
    arguments, condition = [f'"{recipe.output_dir}"'], ""
    if not plan.layout().is_stock and recipe.with_code:
        arguments.append("trust_remote_code=True")
    elif not plan.layout().is_stock:
        condition = ", after import hf_layerfuse"
    return "\n".join(
        [
            f"In short: {in_short(results)}.",
            f"Written:  {recipe.output_dir}",
            f"Load it:  {TASKS[recipe.task].auto_class}.from_pretrained({', '.join(arguments)}){condition}",
            f"Report:   hf-layerfuse report {shlex.quote(recipe.output_dir)}",
        ]
    )
