"""Recipe section `collapse`: the MLPs to replace by linear maps."""

from typing import Literal

from .strict import require, require_one, strict_recipe

COLLAPSE_TARGETS = ("count", "ratio", "max_parameters", "max_bytes", "max_loss")
"""Targets of `CollapseRecipe`: a recipe sets exactly one of these fields."""


@strict_recipe
class CollapseRecipe:
    """Settings of a collapse, which makes MLPs linear (LayerCollapse, Shabgahi et al. 2023).

    Give exactly one target. `count` is the number of MLPs. `ratio` is the share of all block parameters to remove;
    `max_parameters` and `max_bytes` limit the size of the whole model: each linearises as few MLPs as possible.
    `max_loss` limits the divergence from the original: as many MLPs as it allows become linear.

    Attributes:
        count: Number of MLPs that become linear, from 1 to the number of layers.
        ratio: Minimum share of block parameters to remove, 0 < ratio < 1.
        max_parameters: Maximum number of parameters of the result, with embeddings and head.
        max_bytes: Maximum size of the weights on disk in bytes, in the dtype of the model, without the file header.
        max_loss: Maximum calibration loss of the result, without any training: the mean divergence from the original's
            predictions in nats, or, without logits, the relative squared error of its hidden states.
        order: Order in which MLPs become linear. `measured` starts with the cheapest: the one with the lowest
            calibration loss per saved parameter when it alone is linear in the untouched model (needs batches).
            `deepest` starts at the last layer.
        rank: Rank of the linear maps, each a product of two maps; None is one full map.
        fold: Whether the linear maps include the residual sum after them, for BERT and RoBERTa, where a norm follows
            the sum.
        method: Way to make MLPs linear. `fitted` replaces MLPs at once by maps fitted in closed form. `homotopy` turns
            their activations into lines during training (`heal.homotopy_strength`, `heal.progressive`), and then merges
            the two maps of each MLP, which is exact. Not for gated MLPs.
        faithful: Whether `homotopy` starts from PReLU instead of the model's activation, as published. Otherwise, each
            unit moves to the line that is nearest to its activation on calibration batches.
        threshold: Largest distance 1 - a at which `homotopy` treats an activation as a line; more is an error.
        merge: Whether `homotopy` replaces the two maps by one at the end. Otherwise it is a regulariser: activations of
            the result lie between the original ones and lines.
        refit: Closed-form repair on calibration batches, with `fitted`. `full` fits the linear maps and repairs all
            blocks after the first of them; `maps` fits only the linear maps; `none`, or no batches, leaves
            W2 (W1 x + b1) + b2.
        stack: Stack of layers whose MLPs become linear, as in `FusionRecipe`.

    Raises:
        RecipeError: A field is unknown or has the wrong type, or a combination is not possible.
    """

    count: int | None = None
    ratio: float | None = None
    max_parameters: float | None = None
    max_bytes: float | None = None
    max_loss: float | None = None
    order: Literal["measured", "deepest"] = "measured"
    rank: int | None = None
    fold: bool = False
    method: Literal["fitted", "homotopy"] = "fitted"
    faithful: bool = False
    threshold: float = 0.05
    merge: bool = True
    refit: Literal["full", "maps", "none"] = "full"
    stack: str | None = None

    def __post_init__(self) -> None:
        require_one(
            self,
            COLLAPSE_TARGETS,
            "count (for example 4), ratio (0.2), max_parameters (8e7), max_bytes (2e8) or max_loss (0.05)",
        )
        for name in ("count", "rank"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name}={value}: use a whole number of 1 or more.")
        require(
            self.ratio is None or 0 < self.ratio < 1,
            f"ratio={self.ratio} is not a share of the parameters to remove: use a number between 0 and 1.",
        )
        require(0 < self.threshold < 1, f"threshold={self.threshold}: use a number between 0 and 1, such as 0.05.")
        require(
            self.method == "fitted" or (self.max_loss is None and self.rank is None),
            f"method='homotopy' with max_loss={self.max_loss} and rank={self.rank}: its loss and maps are known only "
            "after training: use count or a size, and no rank.",
        )
        require(
            self.method == "homotopy" or (self.merge and not self.faithful and self.threshold == 0.05),
            f"merge={self.merge}, faithful={self.faithful} and threshold={self.threshold} need method='homotopy', and "
            "the method is 'fitted': use 'homotopy', or leave them out.",
        )
        require(
            not self.fold or (self.rank is None and self.merge),
            f"fold=True with rank={self.rank} and merge={self.merge}: only one full map can include the residual "
            "sum; leave them out.",
        )
        for name in ("max_parameters", "max_bytes", "max_loss"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name}={value}: use a number above 0.")
