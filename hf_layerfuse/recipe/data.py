"""Where the data come from."""

from .strict import require, strict_recipe


@strict_recipe
class DataRecipe:
    """Where the data come from.

    With `name`, `train`, `validation` and `test` are splits of that Hub data set (slices such as
    `train[:5000]` work); without it they are local files (.txt, .tsv, .csv, .json, .jsonl, each also as .xz or .gz,
    and .parquet) or image folders with one subfolder per class.

    Attributes:
        name: Hub data set such as `Salesforce/wikitext`, or None for local files.
        config: configuration of the Hub data set, such as `wikitext-2-raw-v1`.
        train: what healing learns from and calibration samples from.
        validation: what healing watches. Without it, `held_out` rows leave the end of `train` for this.
        test: what is reported, never used to choose anything.
        held_out: rows of `train` that become `validation` when there is none; data that are sorted by class are
            shuffled first.
        text_column: column with the text, or for token classification with the words.
        label_column: column with the class, an int or a string, or for token classification one for each word.
        image_column: column with the image.
        max_length: longest sequence in tokens; windows of this length for causal language models.
        calibration_samples: training rows (windows, for language models) used as calibration batches. Together they
            want to have many times as many tokens as the widest map has inputs: short texts want more of them.
        num_proc: processes that tokenise at once; a fast tokenizer uses all cores by itself.
        augment: shift and mirror training images at random.
        streaming: read `train` as it is used, and never hold all of it; needs `validation`. Rows are shuffled among
            the next 10,000, and classes have the names that they have in `validation`.
        max_train_samples: use only so many rows (windows) of `train`.
        max_test_samples: use only so many rows (windows) of `validation` and of `test`.
    """

    name: str | None = None
    config: str | None = None
    train: str = "train"
    validation: str | None = None
    test: str | None = None
    held_out: int = 2000
    text_column: str = "text"
    label_column: str = "label"
    image_column: str = "image"
    max_length: int = 256
    calibration_samples: int = 128
    num_proc: int | None = None
    augment: bool = True
    streaming: bool = False
    max_train_samples: int | None = None
    max_test_samples: int | None = None

    def __post_init__(self) -> None:
        require(
            self.name is not None or self.config is None,
            f"data.config={self.config!r} belongs to a Hub data set, and data.name is not set: set it, or leave "
            "data.config out.",
        )
        require(
            not (self.streaming and self.validation is None),
            "data.streaming=true reads `train` once through, so that no rows of its end can be held out: name a split "
            "or file as data.validation.",
        )
        counts = ("held_out", "max_length", "calibration_samples", "num_proc", "max_train_samples", "max_test_samples")
        for field in counts:
            value = getattr(self, field)
            require(value is None or value >= 1, f"data.{field}={value}: use a whole number of 1 or more.")
