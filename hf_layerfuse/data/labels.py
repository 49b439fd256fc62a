"""Class names to ids that agree across splits and with the model."""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from transformers import PreTrainedConfig

from ..errors import DataError

_STRINGS = ("string", "large_string")


def class_names(config: PreTrainedConfig) -> list[str]:
    """Class names of a model in the order of their ids, from `id2label`, which is what its predictions are called.

    Many configs on the Hub have names in `id2label` alone, or placeholders in `label2id`.

    Raises:
        DataError: The ids are not 0 to the number of classes - 1.
    """
    names = {int(label): str(name) for label, name in config.id2label.items()}
    if sorted(names) != list(range(len(names))):
        raise DataError(
            f"id2label in the config of the model has the ids {sorted(names)[:10]}, and outputs are numbered 0 to "
            f"{len(names) - 1}: number the classes from 0."
        )
    return [names[label] for label in range(len(names))]


def encode_labels(splits: DatasetDict, column: str, classes: Sequence[str] | None) -> None:
    """Replace class names by ids that agree across splits and with the model, and check ids.

    Names of a model decide; case matters only where two of them differ in nothing else. Without such names, ids follow
    the `ClassLabel` of the data set, and numbers in quotes are ids. Without a model, names in `train` are sorted (in
    `validation`, if there is no `train`).

    Args:
        splits: Splits, changed in place.
        column: Column with one class per row.
        classes: Class names of the model in the order of their ids, from `class_names`; None accepts any classes.

    Raises:
        DataError: A class or an id is unknown to the model or to the first split.
    """
    first = splits["train" if "train" in splits else "validation"]
    names = _names_in(first, column)
    declared = isinstance(first.features[column], ClassLabel)
    named = declared or not all(map(str.isdecimal, names)) or (bool(names) and set(names) <= set(classes or ()))
    if named:
        known = _known_classes(names, classes, declared=declared)
        id_of, feature = _id_by_name(known), ClassLabel(names=known)
    for split, rows in splits.items():
        labels = _written(rows[column][:], rows.features[column])
        if named:
            ids = {label: id_of(label) for label in dict.fromkeys(map(str, labels))}
            unknown = sorted(label for label, found in ids.items() if found is None)
            if unknown:
                raise DataError(
                    f"{split} has the classes {unknown[:10]}; the known ones are {known}. Correct or rename them, or "
                    "use a model with these classes."
                )
            labels = [ids[str(label)] for label in labels]
            splits[split] = rows.remove_columns(column).add_column(column, labels, feature=feature)
        elif names:
            labels = [_number(label, split) for label in labels]
            splits[split] = rows.remove_columns(column).add_column(column, labels, feature=Value("int64"))
        count = len(classes or ())
        if min(labels) < 0 or (count and max(labels) >= count):
            raise DataError(
                f"{split} has labels from {min(labels)} to {max(labels)}; the first class is 0, and the model has "
                f"{count or 'any number of'} classes. Choose a split with labels, or another model."
            )


def _known_classes(names: list[str], classes: Sequence[str] | None, *, declared: bool) -> list[str]:
    """Return the class names that data with some names are numbered by.

    Args:
        names: Names in the data.
        classes: Names in the model.
        declared: Whether the data set numbers its names.
    """
    if classes is None or (declared and _are_placeholders(classes)):
        return names
    if _are_placeholders(classes) and not set(names) <= set(classes):
        raise DataError(
            f"the classes of the data are {names}, and the model names its classes {list(classes)[:3]}, so that "
            "their order is unknown: set id2label in the config of the model, or label rows with whole numbers."
        )
    twice = sorted({name for name in classes if list(classes).count(name) > 1})
    if twice:
        raise DataError(
            f"id2label in the config of the model gives several classes the names {twice}: give each class its own "
            "name, or label rows with whole numbers."
        )
    return list(classes)


def _are_placeholders(names: Iterable[str]) -> bool:
    return all(re.fullmatch(r"LABEL_\d+", name) for name in names)


def _id_by_name(classes: Sequence[str]) -> Callable[[str], int | None]:
    """Return a function from a class name to its id, or to None for an unknown name."""
    exact = {name: index for index, name in enumerate(classes)}
    folded = {name.casefold(): index for index, name in enumerate(classes)}
    if len(folded) < len(exact):
        return exact.get
    return lambda name: exact.get(name, folded.get(name.casefold()))


def _written(labels: list[Any], feature: Any) -> list[Any]:
    """Return labels as names where the data set has names for its ids."""
    if not isinstance(feature, ClassLabel):
        return labels
    return [feature.names[label] if 0 <= label < len(feature.names) else str(label) for label in labels]


def _number(label: Any, split: str) -> int:
    try:
        return int(label)
    except ValueError:
        raise DataError(f"{split} has the class {label!r}, and all other classes are numbers: correct it.") from None


def encode_word_labels(splits: DatasetDict, column: str, classes: Sequence[str] | None) -> None:
    """`encode_labels` for rows with a list of classes, one per word."""
    flat = DatasetDict()
    for split, rows in splits.items():
        feature = rows.features[column]
        if not hasattr(feature, "feature"):
            raise DataError(f"column {column!r} of {split} holds {feature}, not a list of classes, one for each word.")
        words = [label for labels in rows[column][:] for label in labels]
        every = {column: words, "": range(len(words))}  # a table without a column has no rows
        flat[split] = Dataset.from_dict(every, features=Features({column: feature.feature, "": Value("int64")}))
    encode_labels(flat, column, classes)
    for split, rows in splits.items():
        ids = iter(flat[split][column][:])
        labels = [[next(ids) for _ in of_row] for of_row in rows[column][:]]
        feature = List(flat[split].features[column])
        splits[split] = rows.remove_columns(column).add_column(column, labels, feature=feature)


def encode_row(row: dict[str, Any], column: str, classes: int, before: Any, after: Any) -> dict[str, Any]:
    """Encode the labels of a streamed row like those of an encoded split.

    Args:
        row: Row with a class, or a list of classes.
        column: Column with the labels.
        classes: Number of classes of the model; 0 allows any number.
        before: Feature of the column in the other split before encoding: ids with names, names, or ids.
        after: Feature of that column after encoding.

    Raises:
        DataError: The class is missing, or unknown to the other split or the model.
    """
    labels = row[column]
    if labels is None:
        raise DataError(f"a row of train has no value in column {column!r}: fill it in or remove the row.")
    if not isinstance(labels, list):
        ids = _id_of(labels, before, after)
    else:
        ids = [_id_of(label, before.feature, after.feature) for label in labels]
    wrong = [label for label in (ids if isinstance(ids, list) else [ids]) if label < 0 or label >= classes > 0]
    if wrong:
        raise DataError(
            f"a row of train has the label {wrong[0]}; the first class is 0, and the model has {classes} classes. "
            "Correct these rows, or choose another model."
        )
    return {column: ids}


def _id_of(label: int | str, before: Any, after: Any) -> int:
    if not isinstance(label, str):
        (label,) = _written([label], before)
    if not isinstance(after, ClassLabel):
        return _number(label, "train")
    found = _id_by_name(after.names)(str(label))
    if found is None:
        raise DataError(f"train has the class {label!r}; the known ones are {after.names}. Correct these rows.")
    return found


def _names_in(train: Dataset, column: str) -> list[str]:
    """Class names in the order of their ids; empty if the labels are whole numbers already."""
    feature = train.features[column]
    dtype = getattr(feature, "dtype", "")  # a list, such as several labels per row, has no dtype
    if isinstance(feature, ClassLabel):
        return feature.names
    if dtype in _STRINGS:
        return sorted(train.unique(column))
    if dtype.startswith(("int", "uint")):
        return []
    raise DataError(f"column {column!r} of train holds {feature}, not one class per row: use whole numbers or names.")
