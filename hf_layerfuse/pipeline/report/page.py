"""Report page of a run: one self-contained HTML file."""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from PIL import Image

from ...errors import CheckpointError
from ...evaluation.whole_file import write_whole
from ...methods import method_of
from ...models.families import CONV_GRAPH, LAYERS, family_of
from ...plan import Edit, Linearize, Plan
from ...plan.words import change_table, changes
from ...recipe import Recipe, recipe_of
from ...training.heal import HealReport
from ..output import MARK
from ..results import DAMAGED, RunResults, invalid_result
from . import tables as report
from .plots import draw

_TEMPLATE = (files(__package__) / "page.html").read_text(encoding="utf-8")

_HEAD = _TEMPLATE.partition("<title>")[0]
"""Beginning of a page, which identifies earlier pages. Other files may quote a page, but not at their beginning."""


def write_page(folder: str | Path, output: str | Path | None = None) -> Path:
    """Write the page of a run.

    Args:
        folder: Output directory of a run; only its plan and its results are read.
        output: HTML file to write, by default `report.html` in the folder. An earlier page there is replaced; any other
            file is not.

    Returns:
        The path of the page.

    Raises:
        CheckpointError: The results are missing, damaged, or of a newer format; or the file cannot be written.
        RecipeError: The results have a recipe that this version does not know.
    """
    target = Path(output) if output is not None else Path(folder) / "report.html"
    try:
        if target.exists() and not _is_page(target):
            raise CheckpointError(f"{str(target)!r} exists and is not a report: name another file with --output.")
        plan, results, recipe = _read(Path(folder))
        try:
            text = page(plan, results, recipe)
        except DAMAGED as error:  # some damage shows only in rendering
            raise invalid_result(folder, error) from error
        write_whole(target, text)
    except OSError as error:
        raise CheckpointError(f"{str(target)!r} cannot be written: {error}. Use another --output.") from error
    return target


def _is_page(path: Path) -> bool:
    if not path.is_file():  # a folder, or a device, which may have no end
        return False
    with path.open("rb") as file:
        return file.read(len(_HEAD.encode())) == _HEAD.encode()


def page(plan: Plan, results: RunResults, recipe: Recipe) -> str:
    """The page of a run as HTML. Everything that comes from the run is escaped.

    Args:
        plan: Plan that was carried out.
        results: Results of the run.
        recipe: Recipe of the run.
    """
    dataset, split = report.measured_on(recipe, results)
    environment = ", ".join(f"{key} {value}" for key, value in results.environment.items())
    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return template.from_string(_TEMPLATE).render(
        title=f"{report.name_of(recipe)}, {method_of(recipe).done}",
        summary=f"Made from {recipe.model}: {report.in_short(results)}.",
        measured_on=f"Measured on {dataset} ({split}){_how_many(results)}.",
        figures=_with_shares(report.rows(results)),
        changes=change_table(plan),
        pictures=_pictures(plan, results.heal),
        reasons=_reasons(plan),
        trained=_trained(results),
        limitations=report.limitations_of(plan, results),
        command=results.command,
        environment=f"Seed {recipe.seed}; {environment}.",
        recipe=report.recipe_text(recipe),
    )


def _read(folder: Path) -> tuple[Plan, RunResults, Recipe]:
    try:
        plan = Plan.load(folder / "plan.json")
    except (OSError, ValueError) as error:
        raise invalid_result(folder, error) from error
    results = RunResults.load(folder)
    tree = {name: value for name, value in results.recipe.items() if value is not None}
    return plan, results, recipe_of(tree, folder / MARK)


def _how_many(results: RunResults) -> str:
    metrics = results.before.metrics
    counts = [f"{metrics[name]:,} {name}" for name in ("examples", "tokens") if name in metrics]
    return "".join(f", {count}" for count in counts)


def _trained(results: RunResults) -> list[str]:
    """One sentence about the training of each round."""
    said = []
    for healed in (each.report for each in results.rounds):
        after = f"{healed.steps:,} steps in {healed.seconds:,.0f} s, mixed precision: {healed.mixed_precision}"
        kept = f"the weights of step {healed.best_step:,} were kept"
        if healed.validation_loss and healed.best_step == 0:
            kept = "the validation loss did not improve, so the initial weights were kept"
        said.append(f"{after}; {kept}.")
    return said


def _with_shares(table: list[list[str]]) -> list[list[str]]:
    """Sizes and times with their share of the first column, the original's."""
    header, *body = table
    return [header, *([label, first, *(_share(first, cell, label) for cell in rest)] for label, first, *rest in body)]


def _share(first: str, cell: str, label: str) -> str:
    if not label.strip().startswith(("parameters", "outside", "bytes", "latency")):
        return cell
    before, after = (float(text.replace(",", "")) for text in (first, cell))
    return f"{cell} ({after / before:.0%})" if before else cell


def _pictures(plan: Plan, healed: HealReport | None) -> list[dict[str, Any]]:
    found = []
    with tempfile.TemporaryDirectory(prefix="layerfuse-") as folder:
        for name, shows in draw(plan, healed, Path(folder)).items():
            path = Path(folder, name)
            with Image.open(path) as image:
                width, height = image.size
            data = base64.b64encode(path.read_bytes()).decode()
            found.append({"data": data, "shows": shows, "width": width, "height": height})
    return found


def _reasons(plan: Plan) -> list[dict[str, Any]]:
    """Reasons for the choice of a plan, from its notes: words, and rows of text."""
    notes, found = plan.notes, []

    def add(words: str, *rows: list[str]) -> None:
        found.append({"words": words, "rows": rows})

    if notes.competition:
        ranked = sorted(notes.competition, key=lambda candidate: candidate.loss)
        rivals = [[_words_of(plan, candidate.edits), f"{candidate.loss:.4g}"] for candidate in ranked]
        add("Candidates that competed on calibration data, best first.", ["plan", "calibration loss"], *rivals)
    if notes.losses:
        head, names = _SINGLE_OF[family_of(plan)](plan)
        single = [[name, f"{row.loss:.4g}"] for name, row in zip(names, notes.losses, strict=True)]
        add("Calibration loss when only this edit is applied.", [head, "calibration loss"], *single)
    if notes.frontier:
        points = [[f"{point.share:.0%}", f"{point.loss:.4g}"] for point in notes.frontier]
        add("Sum of the losses at other latency budgets.", ["of the original's time", "calibration loss"], *points)
    if refit := notes.refit:
        values = ["calibration loss", *(f"{loss:.4g}" for loss in (refit.before, refit.after))]
        kept = "It was kept." if refit.kept else "It did not lower the loss, so it was undone."
        add(f"Closed-form repair on calibration data. {kept}", ["", "before", "after"], values)
    return found


def _words_of(plan: Plan, edits: Sequence[Edit]) -> str:
    """A candidate in words: its edits, or the layers whose MLPs become linear."""
    if _by_layer(plan, edits):
        return f"linear MLPs of layers {', '.join(str(edit.layer) for edit in edits)}"
    return "; ".join(f"{blocks} {become}" for blocks, become in changes(replace(plan, edits=edits)))


def _by_layer(plan: Plan, edits: Sequence[Edit]) -> bool:
    """Whether layers alone name the edits: without a latency budget, linear MLPs compete with nothing else."""
    return plan.notes.latency_ms is None and {type(edit) for edit in edits} == {Linearize}


def _single_edits(plan: Plan) -> tuple[str, list[str]]:
    edits = [row.edit for row in plan.notes.losses]
    if _by_layer(plan, edits):
        return "layer", [str(edit.layer) for edit in edits]
    return "choice", [_words_of(plan, [edit]) for edit in edits]


def _single_segments(plan: Plan) -> tuple[str, list[str]]:
    names = [f"{row.start},{row.end},{row.kernel},{int(row.depthwise)}" for row in plan.notes.losses]
    return "segment: begin, end, kernel, depthwise", names


_SINGLE_OF = {LAYERS: _single_edits, CONV_GRAPH: _single_segments}
"""Function of a plan that returns a header and the names of the candidates in `losses` of its notes, by its family."""
