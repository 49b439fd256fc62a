"""How a model is to be made smaller."""

from typing import Literal

from .strict import require, require_one, strict_recipe

TARGETS = ("keep_layers", "ratio", "max_parameters", "max_bytes", "latency_budget", "latency_ms")
"""The fields of `FusionRecipe` that say how small or how fast the result is to be; a recipe has one of them."""


@strict_recipe
class FusionRecipe:
    """How a model is to be made smaller.

    Give exactly one target: `keep_layers`, the number of blocks (of the kind `blocks`) that stay distinct; `ratio`, the
    share of their parameters to remove, met as closely as whole blocks allow; or `max_parameters` or `max_bytes`, which
    the whole model may have, so that as many blocks stay distinct as fit; or `latency_budget` or `latency_ms`, which
    the result may take, so that for each block of a transformer it is chosen what becomes of it: it stays, it is
    dropped, an MLP becomes linear, or a run of layers becomes one.

    Attributes:
        keep_layers: distinct blocks after fusion, from 1 to one less than the model has.
        ratio: share of block parameters to remove, 0 < ratio < 1.
        max_parameters: most parameters of the result, embeddings and head included, shared ones counted once.
        max_bytes: most bytes of its weights on disk, in the dtype of the model; the header of the file comes on top.
        latency_budget: 0 < latency_budget < 1, the share of the original's latency, on the device that it is on, that
            the result may have. Needs batches, of the length of those that the model will see.
        latency_ms: milliseconds of a forward pass, in the place of that share.
        mode: `depth` runs a fused block once (smaller and faster); `share` lets one set of weights serve every
            depth of its group (smaller on disk and in memory, not faster); `basis` lets the depths of a group combine
            one shared basis of `rank` vectors (the same).
        rank: of the residual that each depth adds to a shared matrix (`share`), or size of the basis (`basis`). With
            `auto`, all layers of a shape share one set of weights, and the rank is the largest that meets the target:
            a few more numbers for each depth do more than a few more sets.
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
        choose: with a latency target: `all` that can become of blocks, or `runs` of layers that become one, and nothing
            else.
        latency_batch_size: sequences of the forward pass that is timed.
        latency_repeats: timed rounds.
        tables: with a latency target, folder where measured latencies and losses are kept, so that another budget, or a
            run that was interrupted, has them; None keeps them in memory.
        effort: how much is tried on calibration batches: `low` is the heuristic choice and one refit (at most about 6
            forward passes of the original over the batches), `medium` also compares groups and operators (25), `high`
            also the plans next to the best one. With a latency target, `low` is one program over losses of single
            choices; `medium` judges choices anew on top of what was chosen, twice, and `high` up to six times.
        seed: seed of everything that is drawn.

    Raises:
        RecipeError: unknown field, wrong type, or a combination that cannot be met.
    """

    keep_layers: int | None = None
    ratio: float | None = None
    max_parameters: float | None = None
    max_bytes: float | None = None
    latency_budget: float | None = None
    latency_ms: float | None = None
    mode: Literal["depth", "share", "basis"] = "depth"
    rank: int | Literal["auto"] = 0
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
    choose: Literal["all", "runs"] = "all"
    latency_batch_size: int = 1
    latency_repeats: int = 10
    tables: str | None = None
    effort: Literal["low", "medium", "high"] = "medium"
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
            f"mode='depth' with cluster={self.cluster!r} would merge layers that are far apart and run the result "
            "once, in the place of neither: use cluster='auto' or 'adjacent', or mode='share'.",
        )
        require(
            not (self.operator == "select" and (self.mode != "depth" or self.refit != "full")),
            f"operator='select' chooses hidden units while a block is refitted, to run once: it needs mode='depth' and "
            f"refit='full', not mode={self.mode!r} and refit={self.refit!r}.",
        )
        require(
            self.rank != "auto" or self.keep_layers is None,
            f"rank='auto' follows from how small the result is to be, and keep_layers={self.keep_layers} does not say "
            "that: give ratio, max_parameters or max_bytes, or a rank.",
        )
        require(self.rank == "auto" or self.rank >= 0, f"rank={self.rank}: use 'auto', or a whole number of 0 or more.")
        require(
            not (self.mode == "depth" and self.rank),
            f"rank={self.rank} with mode='depth', where nothing is shared: leave it out, or use mode='share'.",
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
            f"latency_budget={self.latency_budget} is no share of the original's latency to keep: use a number between "
            "0 and 1.",
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
                f"{' and '.join(given)} is of a latency target: use latency_budget or latency_ms, or leave it out.",
            )
            return
        require(self.mode == "depth", f"mode={self.mode!r} makes nothing faster: with a latency target, use 'depth'.")
        given = [
            f"{name}={getattr(self, name)!r}"
            for name in ("blocks", "similarity", "cluster")
            if getattr(self, name) != getattr(type(self), name)
        ]
        require(
            not given,
            f"{' and '.join(given)}: with a latency target, blocks are chosen by what they take and by what they are "
            "worth; leave it out.",
        )
        require(
            self.refit != "linear",
            "refit='linear' fits no MLP that has become linear: with a latency target, use 'full' or 'none'.",
        )
