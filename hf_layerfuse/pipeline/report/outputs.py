"""Sample outputs of a run, as the page shows them."""

from __future__ import annotations

from itertools import takewhile
from typing import Any

from ..samples import Continuation, Distance, Prediction, Samples


def sample_section(samples: Samples | None) -> dict[str, Any] | None:
    """The sample outputs with a sentence about them, for the page; None without any.

    Args:
        samples: Samples of a run.
    """
    if samples is None:
        return None
    return {
        "words": _words(samples),
        "continuations": list(map(_continuation, samples.continuations)),
        "predictions": list(map(_prediction, samples.predictions)),
        "distances": list(map(_distance, samples.distances)),
    }


def _words(samples: Samples) -> str:
    if samples.continuations:
        return (
            "The first long lines of these data, continued by both models with the most probable token at each step. "
            "Text that is the same in both is grey on the side of the result."
        )
    if samples.distances:
        return f"Of the first {samples.rows:,} rows, those whose embeddings changed most."
    what = "predictions" if samples.outputs == samples.rows else f"{samples.outputs:,} predictions"
    where = f"Of the {what} for the first {samples.rows:,} rows"
    changed = samples.improved + samples.worsened + samples.moved
    if not changed:
        return f"{where}, none changed."
    moved = f", {samples.moved} went from one wrong class to another" if samples.moved else ""
    first = " The first of these:" if changed > len(samples.predictions) else ""
    return (
        f"{where}, {changed:,} changed: {samples.improved:,} became right, {samples.worsened:,} became wrong{moved}."
        f"{first}"
    )


def _continuation(each: Continuation) -> dict[str, str]:
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(each.original, each.result, strict=False))
    same = "".join(character for character, _ in alike)
    if len(same) < max(len(each.original), len(each.result)):
        same = same[: same.rfind(" ") + 1]  # whole words
    about = "result" if each.original != each.result else "result (the same)"
    return {
        "prompt": each.prompt.strip(),
        "original": each.original.strip(),
        "about": about,
        "same": same.lstrip(),
        "other": each.result[len(same) :].rstrip(),
    }


def _prediction(each: Prediction) -> dict[str, str | None]:
    outcome, tone = "wrong in both", ""
    if each.result == each.label:
        outcome, tone = "became right", "good"
    elif each.original == each.label:
        outcome, tone = "became wrong", "bad"
    where = f"row {each.row}" if each.word is None else f"row {each.row}, “{each.word.strip()}”"
    return {
        "text": each.text,
        "where": where,
        "original": each.original,
        "result": each.result,
        "label": each.label,
        "outcome": outcome,
        "tone": tone,
    }


def _distance(each: Distance) -> dict[str, str | None]:
    return {"text": each.text, "where": f"row {each.row}", "cosine": f"{each.cosine:.3f}"}
