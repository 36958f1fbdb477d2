"""Which files a data set consists of: what counts as an image, of which class, and what is left out by which rule."""

import unicodedata
from pathlib import Path

import pytest

from advmoe.data.listing import by_class, class_names, composed, is_image, left_out, read_lines, require_filled, scan


def put(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def test_images_are_told_by_their_ending_in_either_case() -> None:
    assert all(map(is_image, ("a.png", "b.JPEG", "c.x.tif", ".webp")))
    assert not any(map(is_image, ("a", "png", "a.png.gz", "a.heic", "a.")))


def test_a_part_is_class_folders_and_loose_images_sorted(tmp_path: Path) -> None:
    put(tmp_path, "p/b/2.png", "p/b/in/1.JPG", "p/a/3.png", "p/z.png", "p/notes.txt", "p/a/info.json", "q/a/0.png")
    part = scan(tmp_path, "p")
    assert dict(part.folders) == {"a": ["p/a/3.png"], "b": ["p/b/2.png", "p/b/in/1.JPG"]}
    assert list(part.loose) == ["p/z.png"] and part.notes == ()
    assert part.images == ["p/a/3.png", "p/b/2.png", "p/b/in/1.JPG", "p/z.png"]


def test_what_is_left_out_is_counted_by_its_rule(tmp_path: Path) -> None:
    put(tmp_path, "p/a/1.png", "p/a/.2.png", "p/.b/3.png", "p/a/4.heic", "p/a/5.heic", "p/a/6")
    hidden, endings = scan(tmp_path, "p").notes
    rule = "a file's or a folder's name begins with a dot"
    assert hidden == f"p: 2 images left out ({rule}): 'p/.b/3.png', 'p/a/.2.png'"
    assert endings.startswith("p: 3 files left out (the name's ending is none of .bmp, ")
    assert endings.endswith("): 2 '.heic', 1 without")
    assert left_out("p", 1, "image", "why") == "p: 1 image left out (why)"


def test_a_folder_that_links_to_one_above_it_is_walked_once(tmp_path: Path) -> None:
    put(tmp_path, "p/a/1.png")
    (tmp_path / "p" / "a" / "again").symlink_to(tmp_path / "p")
    assert scan(tmp_path, "p").images == ["p/a/1.png"]


def test_classes_are_the_folders_of_train_and_others_may_lack_some(tmp_path: Path) -> None:
    put(tmp_path, "train/b/1.png", "train/a/2.png", "test/b/3.png", "test/b/0.png")
    classes = class_names(scan(tmp_path, "train"))
    assert classes == ["a", "b"]
    assert by_class(scan(tmp_path, "test"), classes) == [("test/b/0.png", 1), ("test/b/3.png", 1)]
    with pytest.raises(ValueError, match=r"data\.root must hold at least one image in test/a, got none in"):
        require_filled(scan(tmp_path, "test"), classes)
    put(tmp_path, "test/c/4.png")
    with pytest.raises(ValueError, match=r"data\.root must have only classes of train in test, got 'c' in"):
        by_class(scan(tmp_path, "test"), classes)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["p/1.png", "p/a/2.png"], r"hold the images of p in class folders, got 1 beside them: 'p/1\.png'"),
        (["p/notes.txt"], "hold class folders in p, got none in"),
        (["p/a/notes.txt"], "hold at least one image in p/a, got none in"),
    ],
)
def test_what_are_no_class_folders(tmp_path: Path, names: list[str], message: str) -> None:
    put(tmp_path, *names)
    with pytest.raises(ValueError, match=rf"data\.root must {message}"):
        class_names(scan(tmp_path, "p"))


def test_a_name_stored_in_parts_is_the_same_name() -> None:
    apart = unicodedata.normalize("NFD", "café")
    assert apart != "café" and composed(apart) == composed("café") == "café" and composed("cat") == "cat"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_lines_of_any_system_without_empty_ones(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.txt").write_bytes("one \r\n\r\ncafé\rthree\u2028x\n  \n".encode(encoding))
    assert read_lines(tmp_path, "a.txt") == ["one", "café", "three\u2028x"]


def test_lines_that_are_no_text_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfa")
    with pytest.raises(ValueError, match=r"data\.root must hold a readable a\.txt, got UnicodeDecodeError"):
        read_lines(tmp_path, "a.txt")
    with pytest.raises(ValueError, match=r"data\.root must hold b\.txt, got "):
        read_lines(tmp_path, "b.txt")
