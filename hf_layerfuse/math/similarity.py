"""Distances between blocks, from their weights or from the activations they lead to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Weights = Sequence[Mapping[str, Tensor]]


def euclidean(blocks: Weights) -> Tensor:
    """||W_i - W_j|| over all weight matrices of a block together, each compared with its namesake.

    Args:
        blocks: per block, role -> weight; the same roles and shapes in every block.

    Returns:
        (blocks, blocks) float64, symmetric, zero diagonal.
    """
    # cdist's fast path subtracts squares, which leaves noise where blocks are equal
    squares = [_pairwise(_rows(blocks, role)) ** 2 for role in blocks[0]]
    return torch.stack(squares).sum(0).sqrt()


def cosine(blocks: Weights) -> Tensor:
    """1 - cos(vec W_i, vec W_j), averaged over the weight matrices of a block, each compared with its namesake.

    Args:
        blocks: per block, role -> weight; the same roles and shapes in every block.

    Returns:
        (blocks, blocks) float64 in [0, 2], symmetric, zero diagonal.
    """
    return torch.stack([_cosine_distance(_rows(blocks, role)) for role in blocks[0]]).mean(0)


def cka(states: Tensor) -> Tensor:
    """1 - linear centred kernel alignment of activations (Kornblith et al. 2019, eq. 3).

    Args:
        states: (blocks, tokens, hidden), the same tokens for every block.

    Returns:
        (blocks, blocks) float64 in [0, 1], symmetric, zero diagonal.
    """
    centred = states.double() - states.double().mean(1, keepdim=True)
    count, tokens, hidden = centred.shape
    # ||X^T Y||_F^2 = <X X^T, Y Y^T>: the smaller of the two Gram matrices does
    if tokens <= hidden:
        grams = (centred @ centred.transpose(1, 2)).reshape(count, -1)
        alignment = grams @ grams.T
    else:
        alignment = torch.empty(count, count, dtype=torch.float64, device=states.device)
        for i in range(count):
            for j in range(i, count):
                alignment[i, j] = alignment[j, i] = (centred[i].T @ centred[j]).square().sum()
    return _from_gram(alignment)


def block_influence(states: Tensor) -> Tensor:
    """1 - E cos(h_i, h_j) of the residual stream after each of two blocks.

    For neighbours this is the block influence of the later one (ShortGPT, Men et al. 2024, eq. 1).

    Args:
        states: (blocks, tokens, hidden), the residual stream after each block, the same tokens for every block.

    Returns:
        (blocks, blocks) float64 in [0, 2], symmetric, zero diagonal.
    """
    unit = torch.nn.functional.normalize(states.double(), dim=-1)
    flat = unit.reshape(len(unit), -1)
    return _zero_diagonal(1 - flat @ flat.T / states.shape[1])


def _rows(blocks: Weights, role: str) -> Tensor:
    return torch.stack([block[role].detach().double().flatten() for block in blocks])


def _pairwise(rows: Tensor) -> Tensor:
    return torch.stack([torch.linalg.vector_norm(rows - row, dim=1) for row in rows])


def _cosine_distance(rows: Tensor) -> Tensor:
    return _from_gram(rows @ rows.T)


def _from_gram(gram: Tensor) -> Tensor:
    norm = gram.diagonal().clamp_min(torch.finfo(gram.dtype).tiny).sqrt()
    return _zero_diagonal(1 - gram / torch.outer(norm, norm))


def _zero_diagonal(distance: Tensor) -> Tensor:
    return distance.clamp_min(0).fill_diagonal_(0)
