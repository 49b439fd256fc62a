"""Recipe section `fusion`: the target size or latency, and how layers are fused to reach it."""

from typing import Literal

from .strict import require, require_one, strict_recipe

TARGETS = ("keep_layers", "ratio", "max_parameters", "max_bytes", "latency_budget", "latency_ms")
"""Targets of `FusionRecipe`: a recipe sets exactly one of these fields."""


@strict_recipe
class FusionRecipe:
    """Settings of a fusion.

    Give exactly one target. `keep_layers` is the number of blocks (of the kind `blocks`) that stay distinct. `ratio` is
    the share of their parameters to remove, met as closely as whole blocks allow. `max_parameters` and `max_bytes`
    limit the size of the whole model; as many blocks as fit stay distinct. `latency_budget` and `latency_ms` limit the
    latency of the result: each block of a transformer is then kept, dropped, linearised (MLPs), or fused with its
    neighbours (runs of layers).

    Attributes:
        keep_layers: Number of distinct blocks after fusion, from 1 to one less than the model has.
        ratio: Share of block parameters to remove, 0 < ratio < 1.
        max_parameters: Maximum number of parameters of the result, with embeddings and head; shared ones count once.
        max_bytes: Maximum size of the weights on disk in bytes, in the dtype of the model, without the file header.
        latency_budget: Share of the original's latency that the result may have on the model's current device,
            0 < latency_budget < 1. Needs batches as long as those that the model will see.
        latency_ms: Maximum latency of a forward pass in milliseconds, instead of `latency_budget`.
        mode: Form of a fused block. `depth` runs it once (smaller and faster). `share` uses one set of weights at every
            depth of its group (smaller on disk and in memory, not faster). `basis` combines one shared basis of `rank`
            vectors at every depth of its group (also smaller, not faster).
        rank: Rank of the residual that each depth adds to a shared matrix (`share`), or size of the basis (`basis`).
            With `auto`, all layers of one shape share one set of weights, and the rank is the largest that meets the
            target: a few more numbers per depth help more than a few more sets of weights.
        blocks: Blocks to fuse: whole layers (`layer`), only their `attention`, `cross` (cross-attention) or `mlp`
            blocks, or all kinds in separate groups, with the same number of blocks (`separate`).
        similarity: Distance between blocks. `euclidean`, `cosine`, `covariance`, `kl` and `wasserstein` compare
            weights; `cka`, `cka_unbiased`, `angular` and `block_influence` compare activations on calibration
            `batches`.
        cluster: Grouping of blocks. `auto` groups neighbours so that the sum of the groups' calibration losses is
            minimal, within `effort`; without batches it uses `adjacent`. `adjacent` groups neighbours with minimal
            distance inside the groups. `global` connects the closest pairs of any blocks, and `agglomerative` merges
            the groups that are closest on average; neither works in `depth` mode.
        operator: Method that combines the weights of a group. `auto` compares the others on calibration loss; without
            batches it is `freeze`, or, for shared weights, `mean` with align `rotation`. `select` builds a layer from
            the heads and hidden units of the whole group that the refit finds most useful (`depth` mode, with batches;
            attention that is fused alone keeps the group's first layer). `freeze` keeps one layer: the one nearest the
            group's middle, the later of two. `mean` averages; `weighted` averages by how much each layer changes the
            residual stream. `mix` takes each element from a random layer. `telescope` adds all differences to the
            first layer (LaCo, eq. 1).
        align: Symmetry that is undone before weights are combined: the order of MLP units and heads, found from the
            weights (`permutation`), from `activation`s on batches, or by optimal `transport` (needs the extra
            `transport`); or that order and a `rotation` of each head.
        refit: Closed-form repair on calibration batches. `full` refits all maps of the repaired blocks. `linear` refits
            one map of the last block before removed ones (ReplaceMe). `none`, or no batches, skips the repair.
        choose: Edits allowed with a latency target: `all`, or only `runs` of layers that become one.
        latency_batch_size: Number of sequences in the timed forward pass.
        latency_repeats: Number of timed rounds.
        tables: Folder that keeps measured latencies and losses for a latency target. Another budget, or an interrupted
            run, reuses them; None keeps them in memory.
        effort: Amount of search on calibration batches. `low` is the heuristic choice and one refit (at most about 6
            forward passes of the original over the batches); `medium` also compares groups and operators (25); `high`
            also compares the plans next to the best one. With a latency target, `low` solves one program over the
            losses of single edits; `medium` scores edits again on top of the chosen ones, twice, and `high` up to six
            times.
        stack: Stack of layers to fuse, in models that have several: `encoder` or `decoder`, `text` or `vision`. None is
            the first one that the architecture names.
        seed: Seed of all random choices.

    Raises:
        RecipeError: A field is unknown or has the wrong type, or a combination is not possible.
    """

    keep_layers: int | None = None
    ratio: float | None = None
    max_parameters: float | None = None
    max_bytes: float | None = None
    latency_budget: float | None = None
    latency_ms: float | None = None
    mode: Literal["depth", "share", "basis"] = "depth"
    rank: int | Literal["auto"] = 0
    blocks: Literal["layer", "attention", "cross", "mlp", "separate"] = "layer"
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
    choose: Literal["all", "runs"] = "all"
    latency_batch_size: int = 1
    latency_repeats: int = 10
    tables: str | None = None
    effort: Literal["low", "medium", "high"] = "medium"
    stack: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        require_one(
            self,
            TARGETS,
            "keep_layers (for example 8), ratio (0.5), max_parameters (8e7), max_bytes (2e8), latency_budget (0.6) or "
            "latency_ms",
        )
        self._check_latency()
        require(
            self.keep_layers is None or self.keep_layers >= 1,
            f"keep_layers={self.keep_layers} leaves no layer: use 1 or more.",
        )
        require(
            self.ratio is None or 0 < self.ratio < 1,
            f"ratio={self.ratio} is not a share of the parameters to remove: use a number between 0 and 1.",
        )
        for name in ("max_parameters", "max_bytes"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name}={value} leaves no model: use a number above 0, such as 8e7.")
        require(
            not (self.mode == "depth" and self.cluster not in ("auto", "adjacent")),
            f"mode='depth' with cluster={self.cluster!r} would merge distant layers into one that runs in the place of "
            "neither: use cluster='auto' or 'adjacent', or mode='share'.",
        )
        require(
            not (self.operator == "select" and (self.mode != "depth" or self.refit != "full")),
            f"operator='select' chooses hidden units while it refits a block that runs once: it needs mode='depth' and "
            f"refit='full', not mode={self.mode!r} and refit={self.refit!r}.",
        )
        require(
            self.rank != "auto" or self.keep_layers is None,
            f"rank='auto' follows from the size of the result, which keep_layers={self.keep_layers} does not set: "
            "give ratio, max_parameters or max_bytes, or a rank.",
        )
        require(self.rank == "auto" or self.rank >= 0, f"rank={self.rank}: use 'auto', or a whole number of 0 or more.")
        require(
            not (self.mode == "depth" and self.rank),
            f"rank={self.rank} with mode='depth', which shares no weights: leave it out, or use mode='share'.",
        )
        require(
            self.mode != "basis" or self.rank != 0,
            "mode='basis' needs rank, the number of basis vectors: a quarter of the model's width, for example.",
        )

    @property
    def is_timed(self) -> bool:
        """Whether the target is a latency."""
        return self.latency_budget is not None or self.latency_ms is not None

    def _check_latency(self) -> None:
        require(
            self.latency_budget is None or 0 < self.latency_budget < 1,
            f"latency_budget={self.latency_budget} must be between 0 and 1: it is the share of the original's latency "
            "to keep.",
        )
        require(self.latency_ms is None or self.latency_ms > 0, f"latency_ms={self.latency_ms}: use a number above 0.")
        for name in ("latency_batch_size", "latency_repeats"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)}: use a whole number of 1 or more.")
        if not self.is_timed:
            given = [
                f"{name}={getattr(self, name)!r}"
                for name in ("choose", "latency_batch_size", "latency_repeats", "tables")
                if getattr(self, name) != getattr(type(self), name)
            ]
            require(
                not given,
                f"{' and '.join(given)} needs a latency target: use latency_budget or latency_ms, or leave it out.",
            )
            return
        require(
            self.mode == "depth",
            f"mode={self.mode!r} does not make the model faster: with a latency target, use 'depth'.",
        )
        given = [
            f"{name}={getattr(self, name)!r}"
            for name in ("blocks", "similarity", "cluster")
            if getattr(self, name) != getattr(type(self), name)
        ]
        require(
            not given,
            f"{' and '.join(given)}: with a latency target, measured latency and loss choose the blocks; leave it out.",
        )
        require(
            self.refit != "linear",
            "refit='linear' cannot fit linear MLPs: with a latency target, use 'full' or 'none'.",
        )
