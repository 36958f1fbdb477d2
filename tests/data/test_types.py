"""Image sets: pixels, the hold-out split, channel statistics, resizing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from advmoe.data import Dataset, ImageSet
from advmoe.data.types import channel_statistics, drawn, resize, split


def image_set(labels: list[int]) -> ImageSet:
    """A set whose image i has the value i in its only pixel (modulo 256) and the index in full in three channels."""
    index = torch.arange(len(labels))
    images = torch.stack([index % 256, index // 256, index * 0], dim=1).to(torch.uint8)[:, :, None, None]
    return ImageSet(images, torch.tensor(labels, dtype=torch.int64))


def indices(data: ImageSet) -> list[int]:
    values = data.images[:, :, 0, 0].to(torch.int64)
    return (values[:, 0] + 256 * values[:, 1]).tolist()


def test_pixels_are_float_in_unit_range() -> None:
    data = ImageSet(torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1), torch.zeros(3, dtype=torch.int64))
    got = data.pixels(torch.tensor([2, 1]))
    assert got.dtype == torch.float32
    assert got.flatten().tolist() == [1.0, pytest.approx(0.2)]
    assert torch.equal(data.pixels(slice(1, 3)), data.pixels(torch.tensor([1, 2])))
    assert torch.equal(data.images.flatten(), torch.tensor([0, 51, 255], dtype=torch.uint8))
    assert len(data) == 3
    assert len(data.to("cpu")) == 3


def test_every_grey_level_round_trips() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1)
    pixels = ImageSet(images, torch.zeros(256, dtype=torch.int64)).pixels(slice(None))
    assert torch.equal((pixels * 255).round().to(torch.uint8), images)


def test_wrong_types_are_named() -> None:
    with pytest.raises(ValueError, match=r"images must be uint8 of shape \(N, C, H, W\), got torch.float32"):
        ImageSet(torch.zeros(1, 1, 2, 2), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"labels must be int64 of shape \(2,\), got torch.int64 of shape \(3,\)"):
        ImageSet(torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64))


def test_dataset_properties() -> None:
    part = ImageSet(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64))
    data = Dataset("x", part, part, part, ("a", "b", "c", "d"), (0.0,) * 3, (1.0,) * 3, True)
    assert (data.num_classes, data.image_size, data.in_channels) == (4, 8, 3)


def test_split_shares_by_hand() -> None:
    # 10 of class 0, 6 of class 1, 4 of class 2; a quarter of 20 is 5: shares 2.5, 1.5, 1.0. Floors take 2, 1, 1; the
    # one that is left goes to the largest remainder, where 0 and 1 tie and the first class wins.
    train, val = split(image_set([0] * 10 + [1] * 6 + [2] * 4), 0.25, seed=0)
    assert torch.bincount(val.labels).tolist() == [3, 1, 1]
    assert torch.bincount(train.labels).tolist() == [7, 5, 3]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 5), min_size=2, max_size=300),
    st.floats(0.0, 0.5),
    st.integers(0, 2**31),
)
def test_split_is_a_stratified_partition(labels: list[int], fraction: float, seed: int) -> None:
    labels = labels + sorted(set(labels))  # at least two of each class
    data = image_set(labels)
    train, val = split(data, fraction, seed)
    assert sorted(indices(train) + indices(val)) == list(range(len(labels)))
    assert indices(train) == sorted(indices(train))
    assert train.labels.tolist() == [labels[i] for i in indices(train)]
    assert val.labels.tolist() == [labels[i] for i in indices(val)]
    assert set(train.labels.tolist()) == set(labels)
    if fraction == 0:
        assert len(val) == 0
        assert val.images.shape[1:] == data.images.shape[1:]
    else:
        total = max(1, round(fraction * len(labels)))
        assert len(val) == total
        shares = torch.bincount(data.labels).double() * total / len(labels)
        assert (torch.bincount(val.labels, minlength=len(shares)) - shares).abs().max() < 1 + 1e-9


def test_split_follows_seed() -> None:
    data = image_set([0, 1] * 100)
    first, again, other = (indices(split(data, 0.1, seed)[1]) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_split_never_takes_the_last_of_a_class() -> None:
    train, val = split(image_set([0, 1, 1]), 0.5, seed=0)
    assert sorted(train.labels.tolist()) == [0, 1]
    assert val.labels.tolist() == [1]
    with pytest.raises(ValueError, match=r"^data.val_fraction must be 0 when every class has a single image, got 0.5$"):
        split(image_set([0, 1, 2]), 0.5, seed=0)


@pytest.mark.parametrize("fraction", [-0.1, 0.6, float("nan")])
def test_split_names_a_wrong_fraction(fraction: float) -> None:
    with pytest.raises(ValueError, match=rf"^data.val_fraction must be >= 0 and <= 0.5, got {fraction}$"):
        split(image_set([0, 0]), fraction, seed=0)


def test_drawn_subsets_are_random_nested_and_in_order() -> None:
    data = image_set([0] * 500 + [1] * 100)
    assert drawn(data, None) is data
    few, more, every = (indices(drawn(data, examples)) for examples in (60, 300, 600))
    assert (len(few), len(more), every) == (60, 300, list(range(600)))
    assert few == sorted(few) and set(few) < set(more) and few != list(range(60))
    # As drawn at random: about a sixth of class 1, six standard deviations of slack (hypergeometric, n = 300).
    assert abs(int(drawn(data, 300).labels.sum()) - 50) < 6 * (300 / 6 * 5 / 6 * 300 / 599) ** 0.5
    assert indices(drawn(data, 60)) == few


@pytest.mark.parametrize("examples", [1, 0, -1, 3, 2.0, True])
def test_drawn_names_a_wrong_number(examples: int) -> None:
    with pytest.raises(ValueError) as error:
        drawn(image_set([0, 0]), examples)
    assert str(error.value) == (
        f"data.train_examples must be a whole number >= 2 and <= the 2 training images, got {examples!r}"
    )


def test_statistics_by_hand() -> None:
    # Channel 0: 0, 0, 255, 255, so mean 1/2 and deviation 1/2. Channel 1: 51 everywhere, so 1/5, and the floor 1/255.
    images = torch.tensor([[[[0, 255]], [[51, 51]]], [[[255, 0]], [[51, 51]]]], dtype=torch.uint8)
    mean, std = channel_statistics(images)
    assert mean == pytest.approx((0.5, 0.2), rel=1e-15)
    assert std == (0.5, 1 / 255)


def test_statistics_agree_with_direct_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randint(256, (23, 3, 5, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("advmoe.data.types._CHUNK", 100)  # several chunks, the last one not full
    mean, std = channel_statistics(images)
    direct = images.double() / 255
    assert mean == pytest.approx(direct.mean(dim=(0, 2, 3)).tolist(), rel=1e-12)
    assert std == pytest.approx(direct.std(dim=(0, 2, 3), correction=0).tolist(), rel=1e-12)


def test_resize_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    # Weights sum to one, at the borders too: a constant stays.
    images = torch.full((7, 1, 4, 4), 77, dtype=torch.uint8)
    assert resize(images, None) is images
    assert resize(images, 4) is images
    monkeypatch.setattr("advmoe.data.types._CHUNK", 40)
    assert torch.equal(resize(images, 2), torch.full((7, 1, 2, 2), 77, dtype=torch.uint8))
    # Doubling 0, 100 samples at -1/4, 1/4, 3/4 and 5/4 of the way from one to the other, clamped at the ends.
    pair = torch.tensor([[0, 100], [0, 100]], dtype=torch.uint8)[None, None]
    assert resize(pair, 4)[0, 0].tolist() == [[0, 25, 75, 100]] * 4
