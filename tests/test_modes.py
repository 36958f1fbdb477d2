"""Files are as readable as the user's umask says, weights as all else."""

import os
import stat

import numpy as np
import pytest
import torch

from advmoe.config import Config
from advmoe.files import write_arrays, write_text
from advmoe.models import create_model, save_model
from advmoe.rundir import write_result


@pytest.mark.parametrize(("umask", "files", "folders"), [(0o022, 0o644, 0o755), (0o027, 0o640, 0o750)])
def test_what_is_saved_has_the_usual_permissions(tmp_path, umask, files, folders):
    from advmoe.hub import save_pretrained

    before = os.umask(umask)
    try:
        run = tmp_path / "run"
        run.mkdir()
        model = create_model("resnet18", num_classes=2, width=4, input_size=16)
        save_model(model, run)
        Config().dump(run / "config.yaml")
        write_text(run / "a.txt", "a")
        write_result(run / "b.json", {})
        write_arrays(run / "c.npz", {"c": np.zeros(1)})
        save_pretrained(model, tmp_path / "pretrained")
    finally:
        os.umask(before)
    found = {path.relative_to(tmp_path): stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert {path.name for path in found} >= {"model.safetensors", "model.json", "README.md", "config.yaml"}
    odd = {path: oct(mode) for path, mode in found.items() if mode not in (files, folders)}
    assert odd == {}
    assert all(mode == files for path, mode in found.items() if (tmp_path / path).is_file())


def test_a_checkpoint_too(tmp_path):
    from advmoe.training import checkpoint

    state = checkpoint.TrainingState(weights={"w": torch.zeros(1)}, optimizers=[], progress={})
    before = os.umask(0o027)
    try:
        checkpoint.save(tmp_path / "last", state)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "last").iterdir()}
    assert set(modes) >= {"model.safetensors", "state.pt", "checksums.json"} and set(modes.values()) == {0o640}
