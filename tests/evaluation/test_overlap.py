"""The IoU of pathways: by hand, and against sets of units written out."""

import json
from itertools import permutations, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from advmoe.evaluation.overlap import (
    class_overlap,
    iou,
    mean_of_others,
    read_masks,
    require_same_banks,
    units_of,
)
from advmoe.moe.layer import windows


def units(*layers):
    """Per layer, (rows of the bank, rows of each expert)."""
    tables = []
    for count, experts in layers:
        table = torch.zeros(len(experts), count, dtype=torch.bool)
        for expert, rows in enumerate(experts):
            table[expert, list(rows)] = True
        tables.append(table)
    return tables


# Two disjoint halves of 4 rows, then three overlapping pairs of 3.
UNITS = units((4, [(0, 1), (2, 3)]), (3, [(0, 1), (1, 2), (0, 2)]))
MASK = units((4, [(0, 2, 3)]), (3, [(1,)]))


def test_iou_by_hand():
    pathway = torch.tensor([[0, 0], [0, 0], [0, 0], [1, 2]])
    other = torch.tensor([[0, 0], [1, 0], [1, 1], [1, 0]])
    # 4 units each; shared: 2 + 2, 0 + 2, 0 + 1, 2 + 1.
    assert iou(pathway, other, UNITS, UNITS).tolist() == pytest.approx([1, 2 / 6, 1 / 7, 3 / 5])
    # With the mask, of 4 units: rows 0 of 0, 1; 2 and 3 of 2, 3; then 1 of 0, 1; nothing of 0, 2.
    zeros = torch.zeros(4, 2, dtype=torch.long)
    assert iou(pathway, zeros, UNITS, MASK).tolist() == pytest.approx([2 / 6, 2 / 6, 2 / 6, 2 / 6])
    assert iou(torch.tensor([[1, 0]]), zeros[:1], UNITS, MASK).tolist() == [3 / 5]


def test_tokens_are_units_of_their_own():
    pathway, other = torch.tensor([[[0, 1, 0], [0, 1, 2]]]), torch.tensor([[[0, 0, 0], [0, 1, 1]]])
    # Shared: layer 0 by token 2, 0, 2; layer 1 by token 2, 2, 1.
    assert iou(pathway, other, UNITS, UNITS).tolist() == [9 / (12 + 12 - 9)]
    flat = [UNITS[0]] * 3 + [UNITS[1]] * 3
    assert torch.equal(iou(pathway, other, UNITS, UNITS), iou(pathway.flatten(1), other.flatten(1), flat, flat))


def used(pathway, layers):
    return {(at, row) for at, (e, layer) in enumerate(zip(pathway, layers, strict=True)) for row in layer[e].nonzero()}


def plain_iou(one, two, ours, theirs):
    a, b = ({(at, int(row)) for at, row in used(*each)} for each in ((one, ours), (two, theirs)))
    return len(a & b) / len(a | b)


@st.composite
def models(draw):
    """Two models of the same banks."""
    both = [], []
    for _ in range(draw(st.integers(1, 3))):
        rows = draw(st.integers(2, 7))
        for layers in both:
            used = draw(st.integers(1, rows))
            layers.append((rows, windows(rows, used, draw(st.integers(1, 4)))))
    return [units(*layers) for layers in both]


def drawn(draw, layers, count):
    return torch.tensor([[draw(st.integers(0, len(layer) - 1)) for layer in layers] for _ in range(count)])


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_iou_is_that_of_the_sets(data):
    ours, theirs = data.draw(models())
    count = data.draw(st.integers(1, 6))
    pathway, other = (drawn(data.draw, layers, count) for layers in (ours, theirs))
    expected = [plain_iou(a, b, ours, theirs) for a, b in zip(pathway.tolist(), other.tolist(), strict=True)]
    assert iou(pathway, other, ours, theirs).tolist() == pytest.approx(expected)
    assert torch.equal(iou(pathway, other, ours, theirs), iou(other, pathway, theirs, ours))
    pairs = permutations(range(count), 2)
    values = [plain_iou(pathway[i].tolist(), other[j].tolist(), ours, theirs) for i, j in pairs]
    mean = mean_of_others(pathway, other, ours, theirs)
    assert mean is None if count == 1 else mean == pytest.approx(sum(values) / len(values))


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_classes_are_compared_pair_by_pair(data):
    ours, _ = data.draw(models())
    count = data.draw(st.integers(1, 7))
    pathway = drawn(data.draw, ours, count)
    labels = torch.tensor([data.draw(st.integers(0, 2)) for _ in range(count)])
    by_pair, within, between = {}, [], []
    for i, j in permutations(range(count), 2):
        value = plain_iou(pathway[i].tolist(), pathway[j].tolist(), ours, ours)
        by_pair.setdefault((int(labels[i]), int(labels[j])), []).append(value)
        (within if labels[i] == labels[j] else between).append(value)
    overlap = class_overlap(pathway, labels, ours, 4)
    for i, j in product(range(4), repeat=2):
        values = by_pair.get((i, j))
        assert overlap.means[i, j].isnan() if values is None else overlap.means[i, j] == pytest.approx(mean_of(values))
    assert overlap.within == (pytest.approx(mean_of(within)) if within else None)
    assert overlap.between == (pytest.approx(mean_of(between)) if between else None)


def mean_of(values):
    return sum(values) / len(values)


def test_pairs_in_parts_are_all_pairs(monkeypatch):
    generator = torch.Generator().manual_seed(3)
    pathway = torch.stack([torch.randint(0, len(layer), (50,), generator=generator) for layer in UNITS * 3], 1)
    labels = torch.randint(0, 3, (50,), generator=generator)
    whole = class_overlap(pathway, labels, UNITS * 3, 3)
    monkeypatch.setattr("advmoe.evaluation.overlap._PAIRS", 7)
    parts = class_overlap(pathway, labels, UNITS * 3, 3)
    assert torch.allclose(parts.means, whole.means, rtol=1e-12) and parts.within == pytest.approx(whole.within)


@pytest.mark.parametrize("experts", ["subset", "independent"])
def test_units_are_the_rows_of_the_layers(make_routed, experts):
    model = make_routed(num_experts=3, experts=experts)
    layers = units_of(model)
    assert len(layers) == 16  # of ResNet-18, all convolutions but the stem and the shortcuts
    # 8 channels in the first stage: three windows of half of them, from 0, 2 and 5; or 3 times 4 rows of their own.
    rows = {
        "subset": (8, [(0, 1, 2, 3), (2, 3, 4, 5), (0, 5, 6, 7)]),
        "independent": (12, [range(4), range(4, 8), range(8, 12)]),
    }[experts]
    assert torch.equal(layers[0], units(rows)[0])
    assert layers[-1].shape == (3, 96 if experts == "independent" else 64)


def test_a_plain_model_has_no_units():
    with pytest.raises(ValueError, match="model must have MoE layers, got Linear with none"):
        units_of(nn.Linear(2, 2))


def test_masks_are_read(tmp_path):
    content = {"layers": [{"layer": 0, "of": 4, "rows": [0, 2, 3]}, {"layer": 1, "of": 3, "rows": [1]}]}
    (tmp_path / "masks.json").write_text(json.dumps(content))
    masks = read_masks(tmp_path / "masks.json")
    assert all(torch.equal(one, two) for one, two in zip(masks, MASK, strict=True))


LAYER = {"layer": 0, "of": 4, "rows": [0, 2]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "must be a sparse run's masks in JSON, got FileNotFoundError"),
        ("{", "must be JSON, got: Expecting"),
        (b"\xff", "must be valid JSON, got: bytes that are not UTF-8"),
        ([], "must hold a JSON object, got a list"),
        ({}, "must hold the masks of 1 layer or more under layers, got None"),
        ({"layers": []}, r"must hold the masks of 1 layer or more under layers, got \[\]"),
        ({"layers": [LAYER, LAYER]}, "layer 1 must be .*got {'layer': 0"),
        ({"layers": [{**LAYER, "rows": []}]}, "layer 0 must be .*one at least"),
        ({"layers": [{**LAYER, "rows": [1, 1]}]}, "layer 0 must be .*none twice"),
        ({"layers": [{**LAYER, "rows": [4]}]}, "layer 0 must be .*among 0 ... C - 1"),
        ({"layers": [{**LAYER, "rows": [-1]}]}, "layer 0 must be "),
        ({"layers": [{**LAYER, "rows": [0.5]}]}, "layer 0 must be "),
        ({"layers": [{**LAYER, "rows": [[0]]}]}, "layer 0 must be "),
        ({"layers": [{**LAYER, "of": "4"}]}, "layer 0 must be "),
        ({"layers": [{**LAYER, "of": 10**15}]}, "layer 0 must be "),
        ({"layers": [{"layer": 0, "rows": [0]}]}, "layer 0 must be "),
        ({"layers": ["x" * 500]}, "layer 0 must be .*got 'x{79}\\.\\.\\.$"),
    ],
)
def test_what_are_no_masks(tmp_path, content, message):
    path = tmp_path / "masks.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode() if content == "{" else b"")
        if not isinstance(content, bytes | str):
            path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as caught:
        read_masks(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_other_banks_are_named():
    require_same_banks("against", UNITS, MASK)
    with pytest.raises(ValueError, match="against must have the run's 2 MoE layers, got 1"):
        require_same_banks("against", UNITS, MASK[:1])
    with pytest.raises(ValueError, match="against must have 3 rows in MoE layer 1, as the run has, got 4: backbone"):
        require_same_banks("against", UNITS, [MASK[0], MASK[0]])


def test_what_is_no_pathway_of_these_units():
    for shape in ((2,), (2, 3), (0, 2), (2, 2, 0), (2, 2, 2, 2)):
        with pytest.raises(ValueError, match=r"pathway must be \(N, L\) or \(N, L, T\), N >= 1, with the L = 2 layers"):
            iou(torch.zeros(shape).long(), torch.zeros(shape).long(), UNITS, UNITS)
    uneven = units((4, [(0, 1), (2,)]))
    with pytest.raises(ValueError, match=r"must use equally many rows, got \[1, 2\] in layer 0"):
        iou(torch.zeros(1, 1).long(), torch.zeros(1, 1).long(), uneven, uneven)
