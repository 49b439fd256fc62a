# From hf_layerfuse 0.1.0; SPDX-License-Identifier: Apache-2.0
"""Which runs of convolutions can become one, and with which kernels (LayerMerge, Kim et al. 2024, section 3.2)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations

Kept = tuple[int, ...]
"""The convolutions of a segment that stay, by their places in the chain, ascending."""


@dataclass(frozen=True)
class Link:
    """One convolution of a chain, with the batch norm behind it.

    Attributes:
        kernel: its height and width.
        stride: down and right alike.
        ins: channels that it reads.
        outs: channels that it gives.
        depthwise: each channel by itself.
        norm: of its weights, sum of absolute values; of those that may go, the largest stay.
    """

    kernel: int
    stride: int
    ins: int
    outs: int
    depthwise: bool = False
    norm: float = 0.0

    @property
    def fixed(self) -> bool:
        """Whether nothing can stand in its place, since it changes the shape."""
        return self.ins != self.outs or self.stride > 1


@dataclass(frozen=True, order=True)
class Merged:
    """The kernel that a segment may get.

    Attributes:
        kernel: K = k_1 + sum_l (k_l - 1) prod_{m < l} s_m over the convolutions that stay.
        depthwise: whether all of them are.
    """

    kernel: int
    depthwise: bool


@dataclass(frozen=True)
class Chain:
    """The convolutions of a network from the input to the output, without those in shortcuts.

    Boundary l comes after convolution l, its norm, the sum of a skip that ends there, and its activation. Segment
    (i, j] is the convolutions i + 1 to j; convolution 0 is part of none.

    Attributes:
        links: 0 to L.
        skips: (s, e), from boundary s to the sum at boundary e.
        barriers: boundaries across which nothing is merged, such as one with a pooling.
    """

    links: Sequence[Link]
    skips: Collection[tuple[int, int]] = ()
    barriers: Collection[int] = field(default_factory=frozenset)

    @property
    def length(self) -> int:
        """The last boundary, L."""
        return len(self.links) - 1

    def segments(self) -> list[tuple[int, int]]:
        """Every (i, j) whose convolutions can become one.

        None has a barrier inside, or a convolution of more than one pixel behind one of stride 2 or more. None enters a
        skip and stops inside of it, or starts inside of one and leaves it.
        """
        return [pair for pair in combinations(range(len(self.links)), 2) if self._merges(*pair)]

    def _merges(self, i: int, j: int) -> bool:
        strides = [place for place in range(i + 1, j + 1) if self.links[place].stride > 1]
        return not (
            any(i < barrier < j for barrier in self.barriers)
            or any(i < s < j < e or s < i < e < j for s, e in self.skips)
            or (strides and any(self.links[place].kernel > 1 for place in range(strides[0] + 1, j + 1)))
        )

    def kernels(self, i: int, j: int) -> dict[Merged, Kept]:
        """What segment (i, j] can become, and the convolutions that stay for it, at least one.

        Those that change the shape stay; then as many of one pixel as the kernel allows; and then, of the others, those
        of the largest norms. That is a program over (kernel so far, depthwise so far), exact for kernels of all sizes.
        """
        reached: dict[Merged, tuple[tuple[int, float], Kept]] = {Merged(1, True): ((0, 0.0), ())}
        scale = 1
        for place in range(i + 1, j + 1):
            link, after = self.links[place], {}
            for merged, (worth, kept) in reached.items():
                ways = [] if link.fixed else [(merged, worth, kept)]
                larger = Merged(merged.kernel + (link.kernel - 1) * scale, merged.depthwise and link.depthwise)
                small = not link.fixed and link.kernel == 1
                ways.append((larger, (worth[0] + small, worth[1] + link.norm * (not small)), (*kept, place)))
                for found, value, who in ways:
                    if found not in after or value > after[found][0]:
                        after[found] = value, who
            reached, scale = after, scale * link.stride
        return {merged: kept for merged, (_, kept) in sorted(reached.items()) if kept}

    def table(self) -> Iterator[tuple[int, int, Merged, Kept]]:
        """Every entry: a segment, a kernel for it, and what stays."""
        for i, j in self.segments():
            for merged, kept in self.kernels(i, j).items():
                yield i, j, merged, kept
