"""Class names to ids that agree across splits and with the model."""

import re
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value

from ..errors import DataError

_STRINGS = ("string", "large_string")


def encode_labels(splits: DatasetDict, column: str, label2id: dict[str, int] | None) -> None:
    """Replace class names by ids that agree across splits, and check ids.

    The names come from `train`, or from `validation` if there is no `train`.
    """
    first = splits["train" if "train" in splits else "validation"]
    count = len(label2id or {})
    model_classes = sorted(label2id, key=label2id.get) if label2id else []
    if all(re.fullmatch(r"LABEL_\d+", name) for name in model_classes):
        model_classes = []
    names = _class_names(first, column)
    fold = str.casefold if {name.casefold() for name in names} <= {name.casefold() for name in model_classes} else str
    classes = model_classes if fold is str.casefold else names
    if fold is str and model_classes and first.features[column].dtype in _STRINGS:
        raise DataError(
            f"the classes of the data are {names}, those of the model {model_classes}: rename them, or use a model "
            "with these classes."
        )
    ids = {fold(name): index for index, name in enumerate(classes)}
    for split, rows in splits.items():
        labels, own_names = rows[column][:], rows.features[column]
        if names:
            if isinstance(own_names, ClassLabel):
                labels = [own_names.names[label] if label >= 0 else str(label) for label in labels]
            unknown = sorted({str(label) for label in labels if fold(str(label)) not in ids})
            if unknown:
                raise DataError(f"{split} has the classes {unknown}; the known ones are {classes}. Correct these rows.")
            labels = [ids[fold(label)] for label in labels]
            splits[split] = rows.remove_columns(column).add_column(column, labels, feature=ClassLabel(names=classes))
        if min(labels) < 0 or (count and max(labels) >= count):
            raise DataError(
                f"{split} has labels from {min(labels)} to {max(labels)}; the first class is 0, and the model has "
                f"{count or 'any number of'} classes. Choose a split with labels, or another model."
            )


def encode_word_labels(splits: DatasetDict, column: str, label2id: dict[str, int] | None) -> None:
    """`encode_labels` for rows with a list of classes, one per word."""
    flat = DatasetDict()
    for split, rows in splits.items():
        feature = rows.features[column]
        if not hasattr(feature, "feature"):
            raise DataError(f"column {column!r} of {split} holds {feature}, not a list of classes, one for each word.")
        words = [label for labels in rows[column][:] for label in labels]
        every = {column: words, "": range(len(words))}  # a table without a column has no rows
        flat[split] = Dataset.from_dict(every, features=Features({column: feature.feature, "": Value("int64")}))
    encode_labels(flat, column, label2id)
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
    if not isinstance(after, ClassLabel):
        return label
    if isinstance(before, ClassLabel) and not isinstance(label, str):
        label = before.names[label] if 0 <= label < len(before.names) else str(label)
    ids = {name.casefold(): index for index, name in enumerate(after.names)}
    if len(ids) < len(after.names) or str(label).casefold() not in ids:
        if label in after.names:
            return after.names.index(label)
        raise DataError(f"train has the class {label!r}; those of validation are {after.names}. Correct these rows.")
    return ids[str(label).casefold()]


def _class_names(train: Dataset, column: str) -> list[str]:
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
