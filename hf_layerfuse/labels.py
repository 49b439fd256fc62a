"""Class names to ids that mean the same in every split, and to the model."""

import re

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from .errors import DataError

_STRINGS = ("string", "large_string")


def encode_labels(splits: DatasetDict, column: str, label2id: dict[str, int] | None) -> None:
    """Replace class names by ids that mean the same in every split, and check ids."""
    count = len(label2id or {})
    model_classes = sorted(label2id, key=label2id.get) if label2id else []
    if all(re.fullmatch(r"LABEL_\d+", name) for name in model_classes):
        model_classes = []
    names = _class_names(splits["train"], column)
    fold = str.casefold if {name.casefold() for name in names} <= {name.casefold() for name in model_classes} else str
    classes = model_classes if fold is str.casefold else names
    if fold is str and model_classes and splits["train"].features[column].dtype in _STRINGS:
        raise DataError(
            f"the classes of the data are {names}, those of the model {model_classes}: rename them, or use a model "
            "that has them."
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
    """`encode_labels` where each row has a list of classes, one a word."""
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
        splits[split] = rows.remove_columns(column).add_column(column, labels)


def _class_names(train: Dataset, column: str) -> list[str]:
    """The names of the classes in the order of their ids; none where the labels are whole numbers already."""
    feature = train.features[column]
    dtype = getattr(feature, "dtype", "")  # a list, as of several labels a row, has none
    if isinstance(feature, ClassLabel):
        return feature.names
    if dtype in _STRINGS:
        return sorted(train.unique(column))
    if dtype.startswith(("int", "uint")):
        return []
    raise DataError(f"column {column!r} of train holds {feature}, not one class a row: use whole numbers or names.")
