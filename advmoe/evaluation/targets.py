"""What is measured, as the user names it: a run directory, or `FILE.py:FACTORY`. Imports no torch."""

from __future__ import annotations

import re
from pathlib import Path


def is_source(text: str) -> bool:
    """Whether `text` means a Python file and a name in it (`model.py:net`), not a run directory.

    A file with its name missing or misspelt is meant as one too, so that `load_classifier` can say what is wrong.
    """
    return re.fullmatch(r".*\.py(:[^/\\]*)?", text) is not None


def home_of(target: str, out: str | Path | None = None) -> Path:
    """Where results about `target` are written: `out`, or the run itself, or `evaluations/<file>-<factory>`."""
    if out is not None:
        return Path(out)
    file, _, factory = target.rpartition(":")
    return Path("evaluations") / f"{Path(file).stem}-{factory}" if is_source(target) else Path(target)
