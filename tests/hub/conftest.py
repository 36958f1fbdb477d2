"""A run that nobody has to train."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def stored_run() -> Path:
    """An evaluated run of this repository's results."""
    return Path(__file__).parents[2] / "docs" / "results" / "table" / "advmoe"
