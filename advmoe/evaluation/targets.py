"""What is measured, as the user names it: a run directory, or `FILE.py:FACTORY`. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from advmoe.config import is_source


def home_of(target: str, out: str | Path | None = None) -> Path:
    """Where results about `target` are written: `out`, or the run itself, or `evaluations/<file>-<factory>`."""
    if out is not None:
        return Path(out)
    file, _, factory = target.rpartition(":")
    return Path("evaluations") / f"{Path(file).stem}-{factory}" if is_source(target) else Path(target)
