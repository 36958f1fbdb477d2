"""What a training that was killed before its first checkpoint leaves: nothing that stands in the way of a new one.

One rule says which directories a training may start in. Imports no torch, as the command line asks too.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from advmoe.files import read_object
from advmoe.locks import CLAIM
from advmoe.rundir import CONFIG, MANIFEST, METRICS, MODEL, WEIGHTS

_EVENTS = "events.out.tfevents."
START_ANEW = "it was killed before its first checkpoint, so start it anew there by the command that began it"
"""What to do with a directory that is `begun`."""


def startable(folder: Path) -> bool:
    """Whether a training may start in `folder`: it is new or empty, or holds leftovers of ours alone."""
    if not folder.exists():
        return not folder.is_symlink()
    return folder.is_dir() and all(_is_left(each) for each in folder.iterdir())


def clear(folder: Path) -> None:
    """Delete the leftovers in `folder`, which must be `startable`, but for the claim of whoever trains there."""
    # The manifest last: it is by this that the others are known as ours.
    for each in sorted(folder.iterdir(), key=lambda each: each.name == MANIFEST):
        if each.name == CLAIM:
            continue
        if each.is_dir():
            shutil.rmtree(each)
        else:
            each.unlink()


def begun(folder: Path) -> bool:
    """Whether a training of ours began in `folder` and left nothing to continue."""
    return folder.is_dir() and startable(folder) and any(folder.iterdir())


def _is_left(path: Path) -> bool:
    """Whether a training leaves this before its first checkpoint. Links are nobody's leftovers."""
    name, folder = path.name, path.parent
    if path.is_symlink() or not (path.is_dir() or path.is_file()):
        return False
    if (name.startswith(".") and name.endswith(".partial")) or (name == CLAIM and path.is_file()):
        return True
    if not _is_unfinished(folder / MANIFEST):  # which is what a run has first
        return False
    if path.is_dir():
        return name == "tensorboard" and all(each.name.startswith(_EVENTS) for each in path.iterdir())
    if name == METRICS:  # the line of an epoch comes before its checkpoint
        return path.read_bytes().count(b"\n") <= 1
    # A model is that which the run started from, where it diverged before there was another.
    return name in (MANIFEST, CONFIG, MODEL, WEIGHTS)


def _is_unfinished(manifest: Path) -> bool:
    """Whether this is the manifest of a run that has not come to its end."""
    if manifest.is_symlink() or not manifest.is_file():
        return False
    try:
        content = read_object(manifest)
    except ValueError:
        return False
    return {"name", "command", "devices", "threads"} <= content.keys() and content.get("finished") is None
