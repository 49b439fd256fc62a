"""Which MLPs of a model are to become linear."""

from typing import Literal

from .strict import require, require_one, strict_recipe

COLLAPSE_TARGETS = ("count", "ratio", "max_parameters", "max_bytes", "max_loss")
"""The fields of `CollapseRecipe` that say how far it is to go; a recipe has one of them."""


@strict_recipe
class CollapseRecipe:
    """Which MLPs of a model are to become linear maps, and how (LayerCollapse, Shabgahi et al. 2023).

    Give exactly one target: `count`, how many MLPs; `ratio`, the share of all block parameters to remove, or
    `max_parameters` or `max_bytes`, which the whole model may have: as many MLPs as that takes; or `max_loss`, how far
    the model may move from the original: as many MLPs as that allows.

    Attributes:
        count: MLPs that become linear, from 1 to the number of layers.
        ratio: share of block parameters to remove, at least, 0 < ratio < 1.
        max_parameters: most parameters of the result, embeddings and head included.
        max_bytes: most bytes of its weights on disk, in the dtype of the model; the header of the file comes on top.
        max_loss: most calibration loss of the result, without any training: the mean divergence from the original's
            predictions in nats, or without logits, the relative squared error of its hidden states.
        order: `measured` takes first what costs least: the calibration loss when an MLP alone is linear in the
            untouched model, for each parameter that is saved (needs batches). `deepest` starts at the last layer.
        rank: of the linear maps, which are then the product of two; None is one full map.
        fold: the linear maps take in the residual sum behind them: BERT and RoBERTa, where a norm follows it.
        method: `fitted` puts linear maps in the place of MLPs at once, fitted in closed form. `homotopy` leads their
            activations to lines while the model is trained (`heal.straighten`, `heal.progressive`), and then merges the
            two maps of each, which is exact. Not for gated MLPs.
        faithful: of `homotopy`: PReLU in the place of whatever the activation is, as published. Without it, each unit
            goes to the line that is nearest to its activation on calibration batches.
        threshold: of `homotopy`: 1 - a of an activation that counts as a line; one that is further from it is refused.
        merge: of `homotopy`: put one map in the place of two in the end. Without it, what remains is a regulariser: a
            model with activations between what they were and lines.
        refit: of `fitted`: closed-form repair on calibration batches. `full` fits the linear maps and repairs all
            blocks behind the first of them; `maps` fits the linear maps alone; `none`, or no batches, leaves
            W2 (W1 x + b1) + b2.

    Raises:
        RecipeError: unknown field, wrong type, or a combination that cannot be met.
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
            f"method='homotopy' with max_loss={self.max_loss} and rank={self.rank}: what it costs is known when it is "
            "trained, and its maps are what training leads to: use count or a size, and no rank.",
        )
        require(
            self.method == "homotopy" or (self.merge and not self.faithful and self.threshold == 0.05),
            f"merge={self.merge}, faithful={self.faithful} and threshold={self.threshold} are about activations that "
            "are trained, and the method is 'fitted': use method='homotopy', or leave them out.",
        )
        require(
            not self.fold or (self.rank is None and self.merge),
            f"fold=True with rank={self.rank} and merge={self.merge}: one full map takes the sum in; leave them out.",
        )
        for name in ("max_parameters", "max_bytes", "max_loss"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name}={value}: use a number above 0.")
