"""The JPEG copy of CIFAR-10."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from advmoe.data import ImageSet, copies, load_dataset
from advmoe.data.types import Request, Source
from advmoe.errors import InputError


@pytest.fixture
def archive(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Put an archive of so many training images and four test images, of one grey each, in place of CIFAR-10."""

    def put(number: int) -> None:
        def load(request: Request) -> Source:
            levels = torch.arange(number + 4, dtype=torch.uint8)
            images = levels[:, None, None, None].expand(-1, 3, 32, 32)
            labels = torch.arange(number + 4) % 2
            parts = ImageSet(images[:number], labels[:number]), ImageSet(images[number:], labels[number:])
            return Source(train=parts[0], test=parts[1], classes=("cat", "dog"), flip=True)

        monkeypatch.setattr(copies, "load_cifar10", load)

    return put


def test_the_copy_is_a_folder_that_loads(archive: Callable[[int], None], tmp_path: Path) -> None:
    archive(6)
    folder = copies.write_cifar10_jpeg(tmp_path)
    assert folder == tmp_path / "cifar10-jpeg"
    assert sorted(each.relative_to(folder).as_posix() for each in folder.rglob("*.jpg"))[:3] == [
        "test/cat/0000.jpg", "test/cat/0001.jpg", "test/dog/0000.jpg",
    ]  # fmt: skip
    with Image.open(folder / "train" / "dog" / "0002.jpg") as image:
        assert (image.format, image.size) == ("JPEG", (32, 32))
    data = load_dataset("folder", root=folder, val_fraction=0)
    # One grey survives JPEG: 0, 2, 4 are cats, 1, 3, 5 dogs.
    assert data.train.images[:, 0, 5, 5].tolist() == [0, 2, 4, 1, 3, 5]
    assert data.test.images[:, 0, 5, 5].tolist() == [6, 8, 7, 9]
    assert [each.name for each in tmp_path.iterdir()] == ["cifar10-jpeg"]


def test_a_copy_that_fails_leaves_nothing(
    archive: Callable[[int], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive(6)
    (tmp_path / ".cifar10-jpeg.partial" / "train" / "old").mkdir(parents=True)  # of one that was killed

    def fail(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="No space"):
        copies.write_cifar10_jpeg(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_copy_is_not_written_over(archive: Callable[[int], None], tmp_path: Path) -> None:
    archive(6)
    (tmp_path / "cifar10-jpeg").mkdir()
    with pytest.raises(InputError, match=r"data\.root must not hold cifar10-jpeg yet"):
        copies.write_cifar10_jpeg(tmp_path)


def test_who_misses_the_copy_is_told_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        load_dataset("folder", root=tmp_path / "cifar10-jpeg")
    assert f"advmoe data cifar10-jpeg --root {tmp_path}" in str(error.value)
