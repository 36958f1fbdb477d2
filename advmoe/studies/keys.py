"""What makes two runs, or two measurements, the same: a hash of all that their results depend on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from advmoe.config import Config, ModelConfig, Pixels, is_source
from advmoe.files import checksum
from advmoe.rundir import digest_at
from advmoe.tables import METHODS
from advmoe.zoo import PREFIX, find

_NO_RESULT = {
    "data": ("root", "download", "workers"),
    "training": ("init_from", "teacher_weights", "checkpoint_minutes"),
}
"""Fields that change no result, or that are told apart by content: where images lie, and what a run starts from."""
_ROUTED = ("num_experts", "router", "router_norm", "route_per", "experts", "experts_init")
"""Fields of the model that say nothing about a plain one."""


def digest(value: Any) -> str:
    """Twelve characters that stand for `value`, which JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def run_key(config: Config, start: str | None = None, teacher: str | None = None) -> str:
    """The key of a training run. `start`, `teacher`: those of the runs that it starts and learns from, where these are
    planned too; any other teacher is told apart by its weights.

    Every field counts but those that change no result: where images lie and how they are read, how the trained model
    is attacked later (`attack`), and what does not concern the model's kind or the method. Fields at their defaults are
    left out, so that a field added later leaves the keys of older runs as they are. Images of one's own are told apart
    by their classes and numbers.
    """
    groups: dict[str, dict[str, Any]] = {
        group: {name: _plain(value) for name, value in vars(getattr(config, group)).items()}
        for group in ("model", "data", "threat", "training")
    }
    model, kind = groups["model"], config.model.kind
    if kind != "moe":
        model.update({name: getattr(ModelConfig(), name) for name in _ROUTED})
    if kind == "dense":
        model["scale"] = ModelConfig().scale
    if config.training.method != "advmoe":
        groups["training"]["alternation"] = _DEFAULTS.training.alternation
    if config.training.teacher is not None:
        known = teacher or _teacher(config.training.teacher, config.training.teacher_weights)
        groups["training"]["teacher"] = known
    # Runs of before the field keep their keys.
    method = METHODS.get(config.training.method)
    norms = method and config.training.fixed_norms
    groups["training"]["frozen_norms"] = None if method is None or norms == method.earlier_norms else norms
    for group, fields in groups.items():
        defaults = vars(getattr(_DEFAULTS, group))
        for name in list(fields):
            if name in _NO_RESULT.get(group, ()) or fields[name] == _plain(defaults[name]):
                del fields[name]
    if config.data.name == "folder":
        groups["data"]["images"] = _listing(config.data.root)
    return digest({"config": groups, "start": start})


_DEFAULTS = Config.from_dict({"training": {"alternation": "both"}})
"""The defaults that keys leave out: those of the first version that had keys. One that changes later changes no key."""


def _teacher(name: str, weights: str | None) -> Any:
    """What tells a teacher apart: checksums; its name where there is nothing of that name."""
    if name.startswith(PREFIX):
        return find(name).digest
    if is_source(name):
        file, _, factory = name.rpartition(":")
        files = [Path(each).expanduser() for each in (file, weights) if each is not None]
        return [factory, *(checksum(each) if each.is_file() else str(each) for each in files)]
    return digest_at(Path(name).expanduser()) or name


def measure_key(kind: str, options: Mapping[str, Any], against: str | None) -> str:
    """The key of a measurement on a run."""
    return f"{kind}-{digest({'options': options, 'against': against})}"


def _plain(value: Any) -> Any:
    return float(value) if isinstance(value, Pixels) else value


@cache
def _listing(root: str) -> dict[str, dict[str, int]]:
    """Classes and numbers of files of an image folder, by split, as its reader sees them: without names that begin
    with a dot, such as the cache's beside the splits. Empty where there is no folder.
    """
    folder = Path(root).expanduser()
    splits = _visible(folder) if folder.is_dir() else []
    return {
        split.name: {each.name: _number(each.path) for each in _visible(split.path) if each.is_dir()}
        for split in splits
        if split.is_dir()
    }


def _number(folder: str) -> int:
    """Of what lies in a class folder and in its sub-folders, whose images are of that class too."""
    entries = _visible(folder)
    return len(entries) + sum(_number(each.path) for each in entries if each.is_dir(follow_symlinks=False))


def _visible(folder: str | Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return [entry for entry in entries if not entry.name.startswith(".")]
