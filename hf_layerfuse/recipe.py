"""What the user asks for: strict dataclasses, read from YAML and overridden from the command line."""

import contextlib
import dataclasses
import difflib
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_type_hints

import yaml
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError

from .errors import RecipeError
from .tasks import Task

TARGETS = ("keep_layers", "ratio", "max_parameters", "max_bytes")
"""The fields of `FusionRecipe` that say how small the result is to be; a recipe has one of them."""

_T = TypeVar("_T")


def _recipe(cls: type[_T]) -> type[_T]:
    """Make `cls` a keyword-only strict dataclass whose every complaint is a `RecipeError`."""
    cls = strict(dataclasses.dataclass(cls, kw_only=True))
    fill = cls.__init__
    hints = get_type_hints(cls)

    def __init__(self, **values: Any) -> None:
        for name in values:
            if name not in hints:
                close = difflib.get_close_matches(name, hints, n=1)
                hint = f" Did you mean {close[0]!r}?" if close else ""
                raise RecipeError(f"{cls.__name__} has no field {name!r}.{hint} Its fields are: {', '.join(hints)}.")
            if "float" in str(hints[name]):
                values[name] = _as_float(values[name])
            if values[name] is False and "no" in get_args(hints[name]):
                values[name] = "no"  # YAML 1.1 reads that word as false
        try:
            fill(self, **values)
        except (StrictDataclassError, TypeError) as error:
            reason = str(error).splitlines()[-1].strip().rstrip(".")
            raise RecipeError(f"{cls.__name__}: {reason}. Correct this value in the recipe.") from error

    cls.__init__ = __init__
    return cls


def _as_float(value: Any) -> Any:
    """People write 1 for 1.0, and YAML 1.1 reads 1e-4 as text."""
    if type(value) in (int, str):
        with contextlib.suppress(ValueError):
            return float(value)
    return value


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RecipeError(message)


@_recipe
class FusionRecipe:
    """How a model is to be made smaller.

    Give exactly one target: `keep_layers`, the number of blocks (of the kind `blocks`) that stay distinct; `ratio`, the
    share of their parameters to remove, met as closely as whole blocks allow; or `max_parameters` or `max_bytes`, which
    the whole model may have, so that as many blocks stay distinct as fit.

    Attributes:
        keep_layers: distinct blocks after fusion, from 1 to one less than the model has.
        ratio: share of block parameters to remove, 0 < ratio < 1.
        max_parameters: most parameters of the result, embeddings and head included, shared ones counted once.
        max_bytes: most bytes of its weights on disk, in the dtype of the model; the header of the file comes on top.
        mode: `depth` runs a fused block once (smaller and faster); `share` lets one set of weights serve every
            depth of its group (smaller on disk and in memory, not faster); `basis` lets the depths of a group combine
            one shared basis of `rank` vectors (the same).
        rank: of the residual that each depth adds to a shared matrix (`share`), or size of the basis (`basis`).
        blocks: fuse whole layers, or their attention or MLP blocks alone, or `separate`: both, each kind in groups of
            its own and to the same number of blocks.
        similarity: distance between blocks. `euclidean`, `cosine`, `covariance`, `kl` and `wasserstein` compare
            weights; `cka`, `cka_unbiased`, `angular` and `block_influence` compare activations on calibration
            `batches`.
        cluster: `auto` groups neighbours so that the calibration losses of the groups add up to the least, as far as
            `effort` goes, and falls back on `adjacent` without batches. `adjacent` groups neighbours with the least
            distance inside the groups; `global` connects the closest pairs of any blocks, and `agglomerative` merges
            the groups that are closest on average (both not in `depth` mode).
        operator: how the weights of a group become one. `auto` lets the others compete on calibration loss; without
            batches it is `freeze`, or where weights are shared `mean` with align `rotation`. `select` makes a layer of
            those heads and hidden units of its whole group that the refit finds most useful (`depth` mode, with
            batches; attention that is fused alone stays that of the group's first layer). `freeze` keeps one layer: the
            one nearest the group's middle, the later of two; `mean` averages, `weighted` by how much each layer changes
            the residual stream; `mix` takes every element from one of the layers at random; `telescope` adds all
            differences to the first layer (LaCo, eq. 1).
        align: the symmetry that is undone before weights are combined: the order of MLP units and heads, found from
            the weights (`permutation`), from `activation`s on batches, or by optimal `transport` (needs the extra of
            that name); or that order and a `rotation` of each head.
        refit: closed-form repair on calibration batches. `full` refits all maps of the repaired blocks, `linear` one
            map of what the last block before removed ones adds (ReplaceMe); `none`, or no batches: no repair.
        effort: how much is tried on calibration batches: `low` is the heuristic choice and one refit (at most about 6
            forward passes of the original over the batches), `medium` also compares groups and operators (25), `high`
            also the plans next to the best one (60).
        seed: seed of everything that is drawn.

    Raises:
        RecipeError: unknown field, wrong type, or a combination that cannot be met.
    """

    keep_layers: int | None = None
    ratio: float | None = None
    max_parameters: float | None = None
    max_bytes: float | None = None
    mode: Literal["depth", "share", "basis"] = "depth"
    rank: int = 0
    blocks: Literal["layer", "attention", "mlp", "separate"] = "layer"
    similarity: Literal[
        "euclidean",
        "cosine",
        "covariance",
        "kl",
        "wasserstein",
        "cka",
        "cka_unbiased",
        "angular",
        "block_influence",
    ] = "cosine"
    cluster: Literal["auto", "adjacent", "global", "agglomerative"] = "auto"
    operator: Literal["auto", "select", "freeze", "mean", "weighted", "mix", "telescope"] = "auto"
    align: Literal["none", "permutation", "activation", "transport", "rotation"] = "none"
    refit: Literal["full", "linear", "none"] = "full"
    effort: Literal["low", "medium", "high"] = "medium"
    seed: int = 0

    def __post_init__(self) -> None:
        given = {name: value for name in TARGETS if (value := getattr(self, name)) is not None}
        _require(
            len(given) == 1,
            f"give exactly one target, got {' and '.join(f'{k}={v}' for k, v in given.items()) or 'none'}: set "
            "keep_layers (for example 8), ratio (0.5), max_parameters (8e7) or max_bytes (2e8).",
        )
        _require(
            self.keep_layers is None or self.keep_layers >= 1,
            f"keep_layers={self.keep_layers} leaves no layer: use 1 or more.",
        )
        _require(
            self.ratio is None or 0 < self.ratio < 1,
            f"ratio={self.ratio} is not a share of the parameters to remove: use a number between 0 and 1.",
        )
        for name in ("max_parameters", "max_bytes"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"{name}={value} leaves no model: use a number above 0, such as 8e7.")
        _require(
            not (self.mode == "depth" and self.cluster not in ("auto", "adjacent")),
            f"mode='depth' with cluster={self.cluster!r} would merge layers that are far apart and run the result "
            "once, in the place of neither: use cluster='auto' or 'adjacent', or mode='share'.",
        )
        _require(
            not (self.operator == "select" and (self.mode != "depth" or self.refit != "full")),
            f"operator='select' chooses hidden units while a block is refitted, to run once: it needs mode='depth' and "
            f"refit='full', not mode={self.mode!r} and refit={self.refit!r}.",
        )
        _require(self.rank >= 0, f"rank={self.rank}: use a whole number of 0 or more.")
        _require(
            not (self.mode == "depth" and self.rank),
            f"rank={self.rank} with mode='depth', where nothing is shared: leave it out, or use mode='share'.",
        )
        _require(
            self.mode != "basis" or self.rank > 0,
            "mode='basis' needs rank, the number of basis vectors: a quarter of the model's width, for example.",
        )

    @property
    def needs_batches(self) -> bool:
        """Whether the similarity measure compares activations, so that calibration batches are required."""
        return self.similarity in ("cka", "cka_unbiased", "angular", "block_influence")


@_recipe
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
        calibration_samples: training rows (windows, for language models) used as calibration batches.
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
        _require(
            self.name is not None or self.config is None,
            f"data.config={self.config!r} belongs to a Hub data set, and data.name is not set: set it, or leave "
            "data.config out.",
        )
        _require(
            not (self.streaming and self.validation is None),
            "data.streaming=true reads `train` once through, so that no rows of its end can be held out: name a split "
            "or file as data.validation.",
        )
        counts = ("held_out", "max_length", "calibration_samples", "num_proc", "max_train_samples", "max_test_samples")
        for field in counts:
            value = getattr(self, field)
            _require(value is None or value >= 1, f"data.{field}={value}: use a whole number of 1 or more.")


@_recipe
class HealRecipe:
    """How the fused model is retrained, with the original as teacher.

    The loss is `ce_weight` x cross-entropy + `kl_weight` x KL(teacher || student) at `temperature` (scaled by its
    square, Hinton et al. 2015) + `hidden_weight` and `attention_weight` x the mean squared error of hidden states and
    of attention outputs, relative to the mean square of the teacher's. Which layer of the teacher each layer answers to
    follows from the plan: the last original layer of its group.

    Attributes:
        steps: optimiser steps, of all rounds together; 0 skips healing.
        schedule: `one-shot` fuses everything at once. The others fuse a step, heal, and fuse further, in so many
            `rounds`: `uniform` takes equal steps, `exponential` larger ones early (O'Neill et al. 2021, section 3).
        rounds: of an iterative schedule.
        curriculum_rate: how early an `exponential` schedule fuses: after round t of T, (1 - e^(-rate t / T)) /
            (1 - e^-rate) of all is done.
        batch_size: sequences or images per device and step.
        gradient_accumulation_steps: batches that make one optimiser step.
        learning_rate: peak of the warm-up and cosine schedule.
        warmup_ratio: share of the steps spent warming up.
        weight_decay: AdamW weight decay, not applied to norms and biases.
        max_grad_norm: gradient clipping.
        ce_weight: weight of the cross-entropy with the labels.
        kl_weight: weight of the divergence from the teacher's logits, or, without a head, from its last hidden states.
        hidden_weight: weight of the error of hidden states, averaged over layers.
        attention_weight: weight of the error of attention outputs, averaged over layers.
        teacher_top_k: ask the teacher once for each training row, and keep the log-probabilities of so many classes on
            disk, the rest taken as one, instead of asking it in every step. For text that is the same in every epoch:
            causal language models and classification.
        temperature: softens both distributions in the divergence.
        mixed_precision: `auto` is bf16 where the device computes in it natively, unless `accelerate launch` was told
            bf16, fp16 or fp8. `no` is float32.
        eval_every: validation loss is taken and a checkpoint written every so many steps, and at the end. The weights
            of the least validation loss are the result.
        patience: stop after so many validations in a row that found nothing better.
        lora_rank: train only residuals of this rank beside each linear map, merged at the end (needs the extra `peft`).
        mix: with operator `mix`, draw every element of a fused weight anew in each step from the layers that it was
            made of, which are what is trained, and average them at the end.
        freeze_fused: train only what was not made of several blocks.
        gradient_checkpointing: compute inner states twice, to train in less memory.
        compile: let `torch.compile` (inductor) make the model faster.
        log_with: a tracker that Accelerate knows and that is installed, such as `tensorboard` or `wandb`.
        log_dir: where a tracker on disk writes.
    """

    steps: int = 500
    schedule: Literal["one-shot", "uniform", "exponential"] = "one-shot"
    rounds: int = 3
    curriculum_rate: float = 2.0
    batch_size: int = 16
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-4
    warmup_ratio: float = 0.1
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    ce_weight: float = 1.0
    kl_weight: float = 1.0
    hidden_weight: float = 0.0
    attention_weight: float = 0.0
    teacher_top_k: int | None = None
    temperature: float = 1.0
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    eval_every: int = 100
    patience: int | None = None
    lora_rank: int | None = None
    mix: bool = False
    freeze_fused: bool = False
    gradient_checkpointing: bool = False
    compile: bool = False
    log_with: str | None = None
    log_dir: str = "logs"

    def __post_init__(self) -> None:
        _require(self.steps >= 0, f"heal.steps={self.steps}: use 0 to skip healing, or more.")
        _require(
            self.schedule == "one-shot" or self.steps >= self.rounds,
            f"heal.schedule={self.schedule!r} heals in each of heal.rounds={self.rounds}, and there are "
            f"heal.steps={self.steps}: use more steps, or schedule 'one-shot'.",
        )
        counts = (
            "rounds",
            "batch_size",
            "gradient_accumulation_steps",
            "eval_every",
            "patience",
            "teacher_top_k",
            "lora_rank",
        )
        for field in counts:
            value = getattr(self, field)
            _require(value is None or value >= 1, f"heal.{field}={value}: use a whole number of 1 or more.")
        chosen = [name for name in ("lora_rank", "mix", "freeze_fused") if getattr(self, name)]
        _require(
            len(chosen) < 2,
            f"{' and '.join(f'heal.{name}' for name in chosen)} each say what is trained: choose one of them.",
        )
        for field in ("curriculum_rate", "learning_rate", "max_grad_norm", "temperature"):
            value = getattr(self, field)
            _require(value > 0, f"heal.{field}={value}: use a number above 0.")
        losses = ("ce_weight", "kl_weight", "hidden_weight", "attention_weight")
        for field in (*losses, "weight_decay"):
            value = getattr(self, field)
            _require(value >= 0, f"heal.{field}={value}: use 0 or more.")
        _require(
            any(getattr(self, field) > 0 for field in losses),
            f"{', '.join(f'heal.{field}' for field in losses)} are all 0, so there is nothing to learn: raise one.",
        )
        _require(0 <= self.warmup_ratio <= 1, f"heal.warmup_ratio={self.warmup_ratio}: use a share from 0 to 1.")

    @property
    def needs_teacher(self) -> bool:
        """Whether a part of the loss compares with the original."""
        return self.kl_weight > 0 or self.hidden_weight > 0 or self.attention_weight > 0


@_recipe
class EvaluateRecipe:
    """What is measured before fusing, after it, and after healing.

    Attributes:
        batch_size: sequences or images per batch; does not change the figures beyond rounding.
        stride: tokens by which the window moves when perplexity is taken; `data.max_length` (the default) gives
            windows that do not overlap, less gives every token more context and costs more.
        latency: time the model at batch 1 and 8.
        latency_repeats: timed runs, after as many warm-up runs as needed.
    """

    batch_size: int = 16
    stride: int | None = None
    latency: bool = True
    latency_repeats: int = 10

    def __post_init__(self) -> None:
        for field in ("batch_size", "stride", "latency_repeats"):
            value = getattr(self, field)
            _require(value is None or value >= 1, f"evaluate.{field}={value}: use a whole number of 1 or more.")


@_recipe
class Recipe:
    """A whole run of `fuse.py`: a recipe file has these fields, the last four as sections.

    Attributes:
        model: Hub name or path of the model to make smaller.
        task: decides the data columns, the head class and the metrics.
        output_dir: where the result is written; never an existing non-empty directory without `overwrite`.
        overwrite: replace `output_dir` once the new result is complete.
        trust_remote_code: let a Hub model run its own code. Off unless you say so.
        seed: seed of shuffling, sampling and dropout.
    """

    model: str
    task: Task
    output_dir: str
    overwrite: bool = False
    trust_remote_code: bool = False
    seed: int = 0
    data: DataRecipe
    fusion: FusionRecipe
    heal: HealRecipe = dataclasses.field(default_factory=HealRecipe)
    evaluate: EvaluateRecipe = dataclasses.field(default_factory=EvaluateRecipe)

    def __post_init__(self) -> None:
        whole = self.fusion.mode != "depth" or self.fusion.blocks == "layer"
        _require(
            self.heal.schedule == "one-shot" or whole,
            f"heal.schedule={self.heal.schedule!r} with fusion.mode='depth' and fusion.blocks={self.fusion.blocks!r}: "
            "attention or MLP blocks that are gone cannot be fused further. Use whole layers, mode 'share', or "
            "schedule 'one-shot'.",
        )
        _require(
            not self.heal.mix or (self.fusion.operator == "mix" and self.fusion.mode != "basis"),
            f"heal.mix goes on with what operator 'mix' began, and it is fusion.operator={self.fusion.operator!r} in "
            f"mode {self.fusion.mode!r}: set the operator to 'mix' and the mode to 'share' or 'depth', or heal.mix to "
            "false.",
        )
        same = ("causal-lm", "text-classification", "token-classification")
        _require(
            self.heal.teacher_top_k is None or (self.task in same and not self.data.streaming),
            f"heal.teacher_top_k={self.heal.teacher_top_k} keeps the answers to text that is the same in every epoch, "
            f"as in {', '.join(same)} without data.streaming, and the task is {self.task!r}: leave it out.",
        )


_SECTIONS = {"data": DataRecipe, "fusion": FusionRecipe, "heal": HealRecipe, "evaluate": EvaluateRecipe}


def load_recipe(path: str | Path, overrides: dict[str, Any] | None = None) -> Recipe:
    """Read a YAML recipe and apply overrides.

    Args:
        path: the YAML file.
        overrides: dotted names to values, such as `{"model": "gpt2", "fusion.keep_layers": 8}`. A target of the
            fusion, `fusion.ratio` say, replaces the one that the file has.

    Raises:
        RecipeError: the file is missing or not a mapping, or a field is unknown or has a wrong value.
    """
    path = Path(path)
    if not path.is_file():
        raise RecipeError(f"no recipe at {path}: give the path of a YAML file such as recipes/gpt2-wikitext2.yaml.")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise RecipeError(f"{path} holds {type(tree).__name__}, not a mapping of recipe fields to values.")

    for name, value in (overrides or {}).items():
        section, _, field = name.rpartition(".")
        if section and section not in _SECTIONS:
            raise RecipeError(f"--{name}: no section {section!r}. The sections are: {', '.join(_SECTIONS)}.")
        if section and tree.get(section) is None:
            tree[section] = {}
        target = tree[section] if section else tree
        if not isinstance(target, dict):
            raise RecipeError(f"{path}: section {section!r} holds {target!r}, not fields and values.")
        if section == "fusion" and field in TARGETS:
            for other in TARGETS:
                if f"fusion.{other}" not in overrides:
                    target.pop(other, None)
        target[field] = value

    data = tree.get("data")
    named = (overrides or {}).keys()
    if "data.name" in named and "data.config" not in named and isinstance(data, dict) and data.get("name") is None:
        data.pop("config", None)  # that of the Hub data set, which local files replace

    for section, kind in _SECTIONS.items():
        if section in tree:
            values = tree[section] or {}
            if not isinstance(values, dict):
                raise RecipeError(f"{path}: section {section!r} holds {values!r}, not fields and values.")
            tree[section] = kind(**_named(values))
    return Recipe(**_named(tree))


def _named(values: dict[Any, Any]) -> dict[str, Any]:
    """The same values, their names as text: YAML reads `1:` and `on:` as a number and a boolean."""
    return {str(name): value for name, value in values.items()}
