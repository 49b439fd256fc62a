"""Changes of a block's weights that leave its function unchanged: the order of units and heads, rotations of heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..math.align import Rows, Turns, rotation
from .architectures.base import Block
from .architectures.block_weights import HEAD_NORMS, POSITIONS, rows_of, write_rows


def turns_of(block: Block, rows: Rows) -> Turns:
    """Rotations of a block's heads that do not change its function.

    Args:
        block: Attention, MLP or convolutional block.
        rows: Role -> rows, (groups, heads in a group, width of a head, features), see `rows_of`.

    Returns:
        Roles that rotate together -> allowed rotations.
    """
    if block.kind == "mlp":  # a nonlinearity acts on each unit separately
        return {tuple(rows): "none"}
    if block.kind == "conv":
        return {("in", "out"): "none"}
    # Rotating both q and k preserves q . k. A norm in between has one gain per coordinate, which does not commute with
    # rotations. Rotary positions rotate each frequency pair, which commutes with rotations of the same pair.
    normed = any(role in block.modules for role in HEAD_NORMS)
    scored = ("q", "k", *(role for role in POSITIONS if role in rows))
    return {scored: "none" if normed else block.heads.turn, ("v", "out"): "any"}


def is_bound(block: Block) -> bool:
    """Whether the heads of a block keep their places, because each has its own position bias."""
    return block.heads is not None and block.heads.bound


def disguise(root: nn.Module, block: Block, generator: torch.Generator) -> None:
    """Change the weights of a block in place, at random, so that it computes the same.

    Units, groups of heads and the heads of a group change places unless they are bound, and every group is rotated. If
    the outputs of a model change, the table of its architecture is wrong.

    Args:
        root: Module that the block's paths are relative to.
        block: Block with the role `out`.
        generator: Random generator, on the CPU.

    Raises:
        UnsupportedModelError: See `rows_of`.
    """
    rows = rows_of(root, block)
    groups, heads, dim, _ = rows["out"].shape
    if not is_bound(block):
        order = torch.randperm(groups, generator=generator)
        inner = torch.stack([torch.randperm(heads, generator=generator) for _ in range(groups)])
        rows = {
            role: values[order] if values.shape[1] == 1 else values[order[:, None], inner]
            for role, values in rows.items()
        }
    for roles, turn in turns_of(block, rows).items():
        if turn != "none":
            noise = torch.randn(groups, dim, dim, generator=generator, dtype=torch.float64)
            turned = rotation(noise, turn).to(rows["out"].device)
            rows |= {role: _turned(turned, rows[role]) for role in roles}
    write_rows(root, block, rows)


def _turned(turned: Tensor, rows: Tensor) -> Tensor:
    """Rotate the coordinates of heads: rotations (groups, dim, dim), rows (groups, heads, dim, features)."""
    return torch.einsum("gde,gief->gidf", turned, rows)
