"""What `check_folder` finds in a folder of pictures."""

import shutil
from pathlib import Path

import pytest
from PIL import Image

from advmoe.data.inspect import check_folder, described
from advmoe.errors import InputError


def save(path: Path, grey: int, size: tuple[int, int] = (40, 40)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, grey).save(path)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three ants and two bees to train on, an ant and a bee to test on, no two alike."""
    for i in range(3):
        save(tmp_path / "train" / "ant" / f"{i}.png", i)
    for i in range(2):
        save(tmp_path / "train" / "bee" / f"{i}.png", 10 + i)
    save(tmp_path / "test" / "ant" / "0.png", 20)
    save(tmp_path / "test" / "bee" / "0.png", 30)
    return tmp_path


def test_a_sound_folder(root: Path) -> None:
    found = check_folder(root)
    assert found.sound
    assert found.classes == ("ant", "bee")
    assert found.counts == {"train": [3, 2], "test": [1, 1]}
    assert found.sides == {"smallest": 40, "median": 40, "largest": 40}
    assert (found.image_size, found.enlarged, found.long) == (40, 0, [])
    assert "not sound" not in described(found)


def test_equal_pixels_are_found_whatever_their_files_and_folders(root: Path) -> None:
    with Image.open(root / "train" / "ant" / "0.png") as image:
        image.convert("RGB").save(root / "test" / "ant" / "copy.bmp")
    shutil.copy(root / "train" / "bee" / "0.png", root / "train" / "bee" / "again.png")
    shutil.copy(root / "train" / "bee" / "1.png", root / "train" / "ant" / "moved.png")
    found = check_folder(root)
    assert found.leaks == [["train/ant/0.png", "test/ant/copy.bmp"]]
    assert sorted(found.doubles) == [
        ["train/ant/moved.png", "train/bee/1.png"],
        ["train/bee/0.png", "train/bee/again.png"],
    ]
    assert found.mislabelled == [["train/ant/moved.png", "train/bee/1.png"]]
    assert not found.sound
    text = described(found)
    assert "train/ant/0.png = test/ant/copy.bmp" in text and "advmoe train" not in text


def test_doubles_within_a_part_and_class_are_told_but_do_no_harm(root: Path) -> None:
    shutil.copy(root / "train" / "bee" / "0.png", root / "train" / "bee" / "again.png")
    found = check_folder(root)
    assert found.doubles and found.sound


def test_pixels_of_other_shape_are_not_equal(root: Path) -> None:
    save(root / "train" / "ant" / "wide.png", 99, (20, 40))
    save(root / "train" / "ant" / "high.png", 99, (40, 20))
    assert check_folder(root).doubles == []


def test_damaged_images_are_named_and_not_counted(root: Path) -> None:
    path = root / "train" / "ant" / "0.png"
    path.write_bytes(path.read_bytes()[:-20])
    found = check_folder(root)
    assert list(found.damaged) == ["train/ant/0.png"] and found.damaged["train/ant/0.png"]
    assert found.counts["train"] == [2, 2] and not found.sound


def test_names_with_line_ends_are_told_in_one_line(root: Path) -> None:
    (root / "train" / "ant" / "b\nd.png").write_bytes(b"")
    (line,) = [line for line in described(check_folder(root)).splitlines() if line.startswith("damaged")]
    assert r"train/ant/b\nd.png: " in line


def test_sizes(root: Path) -> None:
    for i, size in enumerate([(200, 100), (201, 100), (90, 300), *[(70, 70)] * 8]):
        save(root / "train" / "ant" / f"s{i}.png", 100 + i, size)
    found = check_folder(root)
    # Seven sides of 40, eight of 70, 90, 100, 100: most of the 18 fill 64 pixels.
    assert found.sides == {"smallest": 40, "median": 70, "largest": 100}
    assert (found.image_size, found.enlarged) == (64, 7)
    assert found.long == ["train/ant/s1.png", "train/ant/s2.png"]


def test_no_image_that_can_be_decoded(tmp_path: Path) -> None:
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        for i in range(2):
            (tmp_path / name / f"{i}.png").write_bytes(b"x")
    with pytest.raises(InputError, match="images that can be decoded"):
        check_folder(tmp_path)
