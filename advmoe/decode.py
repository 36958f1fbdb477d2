"""One picture to 8-bit RGB: as it is, its middle square, or a crop as ImageNet models are trained and measured on.

Axes: `C` channels (always 3), `H W` size. EXIF orientation is applied first: sizes are those of the image as shown.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from advmoe.errors import InputError
from advmoe.text import one_line

if TYPE_CHECKING:
    from PIL import Image

Bytes = npt.NDArray[np.uint8]

Crop = Callable[["Image.Image"], "Image.Image"]
"""What is done to an RGB image before its pixels are taken."""

# ImageNet's customary evaluation: a shorter side of 256 for crops of 224 (Krizhevsky et al., NeurIPS 2012).
_CROP_SHARE = 224 / 256
# Inception-style training crops (Szegedy et al., CVPR 2015): share of the area, and width over height.
_AREA = (0.08, 1.0)
_RATIO = (3 / 4, 4 / 3)
_TRIES = 10
# Programs, not pixels: Pillow has others run them (EPS by Ghostscript), whatever the file is called.
_PROGRAMS = ("EPS", "WMF")


class Undecodable(InputError):
    """A file that is no picture, or a damaged one."""

    def __init__(self, path: Path, error: Exception) -> None:
        self.path, self.reason = path, one_line(error)
        super().__init__(f"data.root must hold images that can be decoded, got {str(path)!r}: {self.reason}")


def shorter_side(path: Path) -> int:
    """The smaller of an image's height and width, in pixels, by what the file says of itself. Raises as `decode`."""
    from PIL import Image

    try:
        with Image.open(path) as opened:
            return min(opened.size)
    except Exception as error:
        raise Undecodable(path, error) from error


def decode(path: Path, crop: Crop | None = None) -> Bytes:
    """Read one file as RGB, (H, W, C).

    Grey, palette and CMYK images become RGB; an alpha channel is dropped; 16-bit grey is scaled to 8 bits; of several
    frames or pages the first is read.

    Raises:
        ValueError: One line with the path, if the file cannot be read whole, its pixels have no known range, or it has
            more of them than Pillow allows (`MAX_IMAGE_PIXELS` twice: 179 million).
    """
    from PIL import Image

    try:
        with Image.open(path) as opened:
            if opened.format in _PROGRAMS:
                raise InputError(f"{opened.format} holds a program that draws, no pixels")
            return rgb(opened, crop)
    # Pillow's decoders raise errors of many kinds; which one says nothing more than the path and its text.
    except Exception as error:
        raise Undecodable(path, error) from error


def rgb(picture: Image.Image, crop: Crop | None = None) -> Bytes:
    """What `decode` makes of a picture that Pillow has opened, (H, W, C)."""
    from PIL import ImageOps

    shown = ImageOps.exif_transpose(picture)
    image = _to_rgb(shown)
    image.load()
    return np.asarray(image if crop is None else crop(image))


def middle_square(size: int) -> Crop:
    """Crop to the middle square, then resize to `size` (bicubic, antialiased); an image of that size stays."""

    def crop(image: Image.Image) -> Image.Image:
        from PIL import Image

        if image.size == (size, size):
            return image
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        # Cropped first: with a box, Pillow's filter would take in pixels from outside of it.
        square = image.crop((left, top, left + side, top + side))
        return square.resize((size, size), Image.Resampling.BICUBIC)

    return crop


def central_crop(size: int) -> Crop:
    """Resize the shorter side to `size` * 256 / 224 (bilinear, antialiased), then crop to the middle `size`."""

    def crop(image: Image.Image) -> Image.Image:
        from PIL import Image

        shorter, resized = min(image.size), round(size / _CROP_SHARE)
        width, height = (side * resized // shorter for side in image.size)
        left, top = (width - size) // 2, (height - size) // 2
        x, y = image.width / width, image.height / height
        # One step for both: of the resized image only the crop is computed.
        box = (left * x, top * y, (left + size) * x, (top + size) * y)
        return image.resize((size, size), Image.Resampling.BILINEAR, box=box)

    return crop


def random_crop(size: int, seed: int, *, flip: bool) -> Crop:
    """Resize a random box of the image to `size` (bilinear, antialiased), and flip every other one left to right.

    `seed` alone decides what is drawn (see `random_box`).
    """

    def crop(image: Image.Image) -> Image.Image:
        from PIL import Image

        draws = random.Random(seed)
        left, top, width, height = random_box(*image.size, draws)
        box = image.crop((left, top, left + width, top + height))
        resized = box.resize((size, size), Image.Resampling.BILINEAR)
        return resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip and draws.random() < 0.5 else resized

    return crop


def random_box(width: int, height: int, draws: random.Random) -> tuple[int, int, int, int]:
    """Left, top, width and height of a random box within an image, as in Szegedy et al. (CVPR 2015), sec. 6.

    8% to 100% of the area, uniform; an aspect ratio between 3/4 and 4/3, uniform in its logarithm. Where ten draws do
    not fit into the image, the middle of it, as much as those ratios allow.
    """
    low, high = _RATIO
    for _ in range(_TRIES):
        area = width * height * draws.uniform(*_AREA)
        ratio = math.exp(draws.uniform(math.log(low), math.log(high)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return draws.randint(0, width - w), draws.randint(0, height - h), w, h
    w, h = min(width, max(1, round(height * high))), min(height, max(1, round(width / low)))
    return (width - w) // 2, (height - h) // 2, w, h


CUTS: dict[str, Callable[[int], Crop]] = {"middle-square": middle_square, "central-crop": central_crop}
"""How a picture of any shape becomes one of a model's size."""


def _to_rgb(image: Image.Image) -> Image.Image:
    """Return the image in 8-bit RGB."""
    from PIL import Image

    if image.mode == "F":
        raise InputError("floating-point pixels have no known range")
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow would cut values off at 255 here instead of scaling them. 65535 / 257 = 255.
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise InputError("pixels of more than 16 bits have no known range")
        grey = (grey + 128) // 257
        image = Image.fromarray(grey.astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")
