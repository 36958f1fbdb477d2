"""Bands of a flow diagram, by hand: where they leave and arrive, and that nothing gets lost on the way."""

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from advmoe.report.flow import FEW, THIN, Band, bands

ENDS = (0.1, 1.0)
GAP = 0.025


def test_bands_by_hand():
    flows = [[0.5, 0.25], [0.0, 0.25]]
    drawn = list(bands([0.75, 0.25], [0.5, 0.5], flows, ENDS))
    assert drawn == [
        Band(0.5, 0, 0, 0, *ENDS),
        Band(0.25, 0.5, 0.5 + GAP, 0, *ENDS),  # below what goes to expert 0, and under the first node and its gap
        Band(0.25, 0.75 + GAP, 0.75 + GAP, 1, *ENDS),  # below what arrives from expert 0
    ]


def test_a_few_thin_flows_stay_as_they_are():
    flows = [[0.97, 0.01], [0.01, 0.01]]
    drawn = list(bands([0.98, 0.02], [0.98, 0.02], flows, ENDS))
    assert [band.source for band in drawn] == [0, 0, 1, 1] and len(drawn) == FEW + 1


def test_many_thin_flows_run_through_a_bundle():
    rest = 1 - 4 * 0.01
    flows = [[rest, 0.01, 0.01], [0.01, 0, 0], [0.01, 0, 0]]
    load = [rest + 0.02, 0.01, 0.01]
    whole, *grey = bands(load, load, flows, ENDS)
    assert whole == Band(rest, 0, 0, 0, *ENDS)
    out, into = [band for band in grey if band.left == 0.1], [band for band in grey if band.right == 1.0]
    assert {band.source for band in grey} == {None} and len(out) == len(into) == 3
    for one, other in zip(out, into, strict=True):
        assert one.share == other.share and one.right == other.left == 0.55
    # They leave below the band that is drawn, and meet without a gap, at the mean height of both sides.
    assert [band.start for band in out] == pytest.approx([rest, rest + 0.02 + GAP, rest + 0.03 + 2 * GAP])
    centre = (0.02 * (rest + 0.01) + 0.01 * (rest + 0.025 + GAP) + 0.01 * (rest + 0.035 + 2 * GAP)) / 0.04
    assert [band.end for band in out] == pytest.approx([centre - 0.02, centre, centre + 0.01])
    assert [band.start for band in into] == pytest.approx([band.end for band in out])


@st.composite
def layers(draw):
    """Flows between two layers of a few experts, which sum to 1, as images that are counted."""
    experts = draw(st.integers(1, 6))
    counts = draw(st.lists(st.integers(0, 40), min_size=experts**2, max_size=experts**2).filter(any))
    whole = sum(counts)
    return [[counts[i * experts + j] / whole for j in range(experts)] for i in range(experts)]


@settings(max_examples=80, deadline=None)
@given(layers())
def test_every_image_leaves_its_node_and_arrives_at_one(flows):
    experts = range(len(flows))
    load, following = [sum(row) for row in flows], [sum(column) for column in zip(*flows, strict=True)]
    drawn = list(bands(load, following, flows, ENDS))
    thin = [share for row in flows for share in row if 0 < share < THIN]
    assert len({band.source is None for band in drawn}) == 1 or len(thin) > FEW
    for shares, at, start in ((load, ENDS[0], lambda band: (band.left, band.start)),
                              (following, ENDS[1], lambda band: (band.right, band.end))):  # fmt: skip
        ends = sorted((start(band)[1], band.share) for band in drawn if start(band)[0] == at)
        assert math.fsum(share for _, share in ends) == pytest.approx(1)
        # Together the bands cover each node from its upper end to its lower one, once.
        tops = [sum(shares[:expert]) + GAP * expert for expert in experts]
        for top, share in zip(tops, shares, strict=True):
            inside = [(place, width) for place, width in ends if top - 1e-9 <= place < top + share - 1e-9]
            assert math.fsum(width for _, width in inside) == pytest.approx(share)
            for (place, width), (below, _) in pairwise(inside):
                assert place + width == pytest.approx(below)
