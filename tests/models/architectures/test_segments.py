"""Segments and their kernels: the published counts, and every subset of short graphs."""

from itertools import chain, combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_layerfuse.models.architectures.segments import ConvGraph, ConvNode, Merged


def resnet34() -> ConvGraph:
    """ResNet-34. A pooling follows its stem, so the stem is never merged."""
    nodes, skips = [ConvNode(7, 2, 3, 64)], []
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for _ in range(blocks):
            start, ins = len(nodes) - 1, nodes[-1].out_channels
            nodes += [ConvNode(3, 1 + (ins != width), ins, width), ConvNode(3, 1, width, width)]
            skips.append((start, len(nodes) - 1))
    return ConvGraph(nodes, skips, barriers={0})


def mobilenet_v2() -> ConvGraph:
    """MobileNetV2 without its last convolution. No merge crosses the end of a block with a stride of 2."""
    nodes, skips, barriers = [ConvNode(3, 2, 3, 32), ConvNode(3, 1, 32, 32, True), ConvNode(1, 1, 32, 16)], [], set()
    for width, blocks, stride in ((24, 2, 2), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1)):
        for block in range(blocks):
            start, ins, step = len(nodes) - 1, nodes[-1].out_channels, stride if block == 0 else 1
            wide = 6 * ins
            nodes += [ConvNode(1, 1, ins, wide), ConvNode(3, step, wide, wide, True), ConvNode(1, 1, wide, width)]
            if block:
                skips.append((start, len(nodes) - 1))
            if step == 2:
                barriers.add(len(nodes) - 1)
    return ConvGraph(nodes, skips, barriers)


@pytest.mark.parametrize(("network", "segments", "entries"), [(resnet34, 62, 150), (mobilenet_v2, 171, 391)])
def test_published_networks_have_the_published_tables(network, segments, entries):
    found = network()
    assert len(found.segments()) == segments
    assert len(list(found.table())) == entries


def test_skips_and_barriers_and_strides_end_segments():
    """Segments of a hand-written graph with one skip, a stride and a barrier."""
    nodes = [ConvNode(3, 1, 4, 4)] * 3 + [ConvNode(3, 2, 4, 8), ConvNode(1, 1, 8, 8), ConvNode(3, 1, 8, 8)]
    inside = [(0, 1), (0, 3), (0, 4), (1, 2), (1, 3), (1, 4), (2, 3), (3, 4), (3, 5), (4, 5)]
    assert ConvGraph(nodes, skips=[(1, 3)]).segments() == inside
    assert ConvGraph(nodes[:3], barriers={1}).segments() == [(0, 1), (1, 2)]


@st.composite
def graphs(draw):
    """Up to seven convolutions of any kernel and stride, after one that always stays."""
    nodes = [ConvNode(1, 1, 4, 4)]
    for _ in range(draw(st.integers(1, 7))):
        ins, outs = nodes[-1].out_channels, draw(st.sampled_from([4, 4, 4, 8]))
        depthwise = ins == outs and draw(st.booleans())
        norm = draw(st.integers(1, 9)) / 8
        nodes.append(
            ConvNode(
                draw(st.sampled_from([1, 3, 3, 5])), draw(st.sampled_from([1, 1, 1, 2])), ins, outs, depthwise, norm
            )
        )
    return ConvGraph(nodes)


def of(network: ConvGraph, j: int, kept) -> Merged:
    """Kernel of convolutions 1 to j if only these stay."""
    kernel, scale = 1, 1
    for place in range(1, j + 1):
        node = network.nodes[place]
        kernel += (node.kernel - 1) * scale if place in kept else 0
        scale *= node.stride
    return Merged(kernel, all(network.nodes[place].depthwise for place in kept))


@settings(deadline=None, max_examples=150)
@given(graphs())
def test_kernels_are_those_of_all_subsets(network):
    """Every subset that keeps the shape-changing convolutions gives one of the kernels. Among subsets with the same
    kernel, the best is found: most 1 x 1 convolutions first, then the largest norms."""
    j, nodes = network.length, network.nodes
    places = range(1, j + 1)
    fixed = {place for place in places if nodes[place].fixed}

    def score(kept):
        small = [place for place in kept if nodes[place].kernel == 1 and not nodes[place].fixed]
        return len(small), sum(nodes[place].norm for place in kept if place not in small)

    best = {}
    for kept in chain.from_iterable(combinations(places, count) for count in range(1, j + 1)):
        if fixed <= set(kept):
            merged = of(network, j, kept)
            best[merged] = max(best.get(merged, (0, 0.0)), score(kept))
    found = network.kernels(0, j)
    assert list(found) == sorted(best)
    for merged, kept in found.items():
        assert of(network, j, kept) == merged
        assert fixed <= set(kept)
        assert score(kept) == pytest.approx(best[merged])
