"""Recipe section `data`: splits, columns and sample counts."""

from .strict import require, strict_recipe


@strict_recipe
class DataRecipe:
    """Source and preparation of the data.

    With `name`, `train`, `validation` and `test` are splits of that Hub data set (slices such as
    `train[:5000]` work); without it they are local files (.txt, .tsv, .csv, .json, .jsonl, each also as .xz or .gz,
    and .parquet) or image folders with one subfolder per class.

    Attributes:
        name: Hub data set, such as `Salesforce/wikitext`, or None for local files.
        config: Configuration of the Hub data set, such as `wikitext-2-raw-v1`.
        train: Training split, used for healing and for calibration batches.
        validation: Held-out split for validation during healing; by default, the last `held_out` rows of `train`.
        test: Test split for the reported results; nothing is selected on it.
        held_out: Number of rows of `train` that become `validation` when there is none. Data sorted by class are
            shuffled first.
        text_column: Column with the text, or, for token classification, with the words.
        label_column: Column with the class, an int or a string, or, for token classification, with one class per word.
        image_column: Column with the image.
        max_length: Maximum sequence length in tokens; for causal language models, the length of the windows.
        calibration_samples: Number of training rows (windows, for causal language models) in the calibration batches.
            Together they should have many times as many tokens as the widest map has inputs: use more of them for
            short texts.
        num_proc: Number of processes that tokenise in parallel; a fast tokenizer uses all cores by itself.
        augment: Whether training images are shifted and mirrored at random.
        streaming: Whether `train` is read row by row and never held as a whole; needs `validation`. Rows are shuffled
            among the next 10,000, and class names are those of `validation`.
        max_train_samples: Maximum number of rows (windows) of `train`.
        max_test_samples: Maximum number of rows (windows) of `validation` and of `test`.
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
            f"data.config={self.config!r} needs a Hub data set, and data.name is not set: set it, or leave "
            "data.config out.",
        )
        require(
            not (self.streaming and self.validation is None),
            "data.streaming=true cannot hold out the last rows of `train`: name a split or file as data.validation.",
        )
        counts = ("held_out", "max_length", "calibration_samples", "num_proc", "max_train_samples", "max_test_samples")
        for field in counts:
            value = getattr(self, field)
            require(value is None or value >= 1, f"data.{field}={value}: use a whole number of 1 or more.")
