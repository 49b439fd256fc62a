"""Recipe section `merge`: the latency budget, and how runs of convolutions become one."""

from typing import Literal

from .strict import require, require_one, strict_recipe

MERGE_TARGETS = ("latency_budget", "latency_ms")
"""Targets of `MergeRecipe`: a recipe sets exactly one of these fields."""


@strict_recipe(
    renamed={
        "budget": "latency_budget",
        "budget_ms": "latency_ms",
        "batch_size": "latency_batch_size",
        "repeats": "latency_repeats",
    }
)
class MergeRecipe:
    """Settings of a merge: each segment of convolutions becomes one (LayerMerge, Kim et al. 2024).

    Give exactly one target: `latency_budget`, a share of the original's latency, or `latency_ms`.

    Attributes:
        latency_budget: Share of the original's latency that the result may have on the model's current device,
            0 < latency_budget < 1.
        latency_ms: Maximum latency of a forward pass in milliseconds.
        latency_batch_size: Number of images in the timed pass.
        choose: Edits to choose from. `all` removes activations and convolutions. The others are baselines:
            `activations` keeps all convolutions (Kim et al. 2023); `convolutions` removes some by their loss and merges
            none; `magnitude` removes those with the smallest weights instead.
        importance: Score whose sum is maximised: minus the calibration loss that a segment costs (`loss`), or
            exp(-loss), as `published`. With the latter, a segment that ruins the model is hardly worse than one that
            harms it.
        tune_steps: Training steps on part of the calibration images for each segment, before its loss is measured on
            the others. As published, and slow: some hundred segments are trained. With 0, each segment gets only a
            closed-form fit.
        max_kernel: Largest kernel of a merged convolution.
        method: Time of the merge. `fitted` merges at once, and fits each merged convolution in closed form. `open`
            removes activations and convolutions first, and merges after `heal`, as published.
        refit: Closed-form repair with `fitted`; `none` leaves merged convolutions as composed.
        latency_repeats: Number of timed rounds of each shape of convolution.
        tables: Folder that keeps measured latencies and losses. Another budget, or an interrupted run, reuses them;
            None keeps them in memory.

    Raises:
        RecipeError: A field is unknown or has the wrong type, or a combination is not possible.
    """

    latency_budget: float | None = None
    latency_ms: float | None = None
    latency_batch_size: int = 8
    choose: Literal["all", "activations", "convolutions", "magnitude"] = "all"
    importance: Literal["loss", "published"] = "loss"
    tune_steps: int = 0
    max_kernel: int = 7
    method: Literal["fitted", "open"] = "fitted"
    refit: Literal["full", "none"] = "full"
    latency_repeats: int = 30
    tables: str | None = None

    def __post_init__(self) -> None:
        require_one(
            self,
            MERGE_TARGETS,
            "latency_budget (for example 0.6, of the original's latency) or latency_ms",
        )
        require(
            self.latency_budget is None or 0 < self.latency_budget < 1,
            f"latency_budget={self.latency_budget} must be between 0 and 1: it is the share of "
            "the original's latency to keep.",
        )
        require(
            self.latency_ms is None or self.latency_ms > 0,
            f"latency_ms={self.latency_ms}: use a number above 0.",
        )
        for name in ("latency_batch_size", "max_kernel", "latency_repeats"):
            value = getattr(self, name)
            require(value >= 1, f"{name}={value}: use a whole number of 1 or more.")
        require(self.tune_steps >= 0, f"tune_steps={self.tune_steps}: use a whole number of 0 or more.")
        require(
            self.choose != "magnitude" or (self.importance == "loss" and not self.tune_steps),
            f"choose='magnitude' with importance={self.importance!r} and tune_steps={self.tune_steps}: it compares "
            "weights and measures no loss; leave them out.",
        )
