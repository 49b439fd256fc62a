"""Segments and their kernels: the published counts, and every subset of short chains."""

from itertools import chain, combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_layerfuse.models.architectures.segments import Chain, Link, Merged


def resnet34() -> Chain:
    """ResNet-34. A pooling follows its stem, so the stem is never merged."""
    links, skips = [Link(7, 2, 3, 64)], []
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for _ in range(blocks):
            start, ins = len(links) - 1, links[-1].outs
            links += [Link(3, 1 + (ins != width), ins, width), Link(3, 1, width, width)]
            skips.append((start, len(links) - 1))
    return Chain(links, skips, barriers={0})


def mobilenet_v2() -> Chain:
    """MobileNetV2 without its last convolution. No merge crosses the end of a block with a stride of 2."""
    links, skips, barriers = [Link(3, 2, 3, 32), Link(3, 1, 32, 32, True), Link(1, 1, 32, 16)], [], set()
    for width, blocks, stride in ((24, 2, 2), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1)):
        for block in range(blocks):
            start, ins, step = len(links) - 1, links[-1].outs, stride if block == 0 else 1
            wide = 6 * ins
            links += [Link(1, 1, ins, wide), Link(3, step, wide, wide, True), Link(1, 1, wide, width)]
            if block:
                skips.append((start, len(links) - 1))
            if step == 2:
                barriers.add(len(links) - 1)
    return Chain(links, skips, barriers)


@pytest.mark.parametrize(("network", "segments", "entries"), [(resnet34, 62, 150), (mobilenet_v2, 171, 391)])
def test_published_networks_have_the_published_tables(network, segments, entries):
    found = network()
    assert len(found.segments()) == segments
    assert len(list(found.table())) == entries


def test_skips_and_barriers_and_strides_end_segments():
    """Segments of a hand-written chain with one skip, a stride and a barrier."""
    links = [Link(3, 1, 4, 4)] * 3 + [Link(3, 2, 4, 8), Link(1, 1, 8, 8), Link(3, 1, 8, 8)]
    inside = [(0, 1), (0, 3), (0, 4), (1, 2), (1, 3), (1, 4), (2, 3), (3, 4), (3, 5), (4, 5)]
    assert Chain(links, skips=[(1, 3)]).segments() == inside
    assert Chain(links[:3], barriers={1}).segments() == [(0, 1), (1, 2)]


@st.composite
def chains(draw):
    """Up to seven convolutions of any kernel and stride, after one that always stays."""
    links = [Link(1, 1, 4, 4)]
    for _ in range(draw(st.integers(1, 7))):
        ins, outs = links[-1].outs, draw(st.sampled_from([4, 4, 4, 8]))
        depthwise = ins == outs and draw(st.booleans())
        norm = draw(st.integers(1, 9)) / 8
        links.append(
            Link(draw(st.sampled_from([1, 3, 3, 5])), draw(st.sampled_from([1, 1, 1, 2])), ins, outs, depthwise, norm)
        )
    return Chain(links)


def of(network: Chain, j: int, kept) -> Merged:
    """Kernel of convolutions 1 to j if only these stay."""
    kernel, scale = 1, 1
    for place in range(1, j + 1):
        link = network.links[place]
        kernel += (link.kernel - 1) * scale if place in kept else 0
        scale *= link.stride
    return Merged(kernel, all(network.links[place].depthwise for place in kept))


@settings(deadline=None, max_examples=150)
@given(chains())
def test_kernels_are_those_of_all_subsets(network):
    """Every subset that keeps the shape-changing convolutions gives one of the kernels. Among subsets with the same
    kernel, the best is found: most 1 x 1 convolutions first, then the largest norms."""
    j, links = network.length, network.links
    places = range(1, j + 1)
    fixed = {place for place in places if links[place].fixed}

    def worth(kept):
        small = [place for place in kept if links[place].kernel == 1 and not links[place].fixed]
        return len(small), sum(links[place].norm for place in kept if place not in small)

    best = {}
    for kept in chain.from_iterable(combinations(places, count) for count in range(1, j + 1)):
        if fixed <= set(kept):
            merged = of(network, j, kept)
            best[merged] = max(best.get(merged, (0, 0.0)), worth(kept))
    found = network.kernels(0, j)
    assert list(found) == sorted(best)
    for merged, kept in found.items():
        assert of(network, j, kept) == merged
        assert fixed <= set(kept)
        assert worth(kept) == pytest.approx(best[merged])
