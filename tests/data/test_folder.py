"""Image folders: what is decoded, how, and when it is decoded again."""

import json
import os
import re
import subprocess
import sys
import tarfile
import unicodedata
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from layouts import lay_out_folder
from PIL import Image

from advmoe.data import cache, load_dataset
from advmoe.data.cache import CACHE_FOLDER
from advmoe.decode import Bytes

ARCHIVE = Path(__file__).parents[2].parent / "shared" / "data" / "cifar10-jpeg.tar.xz"


def save(path: Path, image: Image.Image | tuple[int, int, int] = (10, 20, 30), size: int = 8, **options: Any) -> Path:
    """Save an image, or a square of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made = Image.new("RGB", (size, size), image) if isinstance(image, tuple) else image
    made.save(path, **options)
    return path


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of two classes, and a cache folder of the user's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "images"
    lay_out_folder(root)
    return root


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths decoded so far."""
    paths: list[str] = []
    real = cache._decode

    def spy(path: Path, image_size: int | None) -> Bytes:
        paths.append(str(path))
        return real(path, image_size)

    monkeypatch.setattr(cache, "_decode", spy)
    return paths


def first_pixels(root: Path, image_size: int | None = None) -> list[list[int]]:
    data = load_dataset("folder", root=root, image_size=image_size, val_fraction=0)
    values: list[list[int]] = data.train.images[:, :, 0, 0].tolist()
    return values


def message(call: Callable[[], object]) -> str:
    with pytest.raises(ValueError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_classes_labels_and_order(root: Path) -> None:
    save(root / "train" / "cat" / "notes.txt", (0, 0, 0), format="png")
    save(root / "train" / "cat" / "._0.png")
    save(root / "train" / ".hidden" / "0.png")
    data = load_dataset("folder", root=root, val_fraction=0)
    assert data.classes == ("ant", "cat")
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.train.images[:, :, 0, 0].tolist() == [
        [0, 100, 0],
        [1, 100, 0],
        [2, 100, 0],
        [0, 0, 0],
        [1, 0, 0],
        [2, 0, 0],
    ]
    assert data.test.labels.tolist() == [1]
    assert data.test.images[0, :, 3, 4].tolist() == [7, 0, 0]
    assert (data.in_channels, data.image_size, data.flip) == (3, 8, True)
    # Red: 0, 1, 2 twice; mean 1. Green: half 100. Blue: 0.
    assert data.mean == pytest.approx((1 / 255, 50 / 255, 0))


def test_val_folder_stands_in_for_test(root: Path) -> None:
    (root / "test").rename(root / "val")
    assert len(load_dataset("folder", root=root).test) == 1


def test_exif_orientation_is_applied(root: Path) -> None:
    # Orientation 6: the first row as stored is the right-hand column as shown.
    stored = Image.new("RGB", (8, 8), (0, 0, 0))
    for x in range(8):
        stored.putpixel((x, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6
    save(root / "train" / "ant" / "0.png", stored, exif=exif)
    image = load_dataset("folder", root=root, val_fraction=0).train.images[0]
    assert (image[:, :, 7] == 255).all()
    assert (image[:, :, :7] == 0).all()


def sixteen_bit(level: int) -> Image.Image:
    return Image.fromarray(np.full((8, 8), level, dtype=np.uint16))


def palette() -> Image.Image:
    return Image.new("RGB", (8, 8), (0, 51, 255)).convert("P", palette=Image.Palette.ADAPTIVE)


@pytest.mark.parametrize(
    ("name", "make", "options", "expected"),
    [
        ("grey.png", lambda: Image.new("L", (8, 8), 77), {}, [77, 77, 77]),
        ("one-bit.png", lambda: Image.new("1", (8, 8), 1), {}, [255, 255, 255]),
        ("grey-alpha.png", lambda: Image.new("LA", (8, 8), (77, 128)), {}, [77, 77, 77]),
        ("alpha.png", lambda: Image.new("RGBA", (8, 8), (1, 2, 3, 128)), {}, [1, 2, 3]),
        ("palette.png", palette, {}, [0, 51, 255]),
        ("palette-clear.png", palette, {"transparency": b"\x00\x80"}, [0, 51, 255]),
        ("palette.gif", palette, {}, [0, 51, 255]),
        # (1 - 0.2)(1 - 0) = 0.8 of 255 in red, and full green and blue: no black ink.
        ("cmyk.tif", lambda: Image.new("CMYK", (8, 8), (51, 0, 0, 0)), {}, [204, 255, 255]),
        ("cmyk.jpg", lambda: Image.new("CMYK", (8, 8), (51, 0, 0, 0)), {"quality": 100}, [204, 255, 255]),
        # 16 bits: 257 levels make one. 51 * 257 = 13107; 13107 + 128 still rounds to 51, 13107 + 129 to 52.
        ("deep.png", lambda: sixteen_bit(13107), {}, [51, 51, 51]),
        ("deep-below.png", lambda: sixteen_bit(13107 + 128), {}, [51, 51, 51]),
        ("deep-above.png", lambda: sixteen_bit(13107 + 129), {}, [52, 52, 52]),
        ("deep.tif", lambda: sixteen_bit(65535), {}, [255, 255, 255]),
    ],
)
@pytest.mark.filterwarnings("error")
def test_modes_become_rgb(
    root: Path, name: str, make: Callable[[], Image.Image], options: dict[str, Any], expected: list[int]
) -> None:
    (root / "train" / "ant" / "0.png").unlink()
    save(root / "train" / "ant" / f"0-{name}", make(), **options)
    assert first_pixels(root)[0] == expected


def test_floating_point_is_refused(root: Path) -> None:
    path = save(root / "train" / "ant" / "3.tiff", Image.new("F", (8, 8), 0.5))
    assert message(lambda: load_dataset("folder", root=root)) == (
        f"data.root must hold images that can be decoded, got {str(path)!r}: floating-point pixels have no known range"
    )


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_truncated_file_is_named(root: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    path = save(root / "train" / "cat" / f"broken.{suffix}", Image.fromarray(noise))
    path.write_bytes(path.read_bytes()[:-60])
    got = message(lambda: load_dataset("folder", root=root))
    assert got.startswith(f"data.root must hold images that can be decoded, got {str(path)!r}: ")
    assert not (root / CACHE_FOLDER).exists()
    path.write_bytes(b"")
    assert str(path) in message(lambda: load_dataset("folder", root=root))


def sized(root: Path, *sizes: tuple[int, int]) -> Path:
    """A folder of two classes of images of these widths and heights, in turns."""
    for i, size in enumerate(sizes):
        save(root / "train" / "ab"[i % 2] / f"{i}.png", Image.new("RGB", size, (9, 9, 9)))
    save(root / "test" / "a" / "0.png", Image.new("RGB", sizes[0]))
    return root


@pytest.mark.parametrize(
    ("sizes", "side", "sides"),
    [
        ([(70, 64), (80, 100), (300, 64)], 64, "64 to 80"),
        ([(640, 480)] * 3, 224, "480"),
        ([(20, 30), (30, 20), (10, 9)], 32, "9 to 20"),  # enlarged: no usual side is smaller
        ([(31, 300), (300, 33), (33, 33), (500, 500)], 32, "31 to 500"),  # with the test image two of five are small
        ([(500, 500)] * 4, 224, "500"),  # squares of one size, but too large to train on
    ],
)
def test_images_that_make_no_array_get_the_largest_usual_side_that_most_fill(
    tmp_path: Path, decoded: list[str], sizes: list[tuple[int, int]], side: int, sides: str
) -> None:
    root = sized(tmp_path / "photos", *sizes)
    data = load_dataset("folder", root=root, val_fraction=0)
    assert data.train.shape == data.test.shape == (3, side, side)
    [note] = data.notes
    assert f"shorter sides have {sides} pixels" in note and f"resized to {side} pixels" in note
    decoded.clear()
    again = load_dataset("folder", root=root, val_fraction=0)
    assert decoded == [] and again.notes == data.notes
    assert load_dataset("folder", root=root, val_fraction=0, image_size=16).notes == ()


def test_squares_of_one_size_stay_as_they_are(tmp_path: Path) -> None:
    data = load_dataset("folder", root=sized(tmp_path / "photos", *[(96, 96)] * 4), val_fraction=0)
    assert (data.image_size, data.notes) == (96, ())


def test_a_damaged_image_among_those_of_several_sizes_is_named(tmp_path: Path) -> None:
    root = sized(tmp_path / "photos", (40, 40), (50, 50), (60, 60))
    (root / "train" / "b" / "x.png").write_bytes(b"no image")
    assert repr(str(root / "train" / "b" / "x.png")) in message(lambda: load_dataset("folder", root=root))


def flat(root: Path, **classes: int) -> Path:
    """Class folders of so many images, the n-th of which is (n, number of the class, 0)."""
    for k, (name, number) in enumerate(classes.items()):
        for i in range(number):
            save(root / name / f"{i:03}.png", (i, k, 0))
    return root


def test_class_folders_without_a_split(tmp_path: Path) -> None:
    root = flat(tmp_path / "photos", ant=10, bee=20, cat=5)
    save(root / "cover.png")
    data, other = (load_dataset("folder", root=root, val_fraction=0, seed=seed) for seed in (0, 1))
    assert data.classes == ("ant", "bee", "cat")
    assert torch.bincount(data.test.labels).tolist() == [2, 4, 1]  # a fifth of each
    assert torch.bincount(data.train.labels).tolist() == [8, 16, 4]
    assert torch.equal(data.test.images, other.test.images)  # whatever the training's seed

    def pixels(*parts: Any) -> list[tuple[int, ...]]:
        return sorted(tuple(each.images[i, :, 0, 0].tolist()) for each in parts for i in range(len(each)))

    assert pixels(data.train, data.test) == sorted(
        (i, k, 0) for k, number in enumerate((10, 20, 5)) for i in range(number)
    )
    beside, share = data.notes
    assert beside == "data.root: 1 image left out (they lie beside class folders): 'cover.png'"
    assert share == f"the test set is 7 of the 35 images of {root}, the same for every seed"


def test_a_train_folder_alone_is_split_likewise(root: Path) -> None:
    (root / "test").rename(root / "extra")
    data = load_dataset("folder", root=root, val_fraction=0)
    assert (len(data.train), len(data.test)) == (5, 1)
    share, beside = data.notes
    assert share == f"the test set is 1 of the 6 images of {root / 'train'}, the same for every seed"
    assert beside == "extra: 1 image left out (used are those in train)"


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    assert load_dataset("folder", root=flat(tmp_path, bus=5, train=5)).classes == ("bus", "train")


@pytest.mark.parametrize("name", ["Train", "training", "eval"])
def test_parts_under_other_names_are_no_classes(tmp_path: Path, name: str) -> None:
    flat(tmp_path / name, ant=2, bee=2)
    flat(tmp_path / "other", ant=2, bee=2)
    got = message(lambda: load_dataset("folder", root=tmp_path))
    assert got.startswith("data.root must hold a folder train, ") and got.endswith(
        f"got {name!r}, whose images lie in folders"
    )


@pytest.mark.parametrize("name", ["valid", "validation"])
def test_other_names_of_a_test_set(root: Path, name: str) -> None:
    (root / "test").rename(root / name)
    assert len(load_dataset("folder", root=root).test) == 1


def test_single_images_leave_none_to_test_on(tmp_path: Path) -> None:
    root = flat(tmp_path, ant=1, bee=1)
    assert "a class of >= 2 images" in message(lambda: load_dataset("folder", root=root))


def test_resize_keeps_the_middle_square(root: Path) -> None:
    # 12 wide, 4 high: columns 4..7 remain. They are white, the rest black; nothing of the rest may shine through.
    wide = Image.new("RGB", (12, 4))
    wide.paste((255, 255, 255), (4, 0, 8, 4))
    save(root / "train" / "ant" / "0.png", wide)
    save(root / "train" / "ant" / "1.png", wide.rotate(90, expand=True))
    images = load_dataset("folder", root=root, image_size=8, val_fraction=0).train.images
    assert (images[:2] == 255).all()


def test_shrinking_is_antialiased(root: Path) -> None:
    board = Image.fromarray((np.indices((8, 8)).sum(axis=0) % 2 * 255).astype(np.uint8))
    save(root / "train" / "ant" / "0.png", board)
    image = load_dataset("folder", root=root, image_size=2, val_fraction=0).train.images[0]
    assert ((image.int() - 127).abs() <= 12).all()


def test_second_use_decodes_nothing(root: Path, decoded: list[str]) -> None:
    first = load_dataset("folder", root=root)
    assert len(set(decoded)) == 7
    decoded.clear()
    second = load_dataset("folder", root=root)
    assert decoded == []
    assert torch.equal(first.train.images, second.train.images)
    assert torch.equal(first.test.images, second.test.images)
    assert torch.equal(first.train.labels, second.train.labels)


def test_sizes_are_kept_side_by_side(root: Path, decoded: list[str]) -> None:
    load_dataset("folder", root=root)
    load_dataset("folder", root=root, image_size=4)
    decoded.clear()
    assert load_dataset("folder", root=root).image_size == 8
    assert load_dataset("folder", root=root, image_size=4).image_size == 4
    assert decoded == []


def test_changes_are_seen(root: Path, decoded: list[str]) -> None:
    load_dataset("folder", root=root)
    path = root / "train" / "ant" / "0.png"
    changes: list[Callable[[], object]] = [
        lambda: save(path, (200, 0, 0)),
        lambda: os.utime(path, ns=(0, 123)),
        lambda: save(root / "train" / "ant" / "9.png"),
        lambda: (root / "train" / "ant" / "9.png").unlink(),
        lambda: path.rename(path.with_name("00.png")),
    ]
    for change in changes:
        change()
        decoded.clear()
        assert first_pixels(root)[0] == [200, 0, 0]
        assert decoded
    # What no fingerprint names any more is gone.
    assert len(list((root / CACHE_FOLDER).iterdir())) == 3


@pytest.mark.parametrize(
    "damage", ["truncated", "flipped", "missing", "empty-json", "list-json", "deep-json", "pickled"]
)
def test_damaged_cache_is_made_again(root: Path, decoded: list[str], damage: str) -> None:
    expected = first_pixels(root)
    array = next((root / CACHE_FOLDER).glob("*-train.npy"))
    record = root / CACHE_FOLDER / "own.json"
    content = array.read_bytes()
    if damage == "truncated":
        array.write_bytes(content[:-1])
    elif damage == "flipped":
        array.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "missing":
        array.unlink()
    elif damage == "empty-json":
        record.write_text("")
    elif damage == "list-json":
        record.write_text("[]")
    elif damage == "deep-json":
        record.write_text("[" * 200_000)
    else:
        np.save(array, np.array([{}], dtype=object), allow_pickle=True)
    decoded.clear()
    assert first_pixels(root) == expected
    assert decoded
    decoded.clear()
    assert first_pixels(root) == expected
    assert decoded == []


# NumPy reads a header as Python: damage raises errors of many kinds there, most of which once ended the program.
@pytest.mark.parametrize("header", [b"{'descr", b"{'shape': (6, 3, 8, 9**9)}", b"}" * 9, b"(" * 90, b"'" * 3])
def test_a_damaged_header_is_made_again(root: Path, header: bytes) -> None:
    expected = first_pixels(root)
    array = next((root / CACHE_FOLDER).glob("*-train.npy"))
    content = array.read_bytes()
    array.write_bytes(content[:10] + header.ljust(117) + b"\n" + content[128:])
    assert first_pixels(root) == expected


def test_root_that_cannot_be_written(root: Path, tmp_path: Path, decoded: list[str]) -> None:
    # A plain file where the cache folder would be: fails for every user, unlike permissions.
    (root / CACHE_FOLDER).write_bytes(b"")
    expected = first_pixels(root)
    kept = list((tmp_path / "cache" / "advmoe").rglob("*.npy"))
    assert len(kept) == 2
    decoded.clear()
    assert first_pixels(root) == expected
    assert decoded == []


def test_no_place_for_a_cache_is_a_warning(root: Path, tmp_path: Path) -> None:
    (root / CACHE_FOLDER).write_bytes(b"")
    (tmp_path / "cache").write_bytes(b"")
    with pytest.warns(UserWarning, match="could not be kept for the next time"):
        assert len(first_pixels(root)) == 6


def test_structure_errors(root: Path, tmp_path: Path) -> None:
    def load() -> object:
        return load_dataset("folder", root=root)

    save(root / "test" / "dog" / "0.png")
    rule = "data.root must have only classes of train in test"
    assert message(load) == f"{rule}, got 'dog' in {str(root / 'test')!r}"
    (root / "train" / "dog").mkdir()
    rule = "data.root must hold at least one image in train/dog"
    assert message(load) == f"{rule}, got none in {str(root / 'train/dog')!r}"
    save(root / "train" / "dog" / "0.png")
    (root / "train").rename(root / "training")
    assert message(load) == f"data.root must hold a folder train, got {str(root)!r}"
    (root / "train").mkdir()
    assert message(load) == f"data.root must hold class folders in train, got none in {str(root / 'train')!r}"
    missing = tmp_path / "nowhere"
    assert message(lambda: load_dataset("folder", root=missing)) == f"data.root must be a folder, got {str(missing)!r}"


def test_links(root: Path) -> None:
    before = first_pixels(root)
    (root / "train" / "cat" / "loop").symlink_to(root / "train", target_is_directory=True)
    (root / "train" / "cat" / "folder.png").symlink_to(root / "train", target_is_directory=True)
    (root / "train" / "cat" / "back").symlink_to(root / "train" / "cat", target_is_directory=True)
    assert first_pixels(root) == before
    (root / "train" / "cat" / "3.png").symlink_to(root / "test" / "cat" / "0.png")
    assert first_pixels(root)[-1] == [7, 0, 0]
    (root / "train" / "cat" / "z").symlink_to(root / "test" / "cat", target_is_directory=True)
    assert first_pixels(root)[-2:] == [[7, 0, 0], [7, 0, 0]]


@pytest.mark.parametrize("name", ["cat/4.png", "cat/more", "dog"])
@pytest.mark.parametrize("target", ["gone", "itself"])
def test_links_that_lead_nowhere_are_refused(root: Path, name: str, target: str) -> None:
    link = root / "train" / name
    link.symlink_to(link if target == "itself" else root / "gone")
    folder = f"train/{name}".rpartition("/")[0]
    rule = f"data.root must hold readable files in {folder}"
    assert message(lambda: load_dataset("folder", root=root)) == (
        f"{rule}, got {f'train/{name}'!r}, a link that leads nowhere"
    )


def test_a_pipe_among_images_is_not_waited_for(root: Path) -> None:
    os.mkfifo(root / "train" / "cat" / "3.png")
    assert message(lambda: load_dataset("folder", root=root)).endswith("got 'train/cat/3.png', which is no file")


def test_images_in_sub_folders_are_of_their_class(root: Path) -> None:
    for i in range(2):
        save(root / "train" / "cat" / "session2" / "deep" / f"{i}.png", (50 + i, 0, 0))
    (root / "train" / "dog").mkdir()
    save(root / "train" / "dog" / "only" / "0.JPEG", (9, 0, 0), format="png")
    data = load_dataset("folder", root=root, val_fraction=0)
    assert data.classes == ("ant", "cat", "dog")
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 2]
    assert data.train.images[:, 0, 0, 0].tolist() == [0, 1, 2, 0, 1, 2, 50, 51, 9]
    assert data.notes == ()


def test_classes_one_folder_too_deep_are_refused(root: Path) -> None:
    for part in ("train", "test"):
        (root / part).rename(root / "images")
        (root / part).mkdir()
        (root / "images").rename(root / part / "images")
    rule = "data.root must hold >= 2 class folders in train"
    assert message(lambda: load_dataset("folder", root=root)) == f"{rule}, got 'images' alone"


@pytest.mark.parametrize("part", ["train", "test"])
def test_images_beside_class_folders_are_refused(root: Path, part: str) -> None:
    for i in range(5):
        save(root / part / f"{i}.png")
    rule = f"data.root must hold the images of {part} in class folders"
    shown = ", ".join(repr(f"{part}/{i}.png") for i in range(3))
    assert message(lambda: load_dataset("folder", root=root)) == f"{rule}, got 5 beside them: {shown} and 2 more"


def test_what_is_left_out_is_noted(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(root / "train" / "cat" / "._0.png")
    save(root / "train" / ".hidden" / "0.png")
    save(root / "train" / "ant" / ".ipynb_checkpoints" / "0.png")
    for name in ("a.heic", "b.HEIC", "plain"):
        save(root / "test" / "cat" / name, format="png")
    for name in ("notes.txt", "boxes.xml", ".DS_Store", "Thumbs.db"):  # no images, and no note
        (root / "train" / "cat" / name).write_bytes(b"")
    save(root / "val" / "cat" / "0.png")
    save(root / "preview.png")
    data = load_dataset("folder", root=root, val_fraction=0)
    assert len(data.train) == 6 and len(data.test) == 1
    hidden, endings, val, beside = data.notes
    assert hidden == (
        "train: 3 images left out (a file's or a folder's name begins with a dot): "
        "'train/.hidden/0.png', 'train/ant/.ipynb_checkpoints/0.png', 'train/cat/._0.png'"
    )
    assert re.fullmatch(
        r"test: 3 files left out \(the name's ending is none of [^()]*\): 2 '.heic', 1 without", endings
    )
    assert val == "val: 1 image left out (used are those in train and test)"
    assert beside == "data.root: 1 image left out (they lie beside the folders train and test): 'preview.png'"
    assert capsys.readouterr().err.splitlines() == [f"note  {note}" for note in data.notes]


def test_one_name_stored_in_two_ways_is_one_class(root: Path) -> None:
    composed, apart = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    save(root / "train" / apart / "0.png")
    save(root / "train" / "cafz" / "0.png")
    save(root / "test" / composed / "0.png")
    data = load_dataset("folder", root=root, val_fraction=0)
    # In the order of composed names, whichever way a system stores them: models are trained on one and used on another.
    assert data.classes == ("ant", "cafz", composed, "cat")
    assert data.test.labels.tolist() == [2, 3]
    save(root / "train" / composed / "1.png", (5, 0, 0))
    assert load_dataset("folder", root=root, val_fraction=0).train.labels.tolist() == [0, 0, 0, 1, 2, 2, 3, 3, 3]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names of files are text whatever the locale")
def test_classes_are_the_same_in_every_locale(root: Path) -> None:
    for name in ("chat noir é", "猫"):
        save(root / "train" / unicodedata.normalize("NFD", name) / "0.png")
        save(root / "test" / name / "0.png")
    code = "import sys; from advmoe.data import load_dataset; data = load_dataset('folder', root=sys.argv[1]);"
    code += "print(ascii(data.classes), data.test.labels.tolist())"
    # Python reads names as ASCII then, and keeps what is none as bytes.
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", code, str(root)], capture_output=True, env=environment, text=True)
    data = load_dataset("folder", root=root)
    assert data.classes == ("ant", "cat", "chat noir é", "猫") and data.test.labels.tolist() == [1, 2, 3]
    assert done.stdout.strip() == f"{data.classes!a} [1, 2, 3]", done.stderr


def test_class_names_are_text_whatever_folders_are_called(root: Path) -> None:
    names = ["猫".encode(), b"chat-\xe9", b"line\nend", "e\u0301".encode()]
    for name in names:
        folder = os.fsdecode(name)
        save(root / "train" / folder / "0.png")
    data = load_dataset("folder", root=root, val_fraction=0)
    assert set(data.classes) == {"ant", "cat", "猫", "chat-\\xe9", "line\\nend", "é"}
    json.loads(json.dumps(data.classes, ensure_ascii=False).encode("utf-8"))


def test_many_tasks_and_threads(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_FILES_PER_TASK", 2)
    monkeypatch.setattr(cache, "_SMALL_FILE", 0)
    assert first_pixels(root) == [[0, 100, 0], [1, 100, 0], [2, 100, 0], [0, 0, 0], [1, 0, 0], [2, 0, 0]]


@pytest.mark.skipif(not ARCHIVE.is_file(), reason="cifar10-jpeg.tar.xz is not there")
def test_real_images(tmp_path: Path) -> None:
    with tarfile.open(ARCHIVE, "r|xz") as tar:
        for number, member in enumerate(islice((m for m in tar if m.isfile()), 300)):
            _, name, file = Path(member.name).parts  # all of one class: half of them are called another
            name = name if number % 2 else "other"
            for part in ("train", "test"):
                path = tmp_path / part / name / file
                path.parent.mkdir(parents=True, exist_ok=True)
                stream = tar.extractfile(member) if part == "train" else (tmp_path / "train" / name / file).open("rb")
                assert stream is not None
                path.write_bytes(stream.read())
    data = load_dataset("folder", root=tmp_path, val_fraction=0.1)
    assert (len(data.train), len(data.val), len(data.test), data.image_size) == (270, 30, 300, 32)
    # Natural images: neither dark nor bright on average, and varied.
    assert all(0.3 < mean < 0.7 for mean in data.mean)
    assert all(0.15 < std < 0.35 for std in data.std)
