"""Recipe of a whole run, read from a file and the command line."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ..errors import RecipeError
from .collapse import COLLAPSE_TARGETS, CollapseRecipe
from .data import DataRecipe
from .fusion import TARGETS, FusionRecipe
from .heal import HealRecipe
from .hub import HubRecipe
from .merge import MERGE_TARGETS, MergeRecipe
from .strict import current_names, require, strict_recipe
from .tasks import Task


@strict_recipe
class EvaluateRecipe:
    """Evaluation before fusing, after it, and after healing.

    Attributes:
        batch_size: Number of sequences or images per batch; it changes the results only by rounding.
        stride: Tokens by which the window moves when perplexity is measured. `data.max_length` (the default) gives
            windows that do not overlap; a smaller value gives every token more context and costs more.
        latency: Whether the model is timed at batch sizes 1 and 8.
        latency_repeats: Number of timed runs, after as many warm-up runs as needed.
        retrain_original: Whether the original is retrained too, on the same data and steps, with itself as teacher, and
            measured: the fair comparison for a healed model. Takes about as long as healing.
    """

    batch_size: int = 16
    stride: int | None = None
    latency: bool = True
    latency_repeats: int = 10
    retrain_original: bool = False

    def __post_init__(self) -> None:
        for field in ("batch_size", "stride", "latency_repeats"):
            value = getattr(self, field)
            require(value is None or value >= 1, f"evaluate.{field}={value}: use a whole number of 1 or more.")


@strict_recipe
class Recipe:
    """Recipe of a whole run of `fuse.py`. A recipe file has these fields, the last seven as sections.

    A recipe has one method: `fusion`, `collapse` or `merge`.

    Attributes:
        model: Hub name or path of the model to make smaller.
        task: Task of the model, which decides the data columns, the head class and the metrics.
        output_dir: Directory for the result; it must be empty or new unless `overwrite` is set.
        overwrite: Whether to replace `output_dir` once the new result is complete.
        trust_remote_code: Whether a Hub model may run its own code.
        with_code: Whether to save the code of a fused class beside its weights, for use without this library.
        low_memory: Whether to fuse layer by layer, for a model larger than memory. Such a run fuses whole layers in
            depth with effort `low`. It measures quality, and neither heals nor times the models.
        seed: Seed of shuffling, sampling and dropout.
    """

    model: str
    task: Task
    output_dir: str
    overwrite: bool = False
    trust_remote_code: bool = False
    with_code: bool = False
    low_memory: bool = False
    seed: int = 0
    data: DataRecipe
    fusion: FusionRecipe | None = None
    collapse: CollapseRecipe | None = None
    merge: MergeRecipe | None = None
    heal: HealRecipe = dataclasses.field(default_factory=HealRecipe)
    evaluate: EvaluateRecipe = dataclasses.field(default_factory=EvaluateRecipe)
    hub: HubRecipe = dataclasses.field(default_factory=HubRecipe)

    def __post_init__(self) -> None:
        given = [name for name in METHOD_TARGETS if getattr(self, name) is not None]
        require(
            len(given) == 1,
            f"a recipe has one method, and this one has {' and '.join(given) or 'none'}: give one of the sections "
            "fusion, collapse and merge. To do two, run one on the result of the other, fusion in depth first.",
        )
        if self.fusion is None:
            require(
                self.heal.schedule == "one-shot" and not self.heal.mix,
                f"heal.schedule={self.heal.schedule!r} and heal.mix={self.heal.mix} need fusion, and the method is "
                f"{given[0]}: use schedule 'one-shot', and no mix.",
            )
        require(
            not self.evaluate.retrain_original or self.heal.steps > 0,
            "evaluate.retrain_original trains the original for heal.steps, which is 0: use more, or leave it out.",
        )
        homotopy = self.collapse is not None and self.collapse.method == "homotopy"
        require(
            not homotopy or self.heal.steps > 0,
            "collapse.method='homotopy' linearises activations during healing, and heal.steps is 0: use more "
            "steps, or method 'fitted'.",
        )
        require(
            homotopy or not self.heal.homotopy_strength,
            f"heal.homotopy_strength={self.heal.homotopy_strength} needs collapse.method='homotopy': use that, or "
            "leave it out.",
        )
        require(
            self.merge is None or self.merge.method == "fitted" or self.heal.steps > 0,
            "merge.method='open' merges convolutions after healing, and heal.steps is 0: use more steps, or method "
            "'fitted'.",
        )
        require(
            self.merge is None or self.task == "image-classification",
            f"merge is for convolutions, and the task is {self.task!r}: use 'image-classification'.",
        )
        if self.fusion is not None:
            self._check_fusion()
        require(
            not self.low_memory or (self.fusion is not None and self.heal.steps == 0 and not self.trust_remote_code),
            "low_memory=True fuses layer by layer, with one layer in memory: it needs the section fusion, heal.steps 0 "
            "and no trust_remote_code. Heal the result in another run, on a machine that holds it.",
        )
        same = ("causal-lm", "text-classification", "token-classification")
        require(
            self.heal.teacher_top_k is None or (self.task in same and not self.data.streaming),
            f"heal.teacher_top_k={self.heal.teacher_top_k} caches answers to text that is the same in every epoch, "
            f"as in {', '.join(same)} without data.streaming, and the task is {self.task!r}: leave it out.",
        )

    @property
    def method(self) -> FusionRecipe | CollapseRecipe | MergeRecipe:
        """The section of the method that the run has."""
        return self.fusion or self.collapse or self.merge

    def _check_fusion(self) -> None:
        require(
            self.heal.schedule == "one-shot" or not self.fusion.is_timed,
            f"heal.schedule={self.heal.schedule!r} fuses further in every round, and a latency target is met in one "
            "step: use schedule 'one-shot', or another target.",
        )
        whole = self.fusion.mode != "depth" or self.fusion.blocks == "layer"
        require(
            self.heal.schedule == "one-shot" or whole,
            f"heal.schedule={self.heal.schedule!r} with fusion.mode='depth' and fusion.blocks={self.fusion.blocks!r}: "
            "removed attention or MLP blocks cannot be fused further. Use whole layers, mode 'share', or "
            "schedule 'one-shot'.",
        )
        require(
            self.heal.schedule == "one-shot" or self.fusion.rank != "auto" or self.fusion.ratio is not None,
            f"heal.schedule={self.heal.schedule!r} with fusion.rank='auto' divides a ratio into steps: give "
            "fusion.ratio as the target.",
        )
        require(
            not self.heal.mix or (self.fusion.operator == "mix" and self.fusion.mode != "basis"),
            f"heal.mix continues operator 'mix', and this recipe has fusion.operator={self.fusion.operator!r} in "
            f"mode {self.fusion.mode!r}: set the operator to 'mix' and the mode to 'share' or 'depth', or heal.mix to "
            "false.",
        )


SECTIONS = {
    "data": DataRecipe,
    "fusion": FusionRecipe,
    "collapse": CollapseRecipe,
    "merge": MergeRecipe,
    "heal": HealRecipe,
    "evaluate": EvaluateRecipe,
    "hub": HubRecipe,
}
METHOD_TARGETS = {"fusion": TARGETS, "collapse": COLLAPSE_TARGETS, "merge": MERGE_TARGETS}
"""Section of each method -> its fields that say how far to go, of which a recipe has one."""


def load_recipe(path: str | Path, overrides: dict[str, Any] | None = None) -> Recipe:
    """Read a YAML recipe and apply overrides.

    Args:
        path: Path of the YAML file.
        overrides: Values by dotted name, such as `{"model": "gpt2", "fusion.keep_layers": 8}`. A target of the
            method, such as `fusion.ratio`, replaces the target in the file.

    Raises:
        RecipeError: The file is missing or not a mapping, or a field is unknown or has a wrong value.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise RecipeError(f"no recipe at {path}: give the path of a YAML file such as recipes/gpt2-wikitext2.yaml.")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise RecipeError(f"{path} holds {type(tree).__name__}, not a mapping of recipe fields to values.")

    for section in SECTIONS.keys() & tree.keys():
        if isinstance(tree[section], dict):
            tree[section] = current_names(SECTIONS[section], tree[section])
    overrides = _current_overrides(overrides or {})
    for name, value in overrides.items():
        section, _, field = name.rpartition(".")
        if section and section not in SECTIONS:
            raise RecipeError(f"--{name}: no section {section!r}. The sections are: {', '.join(SECTIONS)}.")
        if section and tree.get(section) is None:
            tree[section] = {}
        target = tree[section] if section else tree
        if not isinstance(target, dict):
            raise RecipeError(f"{path}: section {section!r} holds {target!r}, not fields and values.")
        if field in METHOD_TARGETS.get(section, ()):
            for other in METHOD_TARGETS[section]:
                if f"{section}.{other}" not in overrides:
                    target.pop(other, None)
        target[field] = value

    data = tree.get("data")
    if (
        "data.name" in overrides
        and "data.config" not in overrides
        and isinstance(data, dict)
        and data.get("name") is None
    ):
        data.pop("config", None)  # belongs to the Hub data set that local files replace

    return recipe_of(tree, path)


def _current_overrides(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides by dotted name, with the current name of each field."""
    found = {name: value for name, value in overrides.items() if name.rpartition(".")[0] not in SECTIONS}
    for section, kind in SECTIONS.items():
        given = {name.partition(".")[2]: value for name, value in overrides.items() if name.startswith(f"{section}.")}
        found |= {f"{section}.{field}": value for field, value in current_names(kind, given).items()}
    return found


def recipe_of(tree: dict[Any, Any], source: str | Path) -> Recipe:
    """Make a recipe of the parsed content of a file; error messages name `source`.

    Raises:
        RecipeError: A field is unknown or has a wrong value.
    """
    tree = dict(tree)
    for section, kind in SECTIONS.items():
        if section in tree:
            values = tree[section] or {}
            if not isinstance(values, dict):
                raise RecipeError(f"{source}: section {section!r} holds {values!r}, not fields and values.")
            tree[section] = kind(**_named(values))
    return Recipe(**_named(tree))


def _named(values: dict[Any, Any]) -> dict[str, Any]:
    """The same values with their names as text: YAML reads `1:` and `on:` as a number and a boolean."""
    return {str(name): value for name, value in values.items()}
