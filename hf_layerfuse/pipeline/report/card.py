"""The model card of a model with a report."""

from __future__ import annotations

from importlib.metadata import version

import torch
import transformers
from huggingface_hub import ModelCard
from transformers import PreTrainedModel

from ...errors import CheckpointError, DataError
from ...evaluation.comparison import Comparison, size_rows
from ...methods import METHODS
from ...methods.report import FusionReport
from ...models.modeling import auto_classes_of
from ...recipe.tasks import TASKS
from ...training.heal import HealReport
from .portable import PLACEHOLDER, base_name, placeholder
from .sections import changes, document, front_matter, introduction, licence_of, limits, losses, measured, use
from .tables import REMAINING, limitations_of_healing, limitations_of_plan, summary

_UNNAMED = f"{PLACEHOLDER}this-model"
"""Source of a model whose name is unknown."""


def model_card(
    model: PreTrainedModel,
    comparison: Comparison | None = None,
    *,
    base_model: str | None = None,
    name: str | None = None,
    test_data: str | None = None,
    heal_report: HealReport | None = None,
    with_code: bool = False,
) -> ModelCard:
    """Write the model card of a result of `fuse`, `collapse` or `merge`.

    The card shows the changes to the layers, sizes, calibration losses and limits, and the lines of code that load the
    model. With a comparison, it also shows the quality with its interval, and the latency. `card.save(path)` writes
    it, and `card.push_to_hub(repository)` publishes it.

    Args:
        model: Result with its `fusion_report`.
        comparison: Comparison of the original with this model, from `compare`. For a healed model, compare with an
            original after the same training, and say so in `test_data`.
        base_model: Hub name of the original. The card has its licence, which is read from its card.
        name: Hub name of the result, for the lines that load it.
        test_data: Name of the data of the comparison.
        heal_report: Report of `heal`, if the model was healed.
        with_code: Whether the model was saved with its code, for users without this library.

    Returns:
        The card. Its front matter has the tags that the Hub reads.

    Raises:
        CheckpointError: The model has no `fusion_report`.
        DataError: The comparison is of another model.

    Examples:
        >>> model_card(small, compare(model, small, batches)).save("small/README.md")  # doctest: +SKIP
    """
    report = _report_of(model)
    if comparison is not None and comparison.parameters[1] != model.num_parameters():
        raise DataError(
            f"comparison is of a model with {comparison.parameters[1]:,} parameters, and this one has "
            f"{model.num_parameters():,}: pass compare(original, model, batches) of this model."
        )
    plan, licence = report.plan, {} if base_model is None else licence_of(base_model)
    method = next(method for method in METHODS if method.name == report.method)
    original = None if base_model is None else base_name(base_model)
    known = auto_classes_of(model)
    task = next((task for task in TASKS.values() if task.auto_class in known), None)
    loader = task.auto_class if task else next(iter(known), "AutoFusedModel")
    if comparison is None:
        table, notes, quality, speedups = size_rows(report.parameters, report.bytes), [], None, {}
    else:
        table, quality, speedups = comparison.table(), (comparison.metric, *comparison.quality), comparison.speedup
        notes = [f"The change has a 95% interval, by a bootstrap over the same {comparison.rows} rows for both."]
    training = ["This card has no record of a retraining after its layers were changed."]
    if heal_report is not None:
        training = limitations_of_healing([heal_report], alone=comparison is not None)
    limitations = [*limitations_of_plan(plan, timed=bool(speedups)), *training, REMAINING]
    return document(
        front_matter(method, base_model, task and task.pipeline, licence),
        introduction(original, method, plan, summary((comparison or report).parameters, speedups, quality)),
        measured(test_data, table, *notes),
        changes(plan),
        losses(plan),
        use(plan, loader, _UNNAMED if name is None else placeholder(name), with_code=with_code),
        limits(limitations, original, licence),
        ["## How it was made", "", _made(report, comparison, heal_report)],
    )


def _report_of(model: PreTrainedModel) -> FusionReport:
    report = getattr(model, "fusion_report", None)
    if not isinstance(report, FusionReport):
        raise CheckpointError(
            f"this {type(model).__name__} has no fusion_report: fuse, collapse and merge set it, and save_pretrained "
            "does not write it. Pass the model that they returned; or write the report with "
            "small.fusion_report.save(directory), and load the model with AutoFusedModel.from_pretrained(directory)."
        )
    return report


def _made(report: FusionReport, comparison: Comparison | None, healed: HealReport | None) -> str:
    """Time and versions, in sentences."""
    said = f"Search and refit took {report.seconds:.1f} seconds"
    if healed is not None:
        said += f", and healing {healed.seconds:.1f} seconds for {healed.steps} steps"
    versions = [f"hf_layerfuse {version('hf-layerfuse')}", f"torch {torch.__version__}"]
    versions.append(f"transformers {transformers.__version__}")
    versions += [] if comparison is None else [f"device {comparison.device}"]
    return f"{said}; {', '.join(versions)}."
