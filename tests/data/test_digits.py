"""The digits: which they are, and which of them train, validate and test."""

import pytest
import torch
from sklearn.datasets import load_digits

from advmoe.data import load_dataset
from advmoe.data.types import channel_statistics


def test_digits_are_the_known_ones() -> None:
    data = load_dataset("digits", val_fraction=0.1, seed=3)
    assert data.name == "digits"
    assert data.classes == tuple("0123456789")
    assert not data.flip
    assert (data.num_classes, data.image_size, data.in_channels) == (10, 8, 1)
    # Every fifth of each class: 178, 182, 177, 183, 181, 182, 181, 179, 174, 180 digits give 35, 36, 35, 36, ...
    assert torch.bincount(data.test.labels).tolist() == [35, 36, 35, 36, 36, 36, 36, 35, 34, 36]
    assert len(data.train) + len(data.val) + len(data.test) == 1797
    assert len(data.val) == round(0.1 * 1442)
    # The first test image of class 0 is the fifth zero; 16 grey levels become 0..255.
    bunch = load_digits()
    fifth = bunch.images[(bunch.target == 0).nonzero()[0][4]]
    first = data.test.images[int((data.test.labels == 0).nonzero()[0])]
    assert torch.equal(first[0].double(), torch.from_numpy(fifth * 255 / 16).round())
    assert data.train.images.max() == 255


def test_digits_test_set_does_not_depend_on_seed() -> None:
    one, two = (load_dataset("digits", seed=seed) for seed in (0, 1))
    assert torch.equal(one.test.images, two.test.images)
    assert not torch.equal(one.val.images, two.val.images)


def test_digits_resized() -> None:
    data = load_dataset("digits", image_size=16, val_fraction=0)
    assert data.train.images.shape == (1442, 1, 16, 16)
    assert len(data.val) == 0
    # Interpolation keeps the mean, up to what clamping at the border moves.
    assert data.mean[0] == pytest.approx(load_dataset("digits", val_fraction=0).mean[0], abs=0.01)


def test_part_of_the_digits_is_the_same_for_every_seed() -> None:
    one, two = (load_dataset("digits", train_examples=200, val_fraction=0.1, seed=seed) for seed in (0, 1))
    whole = load_dataset("digits", val_fraction=0)
    used = [{image.numpy().tobytes() for part in (d.train, d.val) for image in part.images} for d in (one, two)]
    assert used[0] == used[1] and used[0] < {image.numpy().tobytes() for image in whole.train.images}
    assert (len(one.train), len(one.val)) == (180, 20)
    assert not torch.equal(one.val.images, two.val.images)  # the hold-out follows the seed
    assert torch.equal(one.test.images, whole.test.images)
    assert one.mean == channel_statistics(one.train.images)[0] != whole.mean
    with pytest.raises(ValueError, match=r"^data.train_examples must be .* <= the 1442 training images, got 1443$"):
        load_dataset("digits", train_examples=1443)
