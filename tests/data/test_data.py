"""`load_dataset`: the arguments that it checks itself, and what it makes of what a reader returns."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from advmoe.data import ImageSet, load_dataset
from advmoe.data.types import Request, Source
from advmoe.tables import DATASETS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"name": "mnist"},
            "data.name must be one of digits, cifar10, cifar100, folder, tiny-imagenet, imagenet, got 'mnist'",
        ),
        ({"image_size": 0}, "data.image_size must be a whole number >= 1, got 0"),
        ({"image_size": 8.0}, "data.image_size must be a whole number >= 1, got 8.0"),
        ({"val_fraction": 1.0}, "data.val_fraction must be >= 0 and <= 0.5, got 1.0"),
        ({"val_fraction": "0.1"}, "data.val_fraction must be >= 0 and <= 0.5, got '0.1'"),
        ({"root": 5}, "data.root must be a path, got 5"),
        ({"train_examples": "9"}, "data.train_examples must be a whole number >= 2, got '9'"),
        ({"workers": -1}, "data.workers must be a whole number >= 0, got -1"),
        ({"seed": 0.5}, "seed must be a whole number >= 0, got 0.5"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError) as error:
        load_dataset(**({"name": "digits"} | arguments))  # type: ignore[arg-type]
    assert str(error.value) == message


def images(number: int, value: int) -> ImageSet:
    """Grey images of one value, of two classes in turn."""
    return ImageSet(torch.full((number, 1, 4, 4), value, dtype=torch.uint8), torch.arange(number) % 2)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Request]]:
    """Has `digits` read as the given source; returns the requests that its reader gets."""

    def put(**changes: object) -> list[Request]:
        asked: list[Request] = []
        source = replace(Source(images(10, 51), images(4, 255), ("a", "b"), flip=True), **changes)  # type: ignore[arg-type]
        entry = replace(DATASETS["digits"], reader=lambda request: asked.append(request) or source)
        monkeypatch.setitem(DATASETS, "digits", entry)
        return asked

    return put


def test_a_reader_is_asked_for_what_the_caller_wants(read: Callable[..., list[Request]]) -> None:
    asked = read()
    load_dataset("digits", root="~/images", download=True, image_size=4, workers=3)
    assert asked == [Request(root=Path.home() / "images", download=True, image_size=4, workers=3)]


def test_statistics_are_those_of_what_trains_unless_the_reader_knows_them(read: Callable[..., list[Request]]) -> None:
    read()
    data = load_dataset("digits", val_fraction=0.2)
    assert (len(data.train), len(data.val), len(data.test)) == (8, 2, 4)
    assert data.mean == pytest.approx((51 / 255,)) and data.std == (1 / 255,)  # one value: the least deviation
    assert (data.classes, data.flip, data.notes) == (("a", "b"), True, ())
    read(statistics=((0.5,), (0.25,)))
    data = load_dataset("digits")
    assert (data.mean, data.std) == ((0.5,), (0.25,))


def test_what_a_reader_leaves_out_is_told_and_kept(
    read: Callable[..., list[Request]], capsys: pytest.CaptureFixture[str]
) -> None:
    read(notes=("two files left out",), classes=("a\n", "b"))
    data = load_dataset("digits")
    assert capsys.readouterr() == ("", "note  two files left out\n")
    assert data.notes == ("two files left out",)
    assert all("\n" not in name for name in data.classes)  # a name is shown on one line
