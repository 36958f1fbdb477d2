"""A run that nobody has to train."""

import shutil
from pathlib import Path

import pytest

TABLE = Path(__file__).parents[2] / "docs" / "results" / "table" / "advmoe"


@pytest.fixture(scope="session")
def stored_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The evaluated run behind a row of the README's table."""
    return Path(shutil.copytree(TABLE, tmp_path_factory.mktemp("stored") / "run"))
