"""One file to pixels: crops for training and evaluation, worked by hand and against plainer ways to compute them."""

import math
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from advmoe.decode import central_crop, decode, middle_square, random_box, random_crop


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 900), st.integers(1, 900), st.integers(0, 2**63 - 1))
def test_random_boxes_lie_within_the_image(width: int, height: int, seed: int) -> None:
    left, top, w, h = random_box(width, height, random.Random(seed))
    assert 0 <= left <= left + w <= width and 0 <= top <= top + h <= height and w > 0 and h > 0
    assert (left, top, w, h) == random_box(width, height, random.Random(seed))


def test_random_boxes_have_the_areas_and_ratios_of_the_paper() -> None:
    boxes = [random_box(400, 300, random.Random(seed)) for seed in range(4000)]
    areas = np.array([w * h / 120_000 for _, _, w, h in boxes])
    ratios = np.log([w / h for _, _, w, h in boxes])
    assert 0.079 < areas.min() < 0.09 and 0.95 < areas.max() <= 1
    assert math.log(3 / 4) - 0.02 < ratios.min() and ratios.max() < math.log(4 / 3) + 0.02
    # Boxes that do not fit are drawn again, which leaves fewer of the large ones than a uniform law would: mean < 0.54.
    assert 0.4 < areas.mean() < 0.54
    assert len({left for left, *_ in boxes}) > 150 and len({top for _, top, *_ in boxes}) > 120


def test_where_no_box_fits_the_middle_is_taken() -> None:
    # 8% of 1000x10 is 800 pixels, at ratio 4/3 24.5 high: nothing fits. The middle: 10 * 4/3 = 13 wide, from 987 / 2.
    assert random_box(1000, 10, random.Random(0)) == (493, 0, 13, 10)
    assert random_box(10, 1000, random.Random(0)) == (0, 493, 10, 13)
    assert random_box(1, 100, random.Random(0)) == (0, 49, 1, 1)


def test_random_crop_follows_its_seed_alone() -> None:
    image = noise(60, 40)
    first, again, other = (np.asarray(random_crop(16, seed, flip=True)(image)) for seed in (1, 1, 2))
    assert first.shape == (16, 16, 3)
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_half_of_the_random_crops_are_flipped() -> None:
    # Dark on the left, bright on the right: a flip turns it round.
    ramp = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8)[None, :, None] * 4, (64, 1, 3)))
    flipped = 0
    for seed in range(200):
        plain, varied = (np.asarray(random_crop(8, seed, flip=flip)(ramp)).astype(int) for flip in (False, True))
        assert plain[0, -1, 0] > plain[0, 0, 0]
        if varied[0, -1, 0] < varied[0, 0, 0]:
            flipped += 1
            varied = varied[:, ::-1]
        assert np.array_equal(plain, varied)
    assert 70 < flipped < 130


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (224, 224), (106, 150), (909, 768)])
def test_central_crop_is_a_resize_then_a_crop(size: tuple[int, int]) -> None:
    image = noise(*size)
    width, height = (256 * side // min(size) for side in size)
    whole = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR)).astype(int)
    left, top = (width - 224) // 2, (height - 224) // 2
    found = np.asarray(central_crop(224)(image)).astype(int)
    assert np.abs(found - whole[top : top + 224, left : left + 224]).max() <= 1


def test_central_crop_keeps_seven_eighths_of_the_shorter_side() -> None:
    # 64 wide, 32 high, one white column of 4 at either edge of the middle 28: 18..21 and 42..45.
    image = Image.new("RGB", (64, 32))
    image.paste((255, 255, 255), (18, 0, 22, 32))
    image.paste((255, 255, 255), (42, 0, 46, 32))
    found = np.asarray(central_crop(28)(image))[0, :, 0]
    assert found.tolist() == [255] * 4 + [0] * 20 + [255] * 4


def exif(orientation: int) -> Image.Exif:
    made = Image.Exif()
    made[0x0112] = orientation
    return made


ODD: list[tuple[str, Callable[[], Image.Image], dict[str, Any], list[int]]] = [
    ("grey.jpg", lambda: Image.new("L", (40, 30), 77), {}, [77, 77, 77]),
    ("cmyk.jpg", lambda: Image.new("CMYK", (40, 30), (51, 0, 0, 0)), {"quality": 100}, [204, 255, 255]),
    ("palette.png", lambda: Image.new("RGB", (40, 30), (0, 51, 255)).convert("P", palette=1), {}, [0, 51, 255]),
    ("alpha.png", lambda: Image.new("RGBA", (40, 30), (1, 2, 3, 9)), {}, [1, 2, 3]),
    ("png-in-truth.jpg", lambda: Image.new("RGB", (40, 30), (9, 8, 7)), {"format": "png"}, [9, 8, 7]),
    ("no-exif.jpg", lambda: Image.new("L", (40, 30), 77), {"exif": b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01"}, [77] * 3),
]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize(("name", "make", "options", "expected"), ODD, ids=[case[0] for case in ODD])
@pytest.mark.parametrize("prepare", [central_crop(16), random_crop(16, 3, flip=True), middle_square(16)])
def test_odd_files_are_read_for_every_crop(
    tmp_path: Path, prepare: Any, name: str, make: Callable[[], Image.Image], options: Any, expected: list[int]
) -> None:
    make().save(tmp_path / name, **options)
    found = decode(tmp_path / name, prepare)
    assert found.shape == (16, 16, 3) and found.dtype == np.uint8
    assert found.reshape(-1, 3).tolist() == [expected] * 256


def test_crops_are_of_the_image_as_shown(tmp_path: Path) -> None:
    # Stored 64x32; shown 32x64 after a quarter turn, its upper half white: white is the left half as stored.
    stored = Image.new("RGB", (64, 32))
    stored.paste((255, 255, 255), (0, 0, 32, 32))
    stored.save(tmp_path / "turned.png", exif=exif(6))
    assert decode(tmp_path / "turned.png").shape == (64, 32, 3)
    found = decode(tmp_path / "turned.png", central_crop(28))[:, :, 0]
    assert (found[:14] == 255).all() and (found[14:] == 0).all()


@pytest.mark.parametrize("keep", [0, 10, 300])
def test_truncated_files_are_named_in_one_line(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "cut.jpg"
    noise(40, 30).save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError) as error:
        decode(path, central_crop(16))
    text = str(error.value)
    assert text.startswith(f"data.root must hold images that can be decoded, got {str(path)!r}: ") and "\n" not in text


def refused(path: Path) -> str:
    with pytest.raises(ValueError) as error:
        decode(path)
    text = str(error.value)
    assert text.startswith(f"data.root must hold images that can be decoded, got {str(path)!r}: ") and "\n" not in text
    return text


@pytest.mark.parametrize("ending", ["bmp", "gif", "jpg", "png", "ppm", "tif", "webp"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_every_format_is_read_whole_or_not_at_all(tmp_path: Path, ending: str, share: float) -> None:
    noise(40, 30).save(path := tmp_path / f"cut.{ending}")
    assert decode(path).shape == (30, 40, 3)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    refused(path)


def test_of_several_frames_the_first_is_read(tmp_path: Path) -> None:
    first, second = (Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0)))
    for ending in ("gif", "png", "tif"):
        first.save(path := tmp_path / f"frames.{ending}", save_all=True, append_images=[second])
        assert decode(path).reshape(-1, 3).tolist() == [[255, 0, 0]] * 64


@pytest.mark.parametrize("level", [65536, -1])
def test_more_than_sixteen_bits_are_refused_not_cut_off(tmp_path: Path, level: int) -> None:
    Image.fromarray(np.full((4, 4), level, np.int32)).save(path := tmp_path / "deep.tif")
    assert refused(path).endswith("pixels of more than 16 bits have no known range")


def test_a_program_called_an_image_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "drawn.jpg"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    assert refused(path).endswith("EPS holds a program that draws, no pixels")


def test_a_bomb_is_refused_by_its_header(tmp_path: Path) -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0))
    path = tmp_path / "bomb.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(90_001))) + chunk(b"IEND", b""))
    assert "900000000 pixels" in refused(path)
