"""A run that nobody has to train."""

import shutil
from pathlib import Path

import pytest

from advmoe.zoo import PACKED

TABLE = Path(__file__).parents[2] / "docs" / "results" / "table" / "advmoe"


@pytest.fixture(scope="session")
def stored_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The evaluated run behind a row of the README's table, with its weights as the zoo has them."""
    run = Path(shutil.copytree(TABLE, tmp_path_factory.mktemp("stored") / "run"))
    for name in ("model.json", "model.safetensors"):
        shutil.copy(PACKED / "advmoe" / name, run)
    return run
