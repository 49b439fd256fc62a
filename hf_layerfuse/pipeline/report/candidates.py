"""Candidates of a search with their calibration losses: those that were taken, and those that lost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from ...models.families import CONV_GRAPH, LAYERS, family_of
from ...plan import Edit, Linearize, OperatorLoss, Plan
from ...plan.words import blocks, name_of, operator_of


class Candidate(NamedTuple):
    """Candidate of a search.

    Attributes:
        name: Candidate in words.
        loss: Calibration loss after the refit.
        taken: Whether the plan has this candidate.
        before: Calibration loss before the refit; None if it was not recorded.
        expected: Calibration loss that single edits predict; None without a prediction.
        latency_ms: Measured latency; None where the target is not a latency.
    """

    name: str
    loss: float
    taken: bool
    before: float | None = None
    expected: float | None = None
    latency_ms: float | None = None


class Group(NamedTuple):
    """Blocks that can become one, with the operators that competed, the taken one first and the others by their loss.

    Attributes:
        blocks: Blocks in words.
        candidates: Operators with their losses.
    """

    blocks: str
    candidates: list[Candidate]


def decided(plan: Plan) -> Plan:
    """The plan whose notes these are: the plan itself, or that of the last of several rounds."""
    return plan.notes.rounds[-1] if plan.notes.rounds else plan


def plans(plan: Plan) -> list[Candidate]:
    """Plans that were applied and refitted as a whole, by their loss."""
    found = [
        Candidate(
            words_of(plan, each.edits),
            each.loss,
            set(each.edits) == set(plan.edits),
            each.loss_before_refit,
            each.expected_loss,
            each.latency_ms,
        )
        for each in plan.notes.competition
    ]
    return sorted(found, key=lambda candidate: candidate.loss)


def groups(plan: Plan) -> tuple[list[Group], list[Group]]:
    """Groups of blocks whose operators competed: those in the plan, and those that the plan does not have."""
    by_blocks: dict[tuple, list[OperatorLoss]] = {}
    for row in plan.notes.operators:
        by_blocks.setdefault((row.kind, row.layers), []).append(row)
    in_plan = {(edit.kind, edit.layers): edit for edit in plan.edits}
    found: tuple[list[Group], list[Group]] = ([], [])
    for key, rows in by_blocks.items():
        edit = in_plan.get(key)
        candidates = [Candidate(operator_of(row), row.loss, edit is not None and _is_of(row, edit)) for row in rows]
        candidates.sort(key=lambda candidate: (not candidate.taken, candidate.loss))
        found[edit is None].append(Group(blocks(*key), candidates))
    found[1].sort(key=lambda group: group.candidates[0].loss)
    return found


def single_edits(plan: Plan) -> list[Candidate]:
    """Edits that were measured alone, the taken ones first and the others by their loss."""
    found = _SINGLE_OF[family_of(plan)](plan) if plan.notes.losses else []
    taken = [candidate for candidate in found if candidate.taken]
    return [*taken, *sorted((c for c in found if not c.taken), key=lambda candidate: candidate.loss)]


def words_of(plan: Plan, edits: Sequence[Edit]) -> str:
    """A candidate in words: its edits, or the layers whose MLPs become linear."""
    if _by_layer(plan, edits):
        return f"linear MLPs of layers {', '.join(str(edit.layer) for edit in edits)}"
    return "; ".join(map(name_of, edits))


class Panel(NamedTuple):
    """Panel of a picture of calibration losses.

    Attributes:
        title: Subject of the panel.
        rows: Candidates that share a row, by its label.
    """

    title: str
    rows: list[Group]


_ROWS = 16
"""Rows of a panel: the best candidates, and the taken ones."""


def loss_panels(plan: Plan) -> list[Panel]:
    """Candidates to draw, where there is more than one: plans, operators of each group, and single edits."""
    found, single = plans(plan), single_edits(plan)
    best = [(rank, each) for rank, each in enumerate(found, 1) if rank <= _ROWS or each.taken]
    shown = [each for place, each in enumerate(single) if place < _ROWS or each.taken]
    inside, outside = groups(plan)
    panels = [
        Panel("whole plans (rings: before the repair)", [Group(f"plan {rank}", [each]) for rank, each in best]),
        Panel("groups of the plan, fused alone by each operator", inside),
        Panel("groups that are not in the plan", outside[:_ROWS]),
        Panel("single edits", [Group(each.name, [each]) for each in shown]),
    ]
    panels = [panel._replace(rows=list(filter(None, map(_drawable, panel.rows)))) for panel in panels]
    return [panel for panel in panels if sum(len(row.candidates) for row in panel.rows) > 1]


def _drawable(group: Group) -> Group | None:
    """A group with its finite losses; None without any."""
    candidates = [
        each if each.before is None or math.isfinite(each.before) else each._replace(before=None)
        for each in group.candidates
        if math.isfinite(each.loss)
    ]
    return group._replace(candidates=candidates) if candidates else None


class Section(NamedTuple):
    """Part of the page about candidates.

    Attributes:
        title: Heading.
        words: Sentences under the heading.
        rows: Cells of each row, header first, and whether the row was taken; empty without a table.
        folded: Summary of a table that is shown on demand; empty for one that is shown at once.
        names: Number of columns of text, before those of numbers.
    """

    title: str
    words: str
    rows: list[tuple[list[str], bool]]
    folded: str = ""
    names: int = 1


def sections(plan: Plan) -> list[Section]:
    """All candidates of a plan with their losses, as sections of the page."""
    found = [*_plan_section(plan), *_group_sections(plan), *_single_section(plan)]
    if points := plan.notes.frontier:
        rows = [([f"{point.share:.0%}", f"{point.loss:.4g}"], False) for point in points]
        words = "Sum of the losses of the best choice for each latency budget."
        found.append(Section("Other latency budgets", words, [(["of the original's time", _LOSS], False), *rows]))
    if refit := plan.notes.refit:
        kept = "It was kept." if refit.kept else "It did not lower the loss, so it was undone."
        words = f"The closed-form repair took the calibration loss from {refit.before:.4g} to {refit.after:.4g}. {kept}"
        found.insert(0, Section("Repair", words, []))
    return found


_LOSS = "calibration loss"

_AT_ONCE = 12
"""Rows of a table that are shown without unfolding."""


def _plan_section(plan: Plan) -> list[Section]:
    found = plans(plan)
    if len(found) < 2:  # the repair says all about it
        return []
    header, columns = ["plan, best first", _LOSS], []
    for name, column in (
        ("before the repair", "before"),
        ("expected", "expected"),
        ("latency (ms)", "latency_ms"),
    ):
        if any(getattr(candidate, column) is not None for candidate in found):
            header.append(name)
            columns.append(column)
    rows = [
        ([f"{rank}. {each.name}", *_cells(each, "loss", *columns)], each.taken) for rank, each in enumerate(found, 1)
    ]
    words = f"{len(found)} plans were applied and repaired as a whole. The marked row is the plan of this result."
    folded = "" if len(found) <= _AT_ONCE else f"All {len(found)} plans"
    return [Section("Plans", words, [(header, False), *rows], folded)]


def _group_sections(plan: Plan) -> list[Section]:
    inside, outside = groups(plan)
    found = []
    for title, part, words, most in (
        (
            "Operators, for each group of the plan",
            inside,
            "The calibration loss when this group alone is fused and repaired, on part of the data. Marked rows were "
            "taken: the operator of least loss, unless another plan was better as a whole.",
            3 * _AT_ONCE,
        ),
        (
            "Groups that are not in the plan",
            outside,
            "Measured in the same way, to choose the groups of the plan.",
            _AT_ONCE,
        ),
    ):
        rows = [
            ([group.blocks if first else "", each.name, *_cells(each, "loss")], each.taken)
            for group in part
            for first, each in zip([True, *[False] * len(group.candidates)], group.candidates, strict=False)
        ]
        if rows:
            folded = "" if len(rows) <= most else f"All {len(part)} groups"
            found.append(Section(title, words, [(["group", "operator", _LOSS], False), *rows], folded, names=2))
    return found


def _single_section(plan: Plan) -> list[Section]:
    found = single_edits(plan)
    if not found:
        return []
    rows = [([each.name, *_cells(each, "loss")], each.taken) for each in found]
    words = "The calibration loss when this edit alone is applied. Marked rows are in the plan."
    folded = "" if len(rows) <= _AT_ONCE else f"All {len(rows)} edits"
    return [Section("Single edits", words, [(["edit", _LOSS], False), *rows], folded)]


def _cells(candidate: Candidate, *columns: str) -> list[str]:
    values = (getattr(candidate, column) for column in columns)
    return ["" if value is None else f"{value:.4g}" for value in values]


def _is_of(row: OperatorLoss, edit: Edit) -> bool:
    return (row.operator, row.keep, row.align) == tuple(
        getattr(edit, name, None) for name in ("operator", "keep", "align")
    )


def _by_layer(plan: Plan, edits: Sequence[Edit]) -> bool:
    """Whether layers alone name the edits: without a latency budget, linear MLPs compete with nothing else."""
    return plan.notes.latency_ms is None and {type(edit) for edit in edits} == {Linearize}


def _single_blocks(plan: Plan) -> list[Candidate]:
    edits = [row.edit for row in plan.notes.losses]
    by_layer = _by_layer(plan, edits)
    names = [f"the MLP of layer {edit.layer}" if by_layer else words_of(plan, [edit]) for edit in edits]
    return [
        Candidate(name, row.loss, row.edit in plan.edits) for name, row in zip(names, plan.notes.losses, strict=True)
    ]


def _single_segments(plan: Plan) -> list[Candidate]:
    """Segments in words. Several kernels can have the same boundaries, so none of them is known to be the taken one."""
    found = []
    bounds = [(row.start, row.end) for row in plan.notes.losses]
    merged = {(edit.start, edit.end) for edit in plan.edits}
    for row in plan.notes.losses:
        depthwise = ", depthwise" if row.depthwise else ""
        name = f"{blocks('convolution', range(row.start + 1, row.end + 1))}, kernel {row.kernel}{depthwise}"
        taken = (row.start, row.end) in merged and bounds.count((row.start, row.end)) == 1
        found.append(Candidate(name, row.loss, taken))
    return found


_SINGLE_OF = {LAYERS: _single_blocks, CONV_GRAPH: _single_segments}
"""Function of a plan that returns the candidates in `losses` of its notes, by its family."""
