"""Mergeable runs of convolutions and their possible kernels (LayerMerge, Kim et al. 2024, section 3.2)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations

Kept = tuple[int, ...]
"""Convolutions of a segment that stay, by ascending index in the conv graph."""


@dataclass(frozen=True)
class ConvNode:
    """One convolution of a conv graph, with the batch norm after it.

    Attributes:
        kernel: Height and width of the kernel.
        stride: Stride in both directions.
        in_channels: Number of input channels.
        out_channels: Number of output channels.
        depthwise: Whether it treats each channel separately.
        norm: Sum of the absolute values of its weights. Among removable convolutions, those of largest norm stay.
    """

    kernel: int
    stride: int
    in_channels: int
    out_channels: int
    depthwise: bool = False
    norm: float = 0.0

    @property
    def fixed(self) -> bool:
        """Whether it cannot be removed, because it changes the shape."""
        return self.in_channels != self.out_channels or self.stride > 1


@dataclass(frozen=True, order=True)
class Merged:
    """A possible kernel of a merged segment.

    Attributes:
        kernel: Kernel size K = k_1 + sum_l (k_l - 1) prod_{m < l} s_m over the convolutions that stay.
        depthwise: Whether all of these convolutions are depthwise.
    """

    kernel: int
    depthwise: bool


@dataclass(frozen=True)
class ConvGraph:
    """The convolutions of a network from input to output, without those in shortcuts.

    Boundary l follows convolution l, its norm, the sum of a skip that ends there, and its activation. Segment (i, j]
    contains convolutions i + 1 to j. Convolution 0 belongs to no segment.

    Attributes:
        nodes: Convolutions 0 to L.
        skips: Pairs (s, e), each from boundary s to the sum at boundary e.
        barriers: Boundaries that a segment must not cross, such as one with a pooling.
    """

    nodes: Sequence[ConvNode]
    skips: Collection[tuple[int, int]] = ()
    barriers: Collection[int] = field(default_factory=frozenset)

    @property
    def length(self) -> int:
        """Index of the last boundary, L."""
        return len(self.nodes) - 1

    def segments(self) -> list[tuple[int, int]]:
        """Every (i, j) whose convolutions can become one.

        Such a segment has no barrier inside, and no kernel larger than 1 after a stride of 2 or more. It neither
        starts before a skip and ends inside the skip, nor starts inside a skip and ends after it.
        """
        return [pair for pair in combinations(range(len(self.nodes)), 2) if self._merges(*pair)]

    def _merges(self, i: int, j: int) -> bool:
        strides = [place for place in range(i + 1, j + 1) if self.nodes[place].stride > 1]
        return not (
            any(i < barrier < j for barrier in self.barriers)
            or any(i < s < j < e or s < i < e < j for s, e in self.skips)
            or (strides and any(self.nodes[place].kernel > 1 for place in range(strides[0] + 1, j + 1)))
        )

    def kernels(self, i: int, j: int) -> dict[Merged, Kept]:
        """Possible kernels of segment (i, j], each with the convolutions that stay for it, at least one.

        Convolutions that change the shape always stay. The choice among the others maximises the number of kernels of
        size 1 first, then the sum of the norms. A dynamic program over (kernel so far, depthwise so far) finds it; it
        is exact for kernels of all sizes.
        """
        reached: dict[Merged, tuple[tuple[int, float], Kept]] = {Merged(1, True): ((0, 0.0), ())}
        scale = 1
        for place in range(i + 1, j + 1):
            node, after = self.nodes[place], {}
            for merged, (score, kept) in reached.items():
                ways = [] if node.fixed else [(merged, score, kept)]
                larger = Merged(merged.kernel + (node.kernel - 1) * scale, merged.depthwise and node.depthwise)
                small = not node.fixed and node.kernel == 1
                ways.append((larger, (score[0] + small, score[1] + node.norm * (not small)), (*kept, place)))
                for found, value, who in ways:
                    if found not in after or value > after[found][0]:
                        after[found] = value, who
            reached, scale = after, scale * node.stride
        return {merged: kept for merged, (_, kept) in sorted(reached.items()) if kept}

    def table(self) -> Iterator[tuple[int, int, Merged, Kept]]:
        """Yield every entry: a segment (i, j), a kernel for it, and the convolutions that stay."""
        for i, j in self.segments():
            for merged, kept in self.kernels(i, j).items():
                yield i, j, merged, kept
