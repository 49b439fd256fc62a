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
            convolutions (Kim et al. 2023), `convolutions` takes some out and merges none.
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
    choose: Literal["all", "activations", "convolutions"] = "all"
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
