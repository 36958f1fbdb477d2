"""The model zoo: trained models by name, each with what was measured of it.

A zoo is a folder, or an http(s) address, that holds `index.json` and a folder for each model. One is packed with this
library; the environment variable `ADVMOE_ZOO` names another, whose models come before those of the same name here.
"""

from __future__ import annotations

import http.client
import os
import re
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from advmoe.documents import MOST_JSON, parse_object
from advmoe.errors import InputError
from advmoe.files import checksum, read_object
from advmoe.rundir import CONFIG, MODEL, WEIGHTS
from advmoe.tables import KINDS
from advmoe.text import nearest, one_line, printable, show

if TYPE_CHECKING:
    from advmoe.models import Classifier

PREFIX = "zoo:"
"""What a model's name begins with where a run directory may stand: `zoo:advmoe`."""
PLACE = "ADVMOE_ZOO"
"""The environment variable that names another zoo."""
PACKED = Path(__file__).parent
INDEX = "index.json"
FILES = (CONFIG, MODEL, WEIGHTS)
"""The files of a model: those of a run directory that evaluation, prediction and export read."""
TIMEOUT = 30.0
"""Seconds without an answer after which an index is given up."""

NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Measured:
    """A share of images, as a fraction, and of how many."""

    value: float
    images: int

    @property
    def count(self) -> int:
        """How many of the images."""
        return round(self.value * self.images)


@dataclass(frozen=True)
class Time:
    """Milliseconds that an image took, and on what."""

    ms: float
    setting: str


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A model of a zoo, as its index tells of it."""

    name: str
    zoo: str | Path
    """The folder or the address of the zoo."""
    told: dict[str, Any]
    """All that the index holds of it."""
    title: str
    url: str
    """The folder of its files: an address, or a path within the zoo."""
    files: dict[str, str]
    """The SHA-256 of each of `FILES`."""
    digest: str
    """Of the model (`rundir.model_digest`)."""
    licence: str
    data: str
    model: str
    """Backbone, kind, and the method that trained it."""
    norm: str
    eps: float
    accuracy: dict[str, Measured]
    """`clean`, and robust accuracy by attack, each on the most images that it was measured on."""
    worst_case: Measured
    attacks: tuple[str, ...]
    """Those of the worst case."""
    masking_gap: float | None
    flags: tuple[str, ...]
    """What attacks say against their own numbers."""
    gmacs: float
    parameters: int
    active_parameters: int
    time: Time | None
    same: Measured
    """The share of images on which these weights, rounded to float16, predict what the evaluated ones did."""
    routed: bool

    @staticmethod
    def of(name: str, told: Any, zoo: str | Path) -> Entry:
        """The entry `name` of the index of `zoo`. Raises `ValueError` for one that `advmoe zoo entry` cannot have
        written.
        """
        try:
            worst, threat, cost, agreement = (told[key] for key in ("worst_case", "threat", "cost", "agreement"))
            entry = Entry(
                name=name, zoo=zoo, told=told, title=_text(told["title"]), url=str(told["url"]).rstrip("/"),
                files={file: str(told["files"][file]) for file in FILES}, digest=str(told["model_sha256"]),
                licence=_text(told["licence"]), data=_text(told["data"]),
                model=_text(f"{told['architecture']} ({told['kind']}), trained by {told['method']}"),
                norm=_text(threat["norm"]), eps=float(threat["eps"]),
                accuracy={_text(key): _measured(e["value"], e["images"]) for key, e in told["accuracy"].items()},
                worst_case=_measured(worst["value"], worst["images"]), attacks=tuple(map(_text, worst["attacks"])),
                masking_gap=None if told["masking_gap"] is None else float(told["masking_gap"]),
                flags=tuple(_text(f"{attack}: {flag}") for attack, flags in told["flags"].items() for flag in flags),
                gmacs=float(cost["gmacs"]), parameters=int(cost["parameters"]),
                active_parameters=int(cost["active_parameters"]),
                time=Time(float(cost["ms_per_image"]), _setting(cost)) if "hardware" in cost else None,
                same=_measured(agreement["same"] / agreement["images"], agreement["images"]),
                routed=told["kind"] == "moe",
            )  # fmt: skip
            sound = NAME.fullmatch(name) and all(map(_SHA256.fullmatch, (entry.digest, *entry.files.values())))
            sound = sound and told["kind"] in KINDS and isinstance(worst["attacks"], list)
            sound = sound and 0 <= entry.eps <= 10_000 and 0 < entry.gmacs <= 1e6 and abs(entry.masking_gap or 0) <= 1
            sound = sound and 0 < entry.active_parameters <= entry.parameters <= 10**12
            if not (sound and "clean" in entry.accuracy and (online(entry.url) or NAME.fullmatch(entry.url))):
                raise ValueError(name)
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise InputError(
                f"{zoo}/{INDEX} must hold entries as `advmoe zoo entry` writes them, got {show(name)} with {show(told)}"
            ) from error
        return entry

    def folder(self) -> Path:
        """The folder of its files, each with its checksum: where they lie or, of an address, in the user's cache, to
        which they are downloaded first. Raises `ValueError` for a file that is missing, damaged or not to be had.
        """
        address = self.url if online(self.url) else f"{self.zoo}/{self.url}"
        if not online(address):
            for file, expected in self.files.items():
                path = Path(address, file)
                got = checksum(path) if path.is_file() else "no file"
                if got != expected:
                    raise InputError(f"{path} must be the file of {PREFIX}{self.name} (SHA-256 {expected}), got {got}")
            return Path(address)
        from advmoe.data.download import fetch

        folder = _cache() / f"{self.name}-{self.digest[:16]}"
        for file, expected in self.files.items():
            fetch(f"{address}/{file}", folder / file, expected, kind="sha256", fields=(PREFIX + self.name, "the cache"))
        return folder


def _measured(value: Any, images: Any) -> Measured:
    measured = Measured(float(value), int(images))
    if not (0 <= measured.value <= 1 and 1 <= measured.images <= 1_000_000_000):
        raise ValueError(value)
    return measured


def _setting(cost: dict[str, Any]) -> str:
    return _text(f"{cost['hardware']}, batch {cost['batch']}, {cost['threads']} threads")


def _text(told: Any) -> str:
    """A text of an index, which may be anybody's, as a terminal can show it."""
    return printable(str(told))


def entries() -> dict[str, Entry]:
    """The models by name: those of `ADVMOE_ZOO`, if it is set, then those packed here. Raises `ValueError` for a zoo
    that cannot be read.
    """
    other = os.environ.get(PLACE)
    first = {} if not other else entries_of(other.rstrip("/") if online(other) else Path(other))
    return first | {name: entry for name, entry in entries_of(PACKED).items() if name not in first}


def entries_of(zoo: str | Path) -> dict[str, Entry]:
    """The models of one zoo, a folder or an address, by name. Raises `ValueError` where it cannot be read."""
    models = _index(zoo).get("models")
    if not isinstance(models, dict):
        raise InputError(f"{zoo}/{INDEX} must hold an object `models`, got {show(models)}")
    return {name: Entry.of(name, told, zoo) for name, told in models.items()}


def _index(zoo: str | Path) -> dict[str, Any]:
    path = f"{zoo}/{INDEX}"
    if not online(path):
        if not Path(path).is_file():
            raise InputError(f"{PLACE} must be a folder or an address that holds {INDEX}, got {str(zoo)!r}")
        return read_object(Path(path), finite=True)
    try:
        with urllib.request.urlopen(path, timeout=TIMEOUT) as response:
            text = response.read(MOST_JSON + 1)
    except (OSError, ValueError, http.client.HTTPException) as error:  # an address that is none is a `ValueError`
        raise InputError(
            f"{PLACE} must be a folder or an address that holds {INDEX}, got {str(zoo)!r}: {one_line(error)}"
        ) from error
    if len(text) > MOST_JSON:
        raise InputError(f"{path} must be JSON of at most {MOST_JSON} bytes, got more")
    return parse_object(text, path, finite=True)


def online(address: str) -> bool:
    """Whether this is an address, not a folder."""
    return address.startswith(("https://", "http://"))


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path(os.path.expanduser("~")) / ".cache") / "advmoe" / "zoo"


def find(name: str) -> Entry:
    """The model `name`, with `zoo:` before it or without. Raises `ValueError` for an unknown one."""
    known, name = entries(), name.removeprefix(PREFIX)
    if name not in known:
        rule = f"{PREFIX}NAME must be one of {', '.join(known)}"
        raise InputError(f"{rule}, got {show(name)}{nearest(name, known)}")
    return known[name]


def load(name: str | Path, source: str | None = None) -> Classifier:
    """The model called `zoo:NAME`, or that of a run directory, in eval mode on the CPU.

    Args:
        name: of a model that `advmoe zoo list` prints, or the path of a run.
        source: `FILE.py:FACTORY` of the network, where a run trained one of the user's own: see `load_run`.

    Runs no code from what it loads. Raises `ValueError` of one line for an unknown name, or files that are missing,
    damaged or not to be had.
    """
    from advmoe.models.runs import load_run

    if not (isinstance(name, str) and name.startswith(PREFIX)):
        return load_run(name, source)
    entry = find(name)
    model = load_run(entry.folder(), source)
    assert model.origin is not None
    if model.origin.digest != entry.digest:
        rule = f"must be the model of the index (SHA-256 {entry.digest[:16]})"
        raise InputError(f"{PREFIX}{entry.name} {rule}, got {model.origin.digest[:16]}")
    return model
