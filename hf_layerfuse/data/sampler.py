"""The order in which training rows are read."""

from collections.abc import Sequence

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler


class ByLength(LengthGroupedSampler):
    """Random batches of rows about as long as each other, so that little of them is padding.

    Batches next to each other are of one length too: several processes then wait little for each other. An order
    depends on the seed and the epoch alone, in every process and after an interruption.

    Args:
        lengths: of all rows, in tokens.
        batch_size: rows per batch.
        seed: of the order.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        super().__init__(batch_size, lengths=list(lengths), generator=torch.Generator())
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.generator.manual_seed(self.seed + epoch)
