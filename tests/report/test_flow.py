"""Bands of a flow diagram, by hand: where they leave and arrive, and that nothing gets lost on the way."""

import math
from itertools import pairwise

import pytest
from drawings import FLOWS, marks, words
from hypothesis import given, settings
from hypothesis import strategies as st

from advmoe.report.flow import FEW, THIN, Band, bands, flow_figure

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


def test_a_flow(tmp_path):
    flow_figure({**FLOWS, "adversarial": FLOWS["clean"]}, tmp_path / "a.svg", title="Flow of images")
    text = words(tmp_path / "a.svg")
    assert {"clean", "adversarial", "MoE layer", "Flow of images", "0", "1"} <= set(text)
    # In each panel blue nodes and bands: two nodes of expert 0, and what leaves the first of them.
    assert marks(tmp_path / "a.svg", "fill", "#0072b2") == 2 * (2 + 2)


def test_a_flow_through_many_experts(tmp_path):
    even = {"load": [[1 / 8] * 8] * 5, "flows": [[[1 / 64] * 8] * 8] * 4}
    flow_figure({"clean": even}, tmp_path / "a.svg")
    # 64 flows of 1.6 % would be lost in one another: 8 grey bands lead into a bundle, and 8 out of it.
    assert marks(tmp_path / "a.svg", "fill", "#595959") == 4 * 16
    flow_figure({"clean": even}, tmp_path / "b.svg", thin=0.01)
    assert marks(tmp_path / "b.svg", "fill", "#595959") == 0


@pytest.mark.parametrize(
    "panels, message",
    [
        ({}, "panels must hold something to draw, got none"),
        ({"a": {"load": [], "flows": []}}, "flows of 'a' must be 0 x 0 x 0"),
        ({"a": {"load": [[1.0]] * 2, "flows": []}}, "flows of 'a' must be 1 x 1 x 1, as its load is, got 0"),
        ({"a": {"load": [[1.0]] * 2, "flows": [[[1, 0]]]}}, r"must be 1 x 1 x 1, .* got 1 x \[\(1, 2\)\]"),
    ],
)
def test_panels_that_are_none(tmp_path, panels, message):
    with pytest.raises(ValueError, match=message):
        flow_figure(panels, tmp_path / "a.svg")
    assert not list(tmp_path.iterdir())
