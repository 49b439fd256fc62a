"""Notes of a plan: the recipe and the measurements behind its edits, in memory and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from ..errors import PlanError
from .edit import Align, Edit, Kind, Linearize
from .edit_json import read_edit, write_edit
from .layout import Operator

if TYPE_CHECKING:
    from .plan import Plan

FORMAT_VERSION = 1
"""Format of the notes that this release writes. Notes of release 0.1.0 have no `format_version`."""


def _json(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_json(each) for each in value]
    if isinstance(value, Edit):
        return write_edit(value)
    return value.to_dict() if hasattr(value, "to_dict") else value


class _Record:
    def to_dict(self) -> dict[str, Any]:
        """The record as JSON types. Fields at None are omitted."""
        values = {each.name: _json(getattr(self, each.name)) for each in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Any:
        """Read a record from JSON types."""
        return cls(**tree)


@dataclass(frozen=True)
class EditLoss(_Record):
    """Calibration loss of a model with one edit.

    Attributes:
        edit: The only edit of the model.
        loss: Calibration loss after the refit of the edit.
    """

    edit: Edit
    loss: float

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> EditLoss:
        return cls(**{**tree, "edit": read_edit(tree["edit"])})


@dataclass(frozen=True)
class SegmentLoss(_Record):
    """Calibration loss of a network with one merged segment.

    Attributes:
        start: Boundary before the segment.
        end: Boundary after the segment.
        kernel: Size of the merged kernel.
        depthwise: Whether the merged convolution is depthwise.
        loss: Calibration loss after the refit of the segment.
    """

    start: int
    end: int
    kernel: int
    depthwise: bool
    loss: float


@dataclass(frozen=True)
class OperatorLoss(_Record):
    """Calibration loss of a model with one fused group.

    Attributes:
        kind: Kind of the blocks.
        layers: Layers of the group.
        operator: Operator that combines the weights.
        loss: Calibration loss after the refit of the group.
        keep: Kept layer, for the operators `freeze` and `select`.
        align: Symmetry that is removed first.
    """

    kind: Kind
    layers: tuple[int, ...]
    operator: Operator
    loss: float
    keep: int | None = None
    align: Align = "none"

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))


@dataclass(frozen=True)
class CandidatePlan(_Record):
    """Candidate that was applied and refitted as a whole.

    Attributes:
        edits: Edits of the candidate.
        loss: Calibration loss after the refit.
        loss_before_refit: Calibration loss before the refit; None if it was not recorded.
        expected_loss: Calibration loss that the losses of single edits predict; None without a prediction.
        latency_ms: Measured latency; None where the target is not a latency.
    """

    edits: tuple[Edit, ...]
    loss: float
    loss_before_refit: float | None = None
    expected_loss: float | None = None
    latency_ms: float | None = None

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> CandidatePlan:
        return cls(**{**tree, "edits": tuple(map(read_edit, tree["edits"]))})


@dataclass(frozen=True)
class FrontierPoint(_Record):
    """Best choice for one latency budget.

    Attributes:
        share: Share of the original's latency, rounded to 1%.
        loss: Sum of the losses of the chosen segments.
    """

    share: float
    loss: float


@dataclass(frozen=True)
class PlanLatency(_Record):
    """Latencies that a plan was chosen by, in milliseconds.

    Attributes:
        original: Latency of the original.
        predicted: Latency of the result, predicted from its parts.
        measured: Measured latency of the result, before healing; None if it was not measured.
        rest: Latency outside the parts that a plan changes; None if it is unknown.
        inputs: Shapes of the model inputs by name; None if they were not recorded.
    """

    original: float
    predicted: float
    measured: float | None = None
    rest: float | None = None
    inputs: Mapping[str, Sequence[int]] | None = None


@dataclass(frozen=True)
class RefitReport(_Record):
    """Result of a refit.

    Attributes:
        before: Calibration loss of the given model, on the held-out split, which the repair did not use.
        after: Calibration loss of the model now, never more than `before`.
        kept: Whether the repair was kept. A repair that raised the loss, or that was not tried, is not kept.
        blocks: One row per repaired map: its layer, kind and role, and its mean squared error on the selection split
            before and after. For the `heads` of a selected layer, the errors are the mean squared distances of the
            stream after the group's MLPs from the end of the group, with the heads of the kept layer and with the
            heads in use. For a linearised MLP, the errors are relative to the variance of the stream at each token, and
            `r2` is the explained share of the variance of its targets, on the selection split. A row of a merged
            convolution has its `segment` instead of layer, kind and role.
    """

    before: float
    after: float
    kept: bool
    blocks: Sequence[Mapping[str, Any]] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", tuple(self.blocks))


@dataclass(frozen=True)
class LinearActivation(_Record):
    """Activation that became linear by training.

    Attributes:
        layer: Layer of the original.
        a: Share of the line in the activation, which was rounded up to 1.
        relative_error: Root mean square of the difference that the step from a to 1 makes, relative to the output of
            the MLP; None if it was not measured.
    """

    layer: int
    a: float
    relative_error: float | None = None


@dataclass(frozen=True, kw_only=True)
class PlanNotes:
    """Recipe and measurements behind the edits of a plan. Every method fills the fields that it has.

    Attributes:
        recipe: Recipe of the method, as JSON types.
        calibration: Amount of calibration data in words.
        distances: Distances between the blocks of each kind; None between blocks that can never become one.
        operators: Losses of the fused groups and operators that competed.
        losses: Losses of single candidates.
        competition: Candidates that were applied and refitted as a whole.
        frontier: Best choice for each latency budget.
        latency_ms: Latencies that the plan was chosen by.
        refit: Report of the refit.
        homotopy: Activations that became linear by training.
        rounds: Plans of the rounds, where several were composed.
        extra: Notes of users and of methods outside this package, as JSON types.
    """

    recipe: Mapping[str, Any] | None = None
    calibration: str | None = None
    distances: Mapping[Kind, Sequence[Sequence[float | None]]] = field(default_factory=dict)
    operators: tuple[OperatorLoss, ...] = ()
    losses: tuple[EditLoss | SegmentLoss, ...] = ()
    competition: tuple[CandidatePlan, ...] = ()
    frontier: tuple[FrontierPoint, ...] = ()
    latency_ms: PlanLatency | None = None
    refit: RefitReport | None = None
    homotopy: tuple[LinearActivation, ...] = ()
    rounds: tuple[Plan, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The notes as JSON types. Empty fields are omitted."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {"format_version": FORMAT_VERSION, **{name: _json(value) for name, value in values.items() if value}}

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> PlanNotes:
        """Read notes from JSON types. Unknown keys are kept in `extra`.

        Args:
            tree: JSON types, as `to_dict` or release 0.1.0 wrote them.

        Raises:
            PlanError: The format is newer than this release, or the notes cannot be read.
        """
        from .plan import Plan  # imports this module

        try:
            version = tree.get("format_version")
            if isinstance(version, int) and version > FORMAT_VERSION:
                raise PlanError(
                    f"the notes of the plan have format version {version}; this release of hf_layerfuse reads "
                    f"versions up to {FORMAT_VERSION}: upgrade with `pip install -U hf-layerfuse`."
                )
            if version not in (None, FORMAT_VERSION):
                raise ValueError(f"format_version={version!r} is not a known version")
            values = _from_0_1(tree) if version is None else dict(tree)
            values.pop("format_version", None)
            known = {each.name for each in fields(cls)}
            extra = {**values.pop("extra", {}), **{name: values.pop(name) for name in values.keys() - known}}
            records = {
                "operators": OperatorLoss.from_dict,
                "losses": lambda row: (EditLoss if "edit" in row else SegmentLoss).from_dict(row),
                "competition": CandidatePlan.from_dict,
                "frontier": FrontierPoint.from_dict,
                "homotopy": LinearActivation.from_dict,
                "rounds": Plan.from_dict,
            }
            values |= {name: tuple(map(read, values[name])) for name, read in records.items() if name in values}
            single = {"latency_ms": PlanLatency, "refit": RefitReport}
            values |= {name: record.from_dict(values[name]) for name, record in single.items() if name in values}
            return cls(**values, extra=extra)
        except PlanError:
            raise
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            what = f"{error!s} is missing" if isinstance(error, KeyError) else str(error)
            raise PlanError(
                f"the notes of the plan cannot be read: {what}. Correct them, or remove `notes` from the plan."
            ) from error


def _from_0_1(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Convert notes of release 0.1.0 to the current format.

    That release named candidates in several ways: by edits, by layers of MLPs that became linear ("3"), by numbers of a
    segment ("2,4,3,0"), and by operators ("select 0", "mean, rotation").
    """
    known = {each.name for each in fields(PlanNotes)} - {"extra"}
    values = {name: value for name, value in tree.items() if name in known}
    recipe = values.get("recipe", {})
    renamed = {"expected": "expected_loss", "ms": "latency_ms", "lost": "relative_error"}

    def rename(row: Mapping[str, Any]) -> dict[str, Any]:
        return {renamed.get(name, name): value for name, value in row.items()}

    def linear(layer: int) -> dict[str, Any]:
        return write_edit(Linearize(layer, recipe.get("rank"), recipe.get("fold", False)))

    def candidate(row: dict[str, Any]) -> dict[str, Any]:
        return {"edits": list(map(linear, row.pop("layers"))), **row} if "layers" in row else row

    def single(name: str, loss: float) -> dict[str, Any]:
        if "," not in name:
            return {"edit": linear(int(name)), "loss": loss}
        start, end, kernel, depthwise = map(int, name.split(","))
        return {"start": start, "end": end, "kernel": kernel, "depthwise": bool(depthwise), "loss": loss}

    def operator(name: str) -> dict[str, Any]:
        operator_and_layer, _, align = name.partition(", ")
        how, _, keep = operator_and_layer.partition(" ")
        return {"operator": how, "keep": int(keep) if keep else None, "align": align or "none"}

    if "operators" in values:
        values["operators"] = [
            {"kind": group["kind"], "layers": group["layers"], **operator(name), "loss": loss}
            for group in values["operators"]
            for name, loss in group["losses"].items()
        ]
    if isinstance(losses := values.get("losses"), Mapping):
        values["losses"] = [single(name, loss) for name, loss in losses.items()]
    if "competition" in values:
        values["competition"] = [candidate(rename(row)) for row in values["competition"]]
    if "frontier" in values:
        values["frontier"] = [
            {"share": int(share.rstrip("%")) / 100, "loss": loss} for share, loss in values["frontier"].items()
        ]
    if "homotopy" in values:
        values["homotopy"] = list(map(rename, values["homotopy"]))
    return {**values, "extra": {name: value for name, value in tree.items() if name not in known}}
