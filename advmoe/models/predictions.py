"""Predictions: from pictures, however they are given, to the names of their classes.

Axes: `N` images, `C` channels, `H W` size, `K` classes, `L` MoE layers. Pixels are in [0, 1].
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from advmoe.decode import CUTS, Bytes, Undecodable, decode, rgb
from advmoe.errors import InputError
from advmoe.text import one_line, show

if TYPE_CHECKING:
    from PIL import Image

Picture: TypeAlias = "str | os.PathLike[str] | Image.Image | npt.NDArray[Any] | Tensor"
"""A file; an image of Pillow's; bytes 0 to 255 (H, W) or (H, W, C); or pixels in [0, 1], (C, H, W)."""

_AT_ONCE = 64


@dataclass(frozen=True)
class Prediction:
    """What a model says of one picture."""

    classes: tuple[str, ...]
    """The names of the most probable classes, the most probable first."""
    probabilities: tuple[float, ...]
    """Of those classes."""
    pathway: tuple[int, ...] | None
    """The expert that each MoE layer chose, (L); None for a plain model, and where tokens are routed one by one."""


Network = Callable[[Tensor], tuple[Tensor, Tensor | None]]
"""Pixels (N, C, H, W) -> logits (N, K), and the pathways (N, L) or (N, L, T), if there are any."""


def predict(network: Network, spec: Mapping[str, Any], pictures: Picture | Sequence[Picture], top: int) -> Any:
    """What `network`, whose model `spec` describes, says of pictures: a `Prediction` of one, a list of several (a list,
    or a batch of pixels (N, C, H, W)).

    A picture of another size is cut and resized as the images were that the model was trained for; pixels must have the
    model's size. Raises `InputError` that names the first picture which cannot be used.
    """
    if not isinstance(top, int) or isinstance(top, bool) or top < 1:
        raise InputError(f"top must be a whole number >= 1, got {show(top)}")
    if isinstance(pictures, list | tuple) or getattr(pictures, "ndim", 0) == 4:
        return _predictions(network, spec, pictures, top)  # type: ignore[arg-type]
    return _predictions(network, spec, [pictures], top)[0]  # type: ignore[list-item]


def _predictions(network: Network, spec: Mapping[str, Any], pictures: Iterable[Picture], top: int) -> list[Prediction]:
    names = class_names(spec)
    made = list[Prediction]()
    pixels = [_pixels(picture, spec) for picture in pictures]
    for start in range(0, len(pixels), _AT_ONCE):
        logits, pathway = network(torch.stack(pixels[start : start + _AT_ONCE]))
        shares, order = logits.softmax(1).sort(dim=1, descending=True, stable=True)
        ways = pathway.tolist() if pathway is not None and pathway.dim() == 2 else [None] * len(logits)
        for probabilities, classes, way in zip(shares[:, :top].tolist(), order[:, :top].tolist(), ways, strict=True):
            made.append(
                Prediction(tuple(names[k] for k in classes), tuple(probabilities), None if way is None else tuple(way))
            )
    return made


def class_names(spec: Mapping[str, Any]) -> list[str]:
    """The names of a model's classes: numbers where it knows none."""
    if spec.get("classes") is None and spec.get("num_classes") is None:
        raise InputError("a model must know its number of classes (to_moe learns it of an `example`), got none")
    return list(spec.get("classes") or map(str, range(spec["num_classes"])))


def require_labels(spec: Mapping[str, Any]) -> None:
    """Raise `InputError` unless what a description says of classes and pictures can be: K names, of which some may
    be equal (as ImageNet's), a known cut.
    """
    classes, cut = spec.get("classes"), spec.get("cut")
    if classes is not None:
        sound = isinstance(classes, Sequence) and not isinstance(classes, str)
        sound = sound and all(isinstance(name, str) for name in classes) and len(classes) == spec["num_classes"]
        if not sound:
            raise InputError(f"classes must be {spec['num_classes']} names, got {show(classes)}")
    if cut is not None and cut not in CUTS:
        raise InputError(f"cut must be one of {', '.join(CUTS)}, got {show(cut)}")


def _pixels(picture: Picture, spec: Mapping[str, Any]) -> Tensor:
    """One picture as the model takes it, (C, H, W) float32 in [0, 1]."""
    if isinstance(picture, Tensor):
        return _checked(picture.detach().cpu(), spec)
    if isinstance(picture, np.ndarray) and picture.dtype != np.uint8:
        if picture.dtype.kind != "f":
            raise InputError(f"pixels must be floats in [0, 1] or bytes, got an array of {picture.dtype}")
        # PyTorch knows neither another machine's order of bytes nor numbers of 16 bytes.
        native = np.ascontiguousarray(picture, np.float32 if picture.dtype.itemsize <= 4 else np.float64)
        return _checked(torch.from_numpy(native), spec)
    size = spec["input_size"]
    if size is None:
        raise InputError("a model without an input size must get pixels (C, H, W) in [0, 1], got a picture")
    prepare = CUTS[spec.get("cut") or "middle-square"](size)
    from PIL import Image

    sides = picture.size if isinstance(picture, Image.Image) else getattr(picture, "shape", ())
    if 0 in sides:
        raise InputError(f"an image must have pixels, got {tuple(sides)}")
    if isinstance(picture, str | os.PathLike):
        if (name := os.fspath(picture)) == "" or "://" in str(name):
            raise InputError(f"an image must be a file on this machine, got {show(name)}")
        path = Path(picture)
        try:
            bytes_: Bytes = decode(path, prepare)
        except Undecodable as error:
            raise InputError(
                f"an image must be a picture that can be decoded, got {str(path)!r}: {error.reason}"
            ) from None
    elif isinstance(picture, Image.Image):
        try:
            bytes_ = rgb(picture, prepare)
        except Exception as error:  # as of `decode`
            raise InputError(
                f"an image must be a picture that can be decoded, got {show(picture)}: {one_line(error)}"
            ) from error
    elif isinstance(picture, np.ndarray) and (
        picture.ndim == 2 or (picture.ndim == 3 and picture.shape[2] in (1, 3, 4))
    ):
        grey = picture.ndim == 3 and picture.shape[2] == 1
        bytes_ = rgb(Image.fromarray(picture[:, :, 0] if grey else picture), prepare)
    else:
        got = f"an array of shape {picture.shape}" if isinstance(picture, np.ndarray) else show(picture)
        raise InputError(
            f"an image must be a file, a picture of Pillow's, bytes (H, W, C) or pixels (C, H, W), got {got}"
        )
    if spec["in_channels"] == 1:
        bytes_ = np.asarray(Image.fromarray(bytes_).convert("L"))[:, :, None]
    return torch.from_numpy(bytes_.transpose(2, 0, 1).copy()).float() / 255


def _checked(pixels: Tensor, spec: Mapping[str, Any]) -> Tensor:
    """Pixels, or bytes, (C, H, W) of the model's own shape, as float32 in [0, 1]."""
    side, channels = spec["input_size"], spec["in_channels"]
    wanted = (channels or pixels.shape[0], *((side, side) if side is not None else pixels.shape[1:]))
    if pixels.dim() != 3 or tuple(pixels.shape) != wanted:
        raise InputError(f"pixels must have the shape {wanted} of the model's images, got {tuple(pixels.shape)}")
    if pixels.dtype == torch.uint8:
        return pixels.float() / 255
    if not pixels.is_floating_point():
        raise InputError(f"pixels must be floats in [0, 1] or bytes, got {pixels.dtype}")
    low, high = pixels.min().item(), pixels.max().item()
    if not (low >= 0 and high <= 1):
        raise InputError(f"pixels must be in [0, 1], got {low:.6g} to {high:.6g}")
    return pixels.float()
