"""Report page of a run: one self-contained HTML file."""

from __future__ import annotations

import base64
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, StrictUndefined
from PIL import Image

from ...errors import CheckpointError
from ...evaluation.whole_file import write_whole
from ...methods import method_of
from ...plan import Plan
from ...plan.words import change_table
from ...recipe import Recipe, recipe_of
from ...training.heal import HealReport
from ..output import MARK
from ..results import DAMAGED, RunResults, invalid_result
from . import tables as report
from .candidates import decided, sections
from .change import interval_notes
from .outputs import sample_section
from .plots import draw
from .tables import found_nothing
from .verdict import verdict

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
    pictures = _pictures(plan, results.heal)
    return template.from_string(_TEMPLATE).render(
        title=f"{report.name_of(recipe)}, {method_of(recipe).done}",
        summary=f"Made from {recipe.model}: {report.in_short(results)}.",
        verdict=verdict(plan, results),
        measured_on=f"Measured on {dataset} ({split}){_how_many(results)}.",
        figures=_with_looks(_with_shares(report.rows(results))),
        notes=interval_notes(results),
        samples=sample_section(results.samples),
        changes=[_Row(cells) for cells in change_table(plan)],
        pictures=[pictures[name] for name in ("plan.png",)],
        tried=[
            section._replace(rows=[_Row(cells, "taken" * taken) for cells, taken in section.rows])
            for section in sections(decided(plan))
        ],
        tried_words=_of_which_data(plan),
        tried_pictures=[pictures[name] for name in ("candidates.png", "distances.png") if name in pictures],
        trained=_trained(results),
        trained_pictures=[pictures[name] for name in ("training.png", "homotopy.png") if name in pictures],
        limitations=report.limitations_of(plan, results),
        command=results.command,
        environment=f"Seed {recipe.seed}; {environment}.",
        recipe=report.recipe_text(recipe),
    )


class _Row(NamedTuple):
    """Row of a table of the page.

    Attributes:
        cells: Text of each cell; the first one is the header of the row.
        look: Class of the row in the page's style; empty for a plain one.
    """

    cells: list[str]
    look: str = ""


def _with_looks(table: list[list[str]]) -> list[_Row]:
    """Rows with indented labels, which belong to the row above them, as such."""
    return [_Row([row[0].strip(), *row[1:]], "sub" * row[0].startswith(" ")) for row in table]


def _of_which_data(plan: Plan) -> str:
    calibration = plan.notes.calibration
    on = f" on {calibration}" if calibration and calibration[0].isdigit() else ""
    words = f"The calibration loss compares the outputs of a candidate with those of the original{on}; lower is better."
    if rounds := plan.notes.rounds:
        words += f" They are those of the last of {len(rounds)} rounds, which numbers the layers that it began with."
    return words


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
    """One sentence about each training: of each round, and of the original."""
    said = [_training(each.report) for each in results.rounds]
    if results.retrained is not None:
        said.append(f"The original, retrained on the same data: {_training(results.retrained.report)}")
    return said


def _training(report: HealReport) -> str:
    after = f"{report.steps:,} steps in {report.seconds:,.0f} s, mixed precision: {report.mixed_precision}"
    kept = f"the weights of step {report.best_step:,} were kept"
    if found_nothing(report):
        kept = "healing found nothing better, so the initial weights were kept"
    return f"{after}; {kept}."


def _with_shares(table: list[list[str]]) -> list[list[str]]:
    """Sizes and times with their share of the first column, the original's."""
    header, *body = table
    return [header, *([label, first, *(_share(first, cell, label) for cell in rest)] for label, first, *rest in body)]


def _share(first: str, cell: str, label: str) -> str:
    if not label.strip().startswith(("parameters", "outside", "bytes", "latency")):
        return cell
    before, after = (float(text.replace(",", "")) for text in (first, cell))
    return f"{cell} ({after / before:.0%})" if before else cell


def _pictures(plan: Plan, healed: HealReport | None) -> dict[str, dict[str, Any]]:
    """Pictures of a run by the name of their file."""
    found = {}
    with tempfile.TemporaryDirectory(prefix="layerfuse-") as folder:
        for name, shows in draw(plan, healed, Path(folder)).items():
            path = Path(folder, name)
            with Image.open(path) as image:
                width, height = image.size
            data = base64.b64encode(path.read_bytes()).decode()
            found[name] = {"data": data, "shows": shows, "width": width, "height": height}
    return found
