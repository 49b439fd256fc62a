"""The order in which training rows are read."""

from collections.abc import Sequence

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler


class ByLength(LengthGroupedSampler):
    """Random batches of rows of similar length, with little padding.

    Neighbouring batches have similar lengths too, so that processes wait little for each other. The order depends only
    on the seed and the epoch, in every process and after an interruption.

    Args:
        lengths: Lengths of all rows in tokens.
        batch_size: Number of rows per batch.
        seed: Seed of the order.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        super().__init__(batch_size, lengths=list(lengths), generator=torch.Generator())
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.generator.manual_seed(self.seed + epoch)
