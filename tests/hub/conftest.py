"""A run that nobody has to train."""

import shutil
from pathlib import Path

import pytest

from advmoe.zoo import PACKED

RESULTS = Path(__file__).parents[2] / "docs" / "results"


@pytest.fixture(scope="session")
def stored_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run behind a row of the README's table, with its weights as the zoo has them, and their evaluation."""
    run = Path(shutil.copytree(RESULTS / "table" / "advmoe", tmp_path_factory.mktemp("stored") / "run"))
    for name in ("evaluation.json", "evaluation-examples.npz"):
        shutil.copy(RESULTS / "zoo" / "advmoe" / "all" / name, run)
    for name in ("model.json", "model.safetensors"):
        shutil.copy(PACKED / "advmoe" / name, run)
    return run
