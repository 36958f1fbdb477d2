"""What every data set promises: a new entry of the table is tested by being there, with a layout in helpers/layouts.py.

Axes: `N` images, `C` channels, `H W` size.
"""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from layouts import LAYOUTS
from torch import Tensor

from advmoe.data import Dataset, FileSet, ImageSet, Variation, load_dataset
from advmoe.data.digits import load_digits
from advmoe.data.types import Request, Source
from advmoe.errors import InputError
from advmoe.tables import DATASETS, DataSet

PARTS = ("train", "val", "test")


@dataclass(frozen=True)
class Case:
    """A data set by name, and a folder that holds it."""

    name: str
    root: Path

    def load(self, *, image_size: int | None = 12, val_fraction: float = 0.2, seed: int = 0) -> Dataset:
        settings = {"image_size": image_size, "val_fraction": val_fraction, "seed": seed}
        return load_dataset(self.name, root=self.root, workers=0, **settings)

    def files(self) -> list[Path]:
        """Every file, relative to the folder, but for what a load has left there."""
        inside = [path.relative_to(self.root) for path in sorted(self.root.rglob("*")) if path.is_file()]
        return [path for path in inside if not path.parts[0].startswith(".")]

    def copy(self, root: Path, *, reverse: bool = False) -> "Case":
        """The same files elsewhere, written in another order if wanted."""
        for path in reversed(self.files()) if reverse else self.files():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.root / path, root / path)
        return replace(self, root=root)


@pytest.fixture
def make_case(tmp_path, monkeypatch):
    """Lays out the data set of a name."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def make(name: str) -> Case:
        assert name in LAYOUTS, f"tests/helpers/layouts.py must lay out {name}"
        (tmp_path / "data").mkdir()
        LAYOUTS[name](tmp_path / "data", monkeypatch)
        return Case(name, tmp_path / "data")

    return make


def pixels(data: Dataset) -> dict[str, Tensor]:
    """All images of each part, (N, C, H, W) in [0, 1]."""
    return {part: getattr(data, part).pixels(slice(None)) for part in PARTS}


def assert_same(one: Dataset, other: Dataset, parts: tuple[str, ...] = PARTS) -> None:
    images, others = pixels(one), pixels(other)
    for part in parts:
        assert torch.equal(images[part], others[part]), part
        assert torch.equal(getattr(one, part).labels, getattr(other, part).labels), part
    assert one.classes == other.classes
    if parts == PARTS:
        assert (one.mean, one.std, one.flip, one.notes) == (other.mean, other.std, other.flip, other.notes)


# The checks: each takes a case, and raises AssertionError where it breaks the promise.


def shapes_and_ranges_are_as_said(case: Case, tmp_path: Path) -> None:
    """Square images of the size asked for, fp32 in [0, 1], each with a class."""
    data = case.load()
    assert isinstance(data.train, FileSet if DATASETS[case.name].streamed else ImageSet)
    for part, images in pixels(data).items():
        labels = getattr(data, part).labels
        assert len(images) == len(labels) == len(getattr(data, part)) > 0
        assert images.shape[1:] == (data.in_channels, 12, 12) == getattr(data, part).shape
        assert images.dtype == torch.float32 and 0 <= images.min() <= images.max() <= 1
        assert labels.dtype == torch.int64 and 0 <= labels.min() <= labels.max() < data.num_classes
    assert data.image_size == 12
    assert len(set(data.classes)) == data.num_classes >= 2 and len(data.train.labels.unique()) >= 2
    for numbers in (data.mean, data.std):
        assert len(numbers) == data.in_channels and all(0 <= number <= 1 for number in numbers)
    assert min(data.std) >= 1 / 255


def batches_are_the_pixels(case: Case, tmp_path: Path) -> None:
    """A batch holds the bytes of the images asked for, in that order; what a variation does follows from its seed."""
    data = case.load()
    order = torch.arange(len(data.train) - 1, -1, -1)[:5]
    ((images, labels),) = data.train.batches([order])
    assert images.dtype == torch.uint8 and labels.equal(data.train.labels[order])
    torch.testing.assert_close(images / 255, data.train.pixels(order))

    def varied() -> Tensor:
        variation = Variation(torch.Generator().manual_seed(3), purpose=(3, "crops", 0), flip=data.flip)
        ((images, _),) = data.train.batches([order], variation)
        return images

    first = varied()
    assert first.dtype == torch.uint8 and first.shape == images.shape and first.equal(varied())


def loads_are_equal(case: Case, tmp_path: Path) -> None:
    """A second load gives the same, and so does a copy whose files were written in another order."""
    first = case.load()
    assert_same(first, case.load())
    assert_same(first, case.copy(tmp_path / "copy", reverse=True).load())


def the_seed_decides_what_is_held_out(case: Case, tmp_path: Path) -> None:
    """Another seed holds out other images of the same training set, and leaves the test set alone."""
    first, whole = case.load(), case.load(val_fraction=0)
    assert len(whole.val) == 0 and len(whole.train) == len(first.train) + len(first.val)
    every = sorted(image.numpy().tobytes() for image in pixels(whole)["train"])
    held = set()
    for seed in range(6):
        data = case.load(seed=seed)
        assert_same(first, data, parts=("test",))
        images = pixels(data)
        assert sorted(image.numpy().tobytes() for part in ("train", "val") for image in images[part]) == every
        held.add(images["val"].numpy().tobytes())
    assert len(held) > 1


def damage_is_refused_in_one_line(case: Case, tmp_path: Path) -> None:
    """Files that are empty, cut or other bytes raise `InputError` if they hold images, and no other error if text."""
    for path in case.files():
        content = (case.root / path).read_bytes()
        for number, damaged in enumerate((b"", content[: len(content) // 2], bytes(range(256)))):
            other = case.copy(tmp_path / f"{number}" / path)
            (other.root / path).write_bytes(damaged)
            try:
                pixels(other.load())
            except InputError as error:
                assert "\n" not in str(error) and str(error)
            except Exception as error:
                raise AssertionError(f"{path} {damaged[:8]!r} must be an InputError, got {error!r}") from error
            else:
                assert path.suffix == ".txt", f"{path} {damaged[:8]!r} is not noticed"


CHECKS = [
    shapes_and_ranges_are_as_said,
    batches_are_the_pixels,
    loads_are_equal,
    the_seed_decides_what_is_held_out,
    damage_is_refused_in_one_line,
]


@pytest.mark.parametrize("name", DATASETS)
@pytest.mark.parametrize("check", CHECKS)
def test_every_entry(check, name, make_case, tmp_path):
    check(make_case(name), tmp_path)


# Faults, which are caught


def in_any_order(request: Request) -> Source:
    """A fault: images come in another order at each load."""
    source = load_digits(request)
    return replace(source, train=source.train.subset(torch.randperm(len(source.train))))


def misnumbered(request: Request) -> Source:
    """A fault: classes are counted from 1."""
    source = load_digits(request)
    return replace(source, test=ImageSet(source.test.images, source.test.labels + 1))


def careless(request: Request) -> Source:
    """A fault: whatever a file holds is taken."""
    (request.root / "images.bin").read_bytes()
    return load_digits(request)


def frail(request: Request) -> Source:
    """A fault: a damaged file raises whatever comes."""
    assert (request.root / "images.bin").read_bytes() == b"images"
    return load_digits(request)


@pytest.mark.parametrize(
    ("reader", "check"),
    [
        (in_any_order, loads_are_equal),
        (misnumbered, shapes_and_ranges_are_as_said),
        (careless, damage_is_refused_in_one_line),
        (frail, damage_is_refused_in_one_line),
    ],
)
def test_a_reader_with_a_fault_is_caught(reader, check, make_case, tmp_path, monkeypatch):
    monkeypatch.setitem(DATASETS, "planted", DataSet(reader, "Planted"))
    monkeypatch.setitem(LAYOUTS, "planted", lambda root, _: (root / "images.bin").write_bytes(b"images"))
    with pytest.raises(AssertionError):
        check(make_case("planted"), tmp_path)
