"""Tiny ImageNet in its official layout, written here, and the real one at 32x32."""

import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from layouts import TINY_WNIDS as WNIDS
from layouts import lay_out_tiny_imagenet
from layouts import save_png as save

from advmoe.data import cache, load_dataset
from advmoe.decode import Bytes

ARCHIVE = Path(__file__).parents[2].parent / "shared" / "data" / "tiny-imagenet-32.tar.xz"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "tiny-imagenet-200"
    root.mkdir()
    lay_out_tiny_imagenet(root)
    return root


def message(root: Path) -> str:
    with pytest.raises(ValueError) as error:
        load_dataset("tiny-imagenet", root=root)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("inside", [True, False])
def test_classes_are_sorted_wnids_called_by_their_words(root: Path, inside: bool) -> None:
    data = load_dataset("tiny-imagenet", root=root if inside else root.parent, val_fraction=0)
    assert data.classes == ("cat, true cat", "dog")
    assert data.train.labels.tolist() == [0, 0, 1, 1]
    assert data.train.images[:, :2, 0, 0].tolist() == [[1, 0], [1, 1], [0, 0], [0, 1]]
    assert data.test.labels.tolist() == [0, 1, 0]
    assert data.test.images[:, :, 3, 3].tolist() == [[1, 0, 200], [0, 1, 200], [1, 2, 200]]
    assert (data.image_size, data.flip, len(data.val)) == (8, True, 0)


def test_any_size_and_resized(root: Path) -> None:
    for file in root.rglob("*.JPEG"):
        save(file, size=(64, 64))
    assert load_dataset("tiny-imagenet", root=root).image_size == 64
    assert load_dataset("tiny-imagenet", root=root, image_size=32).test.images.shape == (3, 3, 32, 32)


def test_second_use_decodes_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_dataset("tiny-imagenet", root=root)

    def refuse(path: Path, image_size: int | None) -> Bytes:
        raise AssertionError(path)

    monkeypatch.setattr(cache, "_decode", refuse)
    assert load_dataset("tiny-imagenet", root=root).train.images.tolist() == first.train.images.tolist()


DAMAGE: list[tuple[Callable[[Path], object], str]] = [
    (lambda root: (root / "wnids.txt").unlink(), "data.root must hold wnids.txt, got "),
    (lambda root: (root / "words.txt").unlink(), "data.root must hold words.txt, got "),
    (lambda root: (root / "words.txt").write_text("n01000000\tcat\n"), "words.txt with words for n02000000"),
    (
        lambda root: (root / "words.txt").write_bytes(b"n01000000\tch\xe2t\n"),
        "a readable words.txt, got UnicodeDecodeError",
    ),
    (lambda root: (root / "val" / "val_annotations.txt").unlink(), "must hold val/val_annotations.txt, got "),
    (
        lambda root: (root / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn03000000\n"),
        "val/val_annotations.txt with wnids of wnids.txt, got 'val_0.JPEG\\tn03000000'",
    ),
    (
        lambda root: (root / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn01000000\n"),
        "a line for each image, got none for 'val/images/val_1.JPEG'",
    ),
    (
        lambda root: (root / "val" / "images" / "val_1.JPEG").unlink(),
        "the images in val/val_annotations.txt, got no 'val_1.JPEG'",
    ),
    (
        lambda root: (root / "train" / WNIDS[0] / "images").rename(root / "train" / "x"),
        "at least one image in train/n02000000, got none",
    ),
    (
        lambda root: [file.unlink() for file in (root / "train" / WNIDS[0] / "images").iterdir()],
        "at least one image in train/n02000000, got none in ",
    ),
    (
        lambda root: (root / "wnids.txt").write_text("n01000000\nn02000000\nn01000000\n"),
        "wnids.txt with every wnid once, got 'n01000000' twice",
    ),
    (
        lambda root: (root / "val" / "val_annotations.txt").open("a").write("val_1.JPEG\tn01000000\n"),
        "val/val_annotations.txt with one class for each image, got two for 'val_1.JPEG'",
    ),
    (
        lambda root: save(root / "train" / "x.JPEG"),
        "images of train in folders that wnids.txt names, got 1 beside them",
    ),
    (
        lambda root: save(root / "val" / "n01000000" / "val_0.JPEG"),
        "every image of val once, got 'val/images/val_0.JPEG' and 'val/n01000000/val_0.JPEG'",
    ),
    (
        lambda root: (root / "val" / "images" / "val_2.JPEG").write_bytes(b"\x89PNG"),
        "images that can be decoded, got ",
    ),
]


@pytest.mark.parametrize(("damage", "expected"), DAMAGE, ids=[expected for _, expected in DAMAGE])
def test_what_is_missing_is_named(root: Path, damage: Callable[[Path], object], expected: str) -> None:
    damage(root)
    found = message(root)
    assert found.startswith("data.root must ") and expected in found


def test_a_root_that_is_no_folder_is_named(tmp_path: Path) -> None:
    assert message(tmp_path / "none") == f"data.root must be a folder, got {str(tmp_path / 'none')!r}"


def test_images_may_lie_where_scripts_that_sort_leave_them(root: Path) -> None:
    first = load_dataset("tiny-imagenet", root=root, val_fraction=0)
    assert first.notes == ()
    # `val` sorted in part, and one class of `train` without its folder `images`.
    for name in ("val_0.JPEG", "val_2.JPEG"):
        (root / "val" / "n01000000" / "images").mkdir(parents=True, exist_ok=True)
        (root / "val" / "images" / name).rename(root / "val" / "n01000000" / "images" / name)
    for file in (root / "train" / WNIDS[0] / "images").iterdir():
        file.rename(root / "train" / WNIDS[0] / file.name)
    data = load_dataset("tiny-imagenet", root=root, val_fraction=0)
    assert data.train.images.equal(first.train.images) and data.train.labels.equal(first.train.labels)
    found = zip(data.test.images[:, 1, 0, 0].tolist(), data.test.labels.tolist(), strict=True)
    assert sorted(found) == [(0, 0), (1, 1), (2, 0)]


def test_folders_that_are_no_class_are_noted(root: Path) -> None:
    for i in range(3):
        save(root / "train" / "n09000000" / "images" / f"{i}.JPEG")
    (note,) = load_dataset("tiny-imagenet", root=root).notes
    assert note == "train: 3 images left out (wnids.txt does not name their folders): 'n09000000'"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_text_files_of_windows(root: Path, encoding: str) -> None:
    first = load_dataset("tiny-imagenet", root=root, val_fraction=0)
    for path in (root / "wnids.txt", root / "words.txt", root / "val" / "val_annotations.txt"):
        text = path.read_text().replace("\n", "  \r\n") + "\r\n"
        path.write_bytes(text.encode(encoding))
    data = load_dataset("tiny-imagenet", root=root, val_fraction=0)
    assert data.classes == first.classes == ("cat, true cat", "dog")
    assert data.test.labels.tolist() == [0, 1, 0] and data.notes == ()


@pytest.mark.skipif(not ARCHIVE.is_file(), reason="tiny-imagenet-32.tar.xz is not there")
def test_real_images(tmp_path: Path) -> None:
    # The first class whole, and whatever lies beside train; the archive is not read to its end.
    with tarfile.open(ARCHIVE, "r|xz") as tar:
        for member in tar:
            parts = Path(member.name).parts
            if len(parts) > 1 and parts[0] == "train" and (tmp_path / "train").exists():
                (first,) = {path.name for path in (tmp_path / "train").iterdir()}
                if parts[1] != first:
                    break
            if member.isfile():
                (tmp_path / member.name).parent.mkdir(parents=True, exist_ok=True)
                stream = tar.extractfile(member)
                assert stream is not None
                (tmp_path / member.name).write_bytes(stream.read())
    (wnid,) = {path.name for path in (tmp_path / "train").iterdir()}
    images = sorted((tmp_path / "train" / wnid / "images").iterdir())
    assert len(images) == 500
    (tmp_path / "val" / "images").mkdir(parents=True)
    for image in images[:10]:
        image.rename(tmp_path / "val" / "images" / image.name)
    lines = [f"{image.name}\t{wnid}\t0\t0\t31\t31\n" for image in images[:10]]
    (tmp_path / "val" / "val_annotations.txt").write_text("".join(lines))
    (tmp_path / "wnids.txt").write_text(f"{wnid}\n")
    (tmp_path / "words.txt").write_text(f"{wnid}\tthe first class\n")
    data = load_dataset("tiny-imagenet", root=tmp_path, val_fraction=0.1)
    assert (len(data.train), len(data.val), len(data.test), data.image_size) == (441, 49, 10, 32)
    assert all(0.2 < mean < 0.8 for mean in data.mean) and all(0.1 < std < 0.4 for std in data.std)
