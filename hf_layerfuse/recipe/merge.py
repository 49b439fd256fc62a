"""Which convolutions of a model are to become one."""

from typing import Literal

from .strict import require, require_one, strict_recipe

MERGE_TARGETS = ("budget", "budget_ms")
"""The fields of `MergeRecipe` that say how far it is to go; a recipe has one of them."""


@strict_recipe
class MergeRecipe:
    """Which segments of convolutions are to become one, and how (LayerMerge, Kim et al. 2024).

    Give exactly one target: `budget`, the share of the original's latency that the result may have, or `budget_ms`.

    Attributes:
        budget: 0 < budget < 1, of the latency of the original on the device that it is on.
        budget_ms: milliseconds of a forward pass.
        batch_size: images of the pass that is timed.
        choose: `all` removes activations and convolutions. The others are baselines: `activations` keeps all
            convolutions (Kim et al. 2023), `convolutions` takes some out and merges none, and so does `magnitude`,
            those of the smallest weights and not those of the least loss.
        importance: what the sum of is made the most of: `loss`, the calibration loss that a segment costs, or its
            exponential, exp(-loss), as `published`, in which a segment that ruins the model is not much worse than one
            that harms it.
        tune_steps: steps of training on the calibration images, before the loss of a segment is taken on the others,
            for each of them. As published, and slow: some hundred segments are trained. With 0, a closed-form fit is
            all that they get.
        max_kernel: largest kernel of a merged convolution.
        method: `fitted` merges at once, and fits each merged convolution in closed form. `open` takes activations and
            convolutions out, and merges after `heal`, as published.
        refit: of `fitted`: `none` leaves merged convolutions as they are composed.
        repeats: timed rounds of each shape of convolution.
        tables: folder where measured latencies and losses are kept, so that another budget, or a run that was
            interrupted, has them; None keeps them in memory.

    Raises:
        RecipeError: unknown field, wrong type, or a combination that cannot be met.
    """

    budget: float | None = None
    budget_ms: float | None = None
    batch_size: int = 8
    choose: Literal["all", "activations", "convolutions", "magnitude"] = "all"
    importance: Literal["loss", "published"] = "loss"
    tune_steps: int = 0
    max_kernel: int = 7
    method: Literal["fitted", "open"] = "fitted"
    refit: Literal["full", "none"] = "full"
    repeats: int = 30
    tables: str | None = None

    def __post_init__(self) -> None:
        require_one(
            self,
            MERGE_TARGETS,
            "budget (for example 0.6, of the original's latency) or budget_ms",
        )
        require(
            self.budget is None or 0 < self.budget < 1,
            f"budget={self.budget} is no share of the original's latency to keep: use a number between 0 and 1.",
        )
        require(
            self.budget_ms is None or self.budget_ms > 0,
            f"budget_ms={self.budget_ms}: use a number above 0.",
        )
        for name in ("batch_size", "max_kernel", "repeats"):
            value = getattr(self, name)
            require(value >= 1, f"{name}={value}: use a whole number of 1 or more.")
        require(self.tune_steps >= 0, f"tune_steps={self.tune_steps}: use a whole number of 0 or more.")
        require(
            self.choose != "magnitude" or (self.importance == "loss" and not self.tune_steps),
            f"choose='magnitude' with importance={self.importance!r} and tune_steps={self.tune_steps}: it goes by "
            "weights, and measures no loss; leave them out.",
        )
