"""What a run directory holds, and how far it can be believed: it may come from a stranger, or be damaged.

Nothing in it is a link. Weights carry the digest of the model, results carry that of the model that they are of, and
JSON that numbers are taken from carries a checksum of itself. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from advmoe.documents import parse_object, read_bytes
from advmoe.errors import InputError
from advmoe.files import read_object, write_text
from advmoe.text import cut, few

# What training writes, and the folders of its last and best checkpoints,
CONFIG, MANIFEST, METRICS, MASKS = "config.yaml", "manifest.json", "metrics.jsonl", "masks.json"
MODEL, WEIGHTS = "model.json", "model.safetensors"
LAST, BEST, BOARD = "last", "best", "tensorboard"
# what is measured of a run, and the folders of an evaluation under way: its results so far, and its tasks elsewhere,
EVALUATION, EXAMPLES, JOURNAL = "evaluation.json", "evaluation-examples.npz", ".evaluation"
TASKS = ".evaluation-tasks"
SWEEP, SWEPT = "sweep.json", "sweep-examples.npz"
DISSECTION, PATHWAYS, GALLERY = "dissection.json", "pathways.json", "gallery.npz"
CERTIFICATION = "certification.json"
# and what studies write: of a measurement, of all, how long passes take, and of a run whose weights were dropped.
DONE, STUDY, CALIBRATION, PUT_AWAY = "done.json", "study.json", "calibration.json", "put-away.json"

DIGEST = "model_sha256"
"""The model's digest (`model_digest`), in the header of its weights and in every result."""
CONFIG_DIGEST = "config_sha256"
"""The digest of the configuration that a run began with (`Config.digest`), in its manifest."""
_MOST_METRICS = 256_000_000
"""Bytes of `metrics.jsonl`."""
SEAL = "checksum"
"""The checksum of the rest of a JSON object, in that object."""

MOST_HEADER = 16_000_000
"""Bytes of a weights file's header: those of some 100,000 tensors."""


def require_plain(folder: Path, *, itself: bool = False) -> None:
    """Raise `ValueError` unless all below `folder` are plain files and folders: through a link, a run directory of a
    stranger's would have its reader read, write or delete what lies elsewhere.

    `folder` may be missing, or a link of its user's; with `itself` it must be as plain as what is in it.
    """
    if itself and (os.path.islink(folder) or (os.path.lexists(folder) and not os.path.isdir(folder))):
        raise _not_plain(folder)
    waiting = [folder]
    while waiting:
        with suppress(FileNotFoundError, NotADirectoryError), os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(Path(entry.path))
                elif not entry.is_file(follow_symlinks=False) and os.path.lexists(entry.path):  # not gone meanwhile
                    raise _not_plain(Path(entry.path))


def _not_plain(path: Path) -> InputError:
    mode = path.lstat().st_mode
    kinds = {stat.S_IFLNK: "a link", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFREG: "a file"}
    kind = kinds.get(stat.S_IFMT(mode), "a device")
    return InputError(f"{path} must be a plain file or folder, as all of a run or study must (no links), got {kind}")


# The model


StateEntry = tuple[str, str, Sequence[int], Any]
"""One tensor of a state: name, type as PyTorch writes it, shape, bytes."""

_TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
          "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"}  # fmt: skip
"""PyTorch's names of the types of safetensors."""


def model_digest(spec: Mapping[str, Any], state: Iterable[StateEntry]) -> str:
    """The SHA-256 of a model: of its `spec` (`model.json`) and of its `state`, in the order of names.

    The path of a network of the user's own does not count.
    """
    described = {name: value for name, value in spec.items() if name != "source"}
    digest = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode())
    for name, kind, shape, content in state:
        digest.update(f"{name} {kind} {tuple(shape)}".encode())
        digest.update(content)
    return digest.hexdigest()


def digest_at(folder: Path, *, stored: bool = True) -> str | None:
    """The digest of the model in a run directory; None where no model can be read.

    With `stored` it is the one in the header of the weights, which training wrote there. Without, or where there is
    none, it is computed from the files.
    """
    weights = folder / WEIGHTS
    try:
        with weights.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(MOST_HEADER, weights.stat().st_size):
                return None
            header = parse_object(file.read(length), str(weights))
            if isinstance(known := header.pop("__metadata__", {}).get(DIGEST), str) and stored:
                return known
            return model_digest(read_object(folder / MODEL), _entries(header, file, 8 + length))
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return None


def _entries(header: Mapping[str, Any], file: BinaryIO, start: int) -> Iterator[StateEntry]:
    """The tensors of a safetensors file whose data begin at `start`."""
    for name, each in sorted(header.items()):
        first, end = each["data_offsets"]
        file.seek(start + first)
        yield name, f"torch.{_TYPES[each['dtype']]}", each["shape"], file.read(end - first)


def stored_digest(weights: Path) -> str | None:
    """The digest in the header of a weights file; None where there is none."""
    try:
        with weights.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            known = json.loads(file.read(min(length, MOST_HEADER))).get("__metadata__", {}).get(DIGEST)
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return known if isinstance(known, str) else None


def damaged(folder: Path) -> bool:
    """Whether the weights of a run directory cannot be read, or do not have the digest in their header."""
    try:
        there = (folder / WEIGHTS).stat()
    except OSError:
        return True
    return _damaged(folder, there.st_mtime_ns, there.st_size)


@cache
def _damaged(folder: Path, changed: int, size: int) -> bool:
    """As `damaged`; a file is read once for each time of change (nanoseconds) and size (bytes)."""
    stored, actual = stored_digest(folder / WEIGHTS), digest_at(folder, stored=False)
    return actual is None or stored not in (None, actual)


def put_away(folder: Path) -> int:
    """Drop the weights and checkpoints of a finished run, whose results stay; returns how many bytes that frees.

    `put-away.json` keeps the weights' digest.
    """
    if (digest := digest_at(folder)) is not None:
        write_text(folder / PUT_AWAY, json.dumps({DIGEST: digest}) + "\n")
    checkpoints = [folder / f"{name}{which}" for name in (LAST, BEST) for which in ("", "-previous")]
    files = [folder / WEIGHTS, *(file for path in checkpoints for file in path.rglob("*"))]
    freed = sum(file.stat().st_size for file in files if file.is_file())
    (folder / WEIGHTS).unlink(missing_ok=True)
    for path in checkpoints:
        shutil.rmtree(path, ignore_errors=True)
    return freed


def is_put_away(folder: Path) -> bool:
    """Whether a run's weights were dropped by `put_away`."""
    return (folder / PUT_AWAY).is_file() and not (folder / WEIGHTS).exists()


def put_away_digest(folder: Path) -> str | None:
    """The digest of the model whose weights `put_away` dropped; None where it dropped none."""
    if not is_put_away(folder):
        return None
    digest = read_object(folder / PUT_AWAY).get(DIGEST)
    return digest if isinstance(digest, str) else None


def stale(result: Mapping[str, Any], digest: str | None) -> bool:
    """Whether `result` says that it is of another model than the one with this digest."""
    known = result.get(DIGEST)
    return known is not None and digest is not None and known != digest


def config_note(folder: Path, digest: str) -> str | None:
    """A note where a run's configuration, of this digest, is known not to be what the run began with."""
    if not (path := folder / MANIFEST).is_file():
        return None
    known = read_object(path).get(CONFIG_DIGEST)
    return f"{folder / CONFIG} is not what the run began with" if known not in (None, digest) else None


DRAWN_FROM = "test_drawn_from"
"""In a manifest, where the data have no test set: how many images it was drawn from, and the SHA-256 of their names."""


def require_same_images(folder: Path, drawn_from: tuple[int, str] | None) -> None:
    """Raise `InputError` where the test set that is drawn from so many images, of names with this SHA-256, is not the
    one of the run in `folder`: it would hold images that the run was trained on.
    """
    path = folder / MANIFEST
    known = read_object(path).get(DRAWN_FROM) if drawn_from is not None and path.is_file() else None
    if drawn_from is None or not isinstance(known, dict) or known.get("sha256") == drawn_from[1]:
        return
    raise InputError(
        f"data.root must hold the {known.get('images')} images that the run's test set was drawn from, got "
        f"{drawn_from[0]} or others: of these another test set is drawn, which the run was trained on in part (lay new "
        "pictures elsewhere, or test images in a folder test)"
    )


def diverged_note(folder: Path) -> str | None:
    """A note on a run whose training diverged: its model is the best until then, or the one it started from."""
    if not (path := folder / MANIFEST).is_file() or (why := read_object(path).get("diverged")) is None:
        return None
    return f"the training of {folder} diverged ({cut(str(why), 200)}): its model is of before that"


# Results

_TIMES = ("seconds", "images_per_second", "ms_per_image")


def seal(content: Mapping[str, Any]) -> str:
    """A checksum of `content` as JSON, without the checksum in it and without times: equal numbers, equal checksums."""
    plain = json.loads(
        json.dumps({name: value for name, value in content.items() if name != SEAL}),
        object_pairs_hook=lambda pairs: {name: value for name, value in pairs if name not in _TIMES},
    )
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """`content` with its checksum."""
    return {**content, SEAL: seal(content)}


def unsealed(content: Mapping[str, Any], name: str, *, required: bool = False) -> dict[str, Any]:
    """`content` without its checksum. Content without one (of an earlier version) is accepted unless it is `required`.

    Raises `ValueError`, which calls the content `name`, where the checksum is another one's.
    """
    known = content.get(SEAL)
    if (required or known is not None) and known != (actual := seal(content)):
        raise InputError(f"{name} must be as it was written (checksum {str(known)[:64]}), got {actual}: it is damaged")
    return {key: value for key, value in content.items() if key != SEAL}


def write_result(path: Path, result: Mapping[str, Any], *, indent: int | None = 2) -> dict[str, Any]:
    """Write a result with its checksum, whole or not at all, into a new or an existing folder; returns both."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = sealed(result)
    write_text(path, json.dumps(written, indent=indent) + "\n")
    return written


def read_result(path: Path, *, required: bool = False) -> dict[str, Any]:
    """What `write_result` wrote, as of `unsealed`. Raises `ValueError`, which names the file, where it is damaged."""
    return unsealed(read_object(path), str(path), required=required)


# The epochs


@dataclass(frozen=True)
class Epochs:
    """The epochs of a run, from `metrics.jsonl`, and what is wrong with that file."""

    lines: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @staticmethod
    def read(path: Path, *, strict: bool = False) -> Epochs:
        """The epochs in a file, none where there is no file; damaged lines are left out and named.

        With `strict` raises `ValueError` for a damaged line, unless it is the last: one that was being written.
        """
        if not path.is_file():
            return Epochs()
        epochs, bad = list[dict[str, Any]](), list[str]()
        lines = read_bytes(path, _MOST_METRICS, "lines of JSON").splitlines()
        for number, line in enumerate(lines, start=1):
            try:
                epochs.append(unsealed(parse_object(line, f"line {number}"), f"line {number}"))
            except ValueError as error:
                if strict and number < len(lines):
                    raise InputError(f"{path} must hold JSON in every line, got {error} in line {number}") from None
                bad.append(str(number))
        problems = [f"{path} is damaged in line {few(bad)}, left out"] if bad else []
        known = {line["epoch"] for line in epochs if type(line.get("epoch")) is int}
        if missing := [str(epoch) for epoch in range(1, max(known, default=0) + 1) if epoch not in known]:
            problems.append(f"{path} lacks epoch {few(missing)}")
        return Epochs(epochs, problems)

    def upto(self, epoch: int) -> Epochs:
        """Those of the first `epoch` epochs."""
        lines = [line for line in self.lines if type(line.get("epoch")) is int and line["epoch"] <= epoch]
        return Epochs(lines, self.problems)

    def write(self, path: Path) -> None:
        """Write the lines, whole or not at all, each with its checksum."""
        write_text(path, "".join(json.dumps(sealed(line)) + "\n" for line in self.lines))
