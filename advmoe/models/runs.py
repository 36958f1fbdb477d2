"""The model of a run directory."""

from __future__ import annotations

from pathlib import Path

from advmoe.config import require
from advmoe.models import Classifier, load_model
from advmoe.models.sources import load_module


def load_run(path: str | Path, source: str | None = None) -> Classifier:
    """The model of a run directory, in eval mode on the CPU. Raises `ValueError` naming what is missing or damaged.

    Args:
        source: `FILE.py:FACTORY` of the network, where the run trained one of the user's own. It is executed; what the
            run itself names never is.
    """
    require(path != "", "the run", "a run directory", path)
    return load_model(Path(path), None if source is None else load_module(source))
