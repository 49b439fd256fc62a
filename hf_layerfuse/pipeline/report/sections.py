"""Sections that all model cards share, as lines of Markdown."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from ...methods.base import Method
from ...models.families import family_of
from ...plan import Plan
from ...plan.words import change_table, describe
from .portable import PLACEHOLDER, is_local
from .tables import markdown_table

_CANDIDATES = 5
"""Number of candidates that a card lists."""

_LICENCE = ("license", "license_name", "license_link")

_NO_ORIGINAL = "This card does not name the original, whose terms also apply here."

_NO_LICENCE = "The card of the original states no licence, or could not be read. Its terms also apply here."


def licence_of(model: str) -> dict[str, str]:
    """Licence of a model, from its card; empty where it has no readable card.

    Args:
        model: Hub name, or path of a checkpoint with a `README.md`.

    Returns:
        The fields among `license`, `license_name` and `license_link` that the card has. A link to a file of a
        repository on the Hub is its address.
    """
    local = is_local(model)
    try:
        data = ModelCard.load(Path(model).expanduser() / "README.md" if local else model).data.to_dict()
    except (OSError, ValueError, yaml.YAMLError):  # the Hub client's errors are OSErrors
        return {}
    found = {name: data[name] for name in _LICENCE if data.get(name)}
    if not local and "license_link" in found and "://" not in found["license_link"]:
        found["license_link"] = f"https://huggingface.co/{model}/blob/main/{found['license_link']}"
    return found


def document(front: ModelCardData, *sections: Iterable[str]) -> ModelCard:
    """A card of its front matter and its sections, which are lines of Markdown."""
    body = "\n".join(line for section in sections for line in section).rstrip()
    return ModelCard(f"---\n{front.to_yaml()}\n---\n\n{body}\n")


def front_matter(
    method: Method,
    base_model: str | None,
    pipeline: str | None,
    licence: Mapping[str, str],
    beside: Collection[str] = (),
    **fields: Any,
) -> ModelCardData:
    """Front matter of a card, which the Hub reads.

    Args:
        method: Method that made the model.
        base_model: Hub name or path of the original; a path is left out, because the Hub takes only repositories.
        pipeline: Pipeline tag of the task; None where it is unknown.
        licence: Licence of the original, from `licence_of`.
        beside: Names of the files beside the card. A link to a licence in another file is left out.
        fields: Further fields.
    """
    link = licence.get("license_link", "")
    if link and "://" not in link and link not in beside:
        licence = {name: value for name, value in licence.items() if name != "license_link"}
    return ModelCardData(
        base_model=None if base_model is None or is_local(base_model) else base_model,
        library_name="transformers",
        pipeline_tag=pipeline,
        tags=["hf-layerfuse", method.tag, "model-compression"],
        **fields,
        **licence,
    )


def introduction(original: str | None, method: Method, plan: Plan, summary: str) -> list[str]:
    """Title, and the result in one sentence. Without a name of the original, they name its type."""
    kind = "It is a stock checkpoint: Transformers loads it like any other."
    if not plan.layout().is_stock:
        kind = "Its config holds the plan."
    source = f"`{original}`" if original else f"a `{plan.model_type}` model"
    made = f"Made from {source} with [hf_layerfuse](https://pypi.org/project/hf-layerfuse/): {summary}. {kind}"
    return [f"# {original or plan.model_type}, {method.done}", "", made, ""]


def measured(test_data: str | None, table: list[list[str]], *notes: str) -> list[str]:
    """Table of sizes, latency and quality before and after, with notes below."""
    on = "" if test_data is None else f", on {test_data}"
    return [f"## Before and after{on}", "", markdown_table(table), "", *(line for note in notes for line in (note, ""))]


def changes(plan: Plan) -> list[str]:
    """Table of the edits."""
    heading = f"## Changes to its {plan.num_layers} {family_of(plan).units}"
    return [heading, "", markdown_table(change_table(plan), numbers=False), ""]


def losses(plan: Plan) -> list[str]:
    """Calibration loss before and after the refit, and of the candidates; nothing without calibration data."""
    lines, refit = [], plan.notes.refit
    if refit is not None:
        outcome = f"changed the loss from {refit.before:.4g} to {refit.after:.4g}"
        if not refit.kept:
            outcome = f"did not lower the loss of {refit.after:.4g}, so it was not kept"
        lines += [f"The closed-form refit {outcome}.", ""]
    candidates = sorted(plan.notes.competition, key=lambda candidate: candidate.loss)
    if len(candidates) > 1:
        rows = [["candidate", "calibration loss"]]
        for candidate in candidates[:_CANDIDATES]:
            edits = describe(replace(plan, edits=candidate.edits))
            rows.append(["; ".join(edits), f"{candidate.loss:.4g}"])
        lines += [markdown_table(rows), ""]
        more = len(candidates) - _CANDIDATES
        lines += [f"{more} more candidates had higher losses.", ""] if more > 0 else []
    about = "The calibration loss is 0 for the outputs of the original. It was measured on held-out calibration data."
    return ["## Calibration", "", about, "", *lines] if lines else []


def pictures(captions: Mapping[str, str]) -> list[str]:
    """Pictures beside the card, by the name of their file."""
    return [line for file, shows in captions.items() for line in (f"![{shows}]({file})", "", f"*{shows}.*", "")]


def use(plan: Plan, loader: str, source: str, *, revision: str | None = None, with_code: bool = False) -> list[str]:
    """Python lines that load the result.

    Args:
        plan: Plan of the result.
        loader: Auto class of transformers that loads it, or `AutoFusedModel`.
        source: Hub name of the result, or a placeholder.
        revision: Branch on the Hub.
        with_code: Whether the code of a fused class is beside its weights.
    """
    first, note = [], ""
    arguments = [f'"{source}"', *([] if revision is None else [f'revision="{revision}"'])]
    if not plan.layout().is_stock and with_code:
        arguments.append("trust_remote_code=True")
        note = "  # runs the code in layerfuse/: read it first"
    elif not plan.layout().is_stock and loader != "AutoFusedModel":
        first = ["import hf_layerfuse  # lets transformers load this kind of checkpoint"]
    elsewhere = f"Replace `{source}` with the folder of this model, or with its name on the Hub."
    return [
        "## Use",
        "",
        "```python",
        *first,
        f"from {'hf_layerfuse' if loader == 'AutoFusedModel' else 'transformers'} import {loader}",
        "",
        f"model = {loader}.from_pretrained({', '.join(arguments)}){note}",
        "```",
        "",
        *([elsewhere, ""] if source.startswith(PLACEHOLDER) else []),
    ]


def limits(limitations: Sequence[str], original: str | None, licence: Mapping[str, str]) -> list[str]:
    """List of limitations, and of what is unknown about the original's licence."""
    unknown = [] if licence else [_NO_ORIGINAL if original is None else _NO_LICENCE]
    return ["## Limits", "", *(f"- {limit}" for limit in [*limitations, *unknown]), ""]
