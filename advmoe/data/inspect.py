"""What is wrong with a folder of images before anybody trains on it: damage, doubles, sizes, classes."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median_low
from typing import Any

from advmoe.data.cache import usual_side
from advmoe.data.folder import list_folder
from advmoe.decode import Undecodable, decode
from advmoe.errors import InputError
from advmoe.progress import tracked
from advmoe.text import aligned, few, printable

LONG = 2
"""Times its width that an image is high, or the other way round, from which its middle square shows less than half."""


@dataclass(frozen=True)
class Findings:
    """What `check_folder` saw. Paths are relative to the root."""

    classes: tuple[str, ...]
    counts: dict[str, list[int]]
    """Sound images by part (`train`, `test`) and class."""
    damaged: dict[str, str]
    """Images that cannot be decoded, and why."""
    leaks: list[list[str]]
    """Images of equal pixels that lie in both parts."""
    doubles: list[list[str]]
    """Images of equal pixels that lie in one part."""
    mislabelled: list[list[str]]
    """Images of equal pixels in folders of different classes."""
    sides: dict[str, int]
    """The smallest, the median and the largest of the images' shorter sides, in pixels."""
    image_size: int
    """The side in pixels that images get unless `data.image_size` says otherwise."""
    enlarged: int
    """Images with a shorter side than that."""
    long: list[str]
    """Images of which the middle square shows less than half."""
    notes: tuple[str, ...]

    @property
    def sound(self) -> bool:
        """Whether one can train on the images, and believe what is measured on them."""
        return not (self.damaged or self.leaks or self.mislabelled)

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return asdict(self) | {"sound": self.sound}


@dataclass(frozen=True)
class _Image:
    digest: str
    width: int
    height: int


def check_folder(root: str | os.PathLike[str]) -> Findings:
    """Decode every image of the folder `root` (its layouts: `folder.load_folder`) and look for what spoils a training.

    Equal are images whose pixels are, whatever their files. Raises `InputError` where the folder is none, or has no
    class folders.
    """
    home = Path(root).expanduser()
    folder = list_folder(home)
    seen: dict[str, _Image] = {}
    damaged: dict[str, str] = {}
    listed = [(part, path, label) for part, images in folder.parts.items() for path, label in images]
    for path, result in _looked_at(home, [path for _, path, _ in listed]):
        if isinstance(result, _Image):
            seen[path] = result
        else:
            damaged[path] = result
    if not seen:
        raise InputError(f"data.root must hold images that can be decoded, got none in {str(home)!r}")
    groups = defaultdict[str, list[tuple[str, str, int]]](list)
    counts = {part: [0] * len(folder.classes) for part in folder.parts}
    for part, path, label in listed:
        if path in seen:
            groups[seen[path].digest].append((part, path, label))
            counts[part][label] += 1
    alike = [group for group in groups.values() if len(group) > 1]
    sides = sorted(min(image.width, image.height) for image in seen.values())
    size = usual_side([(image.width, image.height) for image in seen.values()])
    return Findings(
        classes=tuple(map(printable, folder.classes)),
        counts=counts,
        damaged=damaged,
        leaks=[_paths(group) for group in alike if len({part for part, _, _ in group}) > 1],
        doubles=[_paths(group) for group in alike if len({part for part, _, _ in group}) == 1],
        mislabelled=[_paths(group) for group in alike if len({label for _, _, label in group}) > 1],
        sides={"smallest": sides[0], "median": median_low(sides), "largest": sides[-1]},
        image_size=size,
        enlarged=sum(side < size for side in sides),
        long=[
            path
            for path, image in seen.items()
            if max(image.width, image.height) > LONG * min(image.width, image.height)
        ],
        notes=folder.notes,
    )


def _paths(group: list[tuple[str, str, int]]) -> list[str]:
    return [path for _, path, _ in group]


def _looked_at(root: Path, paths: list[str]) -> Iterator[tuple[str, _Image | str]]:
    """Each image, or why it is none, in the order of `paths`; decoded by a thread per core."""

    def look(path: str) -> _Image | str:
        try:
            pixels = decode(root / path)
        except Undecodable as error:
            return error.reason
        height, width = pixels.shape[:2]
        return _Image(hashlib.sha256(f"{width} ".encode() + pixels.tobytes()).hexdigest(), width, height)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        images = zip(paths, pool.map(look, paths), strict=True)
        yield from tracked(images, "images", total=len(paths), unit="image")


def described(found: Findings) -> str:
    """`found` as lines to read."""
    parts = list(found.counts)
    rows = [["class", *parts]]
    rows += [[name, *(str(found.counts[part][k]) for part in parts)] for k, name in enumerate(found.classes)]
    rows.append(["all", *(str(sum(found.counts[part])) for part in parts)])
    lines = [*aligned(rows, "<>"), ""]
    sides = found.sides
    spread = (
        f"{sides['smallest']}"
        if sides["smallest"] == sides["largest"]
        else "{smallest} to {largest}, median {median}".format(**sides)
    )
    lines.append(
        f"shorter sides  {spread} pixels; trained on at {found.image_size} unless data.image_size says otherwise"
    )
    what = (
        (
            "damaged",
            [f"{path}: {why}" for path, why in found.damaged.items()],
            "cannot be decoded: mend or remove them",
        ),
        ("in train and test", _alike(found.leaks), "the same pixels: what is measured on them says nothing"),
        ("in two classes", _alike(found.mislabelled), "the same pixels under two names"),
        ("doubled", _alike(found.doubles), "the same pixels twice in a part"),
        ("long", found.long, "the middle square shows less than half of them"),
    )
    for name, shown, why in what:
        if shown:
            lines.append(f"{name}  {len(shown)} ({why}): {printable(few(shown))}")
    if found.enlarged:
        lines.append(f"enlarged  {found.enlarged} images are smaller than {found.image_size} pixels")
    lines += [f"note  {note}" for note in found.notes]
    return "\n".join(lines)


def _alike(groups: list[list[str]]) -> list[str]:
    return [" = ".join(group[:3]) for group in groups]
