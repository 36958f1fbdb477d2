"""Decoded images kept as arrays. What data sets do with them is in test_folder.py, test_tiny_imagenet.py."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from advmoe.data.cache import CACHE_FOLDER, load_decoded
from advmoe.data.listing import Listing


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three images, whose red tells them apart, and a cache of the user's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for red in (10, 20, 30):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.new("RGB", (4, 4), (red, 0, 0)).save(tmp_path / "images" / f"{red}.png")
    return tmp_path / "images"


def listings(train: Listing, test: Listing) -> dict[str, Listing]:
    return {"train": train, "test": test}


def test_images_come_in_the_order_of_their_listing(root: Path) -> None:
    parts, _ = load_decoded(root, listings([("30.png", 1), ("10.png", 0)], [("20.png", 2)]), image_size=None)
    assert parts["train"].images.shape == (2, 3, 4, 4) and parts["train"].images.dtype == torch.uint8
    assert parts["train"].images[:, 0, 0, 0].tolist() == [30, 10] and parts["train"].labels.tolist() == [1, 0]
    assert parts["test"].images[:, 0, 0, 0].tolist() == [20] and parts["test"].labels.tolist() == [2]


def test_another_listing_of_the_same_files_is_another_cache(root: Path) -> None:
    one, two = listings([("10.png", 0)], [("20.png", 0)]), listings([("20.png", 0)], [("10.png", 0)])
    for asked, red in ((one, 10), (two, 20), (one, 10)):
        assert load_decoded(root, asked, image_size=None).parts["train"].images[0, 0, 0, 0] == red


def test_classes_are_no_part_of_the_cache(root: Path) -> None:
    load_decoded(root, listings([("10.png", 0)], [("20.png", 0)]), image_size=None)
    (record,) = (root / CACHE_FOLDER).glob("*.json")
    written = record.stat().st_mtime_ns
    parts, _ = load_decoded(root, listings([("10.png", 5)], [("20.png", 6)]), image_size=None)
    assert parts["train"].labels.tolist() == [5] and record.stat().st_mtime_ns == written


@pytest.mark.parametrize("image_size", [None, 2])
def test_a_missing_file_is_named_before_anything_is_decoded(root: Path, image_size: int | None) -> None:
    with pytest.raises(ValueError, match=r"data\.root must hold readable files in a, got .*a/absent\.png"):
        load_decoded(root, listings([("10.png", 0)], [("a/absent.png", 0)]), image_size=image_size)
    assert not (root / CACHE_FOLDER).exists()


@pytest.mark.slow
def test_of_several_processes_one_decodes(root: Path, tmp_path: Path) -> None:
    code = """
import sys, time
import subprocess
import sys
from pathlib import Path
from advmoe.data import cache
decode_parts = cache._decode_parts
def slowly(*arguments):
    print("decodes", flush=True)
    time.sleep(1.5)
    return decode_parts(*arguments)
cache._decode_parts = slowly
parts, _ = cache.load_decoded(Path(sys.argv[1]), {"train": [("10.png", 0)], "test": [("20.png", 0)]}, image_size=None)
print(parts["train"].images[0, 0, 0, 0].item())
"""
    command = [sys.executable, "-c", code, str(root)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = [process.communicate(timeout=120)[0].split() for process in processes]
    assert sorted(said) == [["10"], ["10"], ["decodes", "10"]]
    assert not list((root / CACHE_FOLDER).glob("*lock*"))


def test_a_machine_has_a_copy_of_its_own(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, node = listings([("10.png", 0)], [("20.png", 0)]), tmp_path / "node"
    load_decoded(root, asked, image_size=None)
    monkeypatch.setenv("ADVMOE_CACHE", str(node))
    for _ in range(2):  # copied, then read there: what all share is gone by then
        assert load_decoded(root, asked, image_size=None).parts["train"].images[0, 0, 0, 0] == 10
        (copy,) = node.rglob("*-train.npy")
        (root / CACHE_FOLDER / copy.name).unlink(missing_ok=True)
    assert not (root / CACHE_FOLDER / copy.name).exists()
    monkeypatch.setenv("ADVMOE_CACHE", "node")
    with pytest.raises(ValueError, match="ADVMOE_CACHE must be an absolute path, got 'node'"):
        load_decoded(root, asked, image_size=None)
