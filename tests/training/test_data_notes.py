"""What a run leaves out of its images: told once, and kept with everything that is made of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from advmoe.config import Config
from advmoe.evaluation.runs import evaluate_run
from advmoe.training.run import train

NOTE = "train: 1 image left out (a file's or a folder's name begins with a dot): 'train/猫/.hidden.png'"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two classes of dark and of bright images, and a hidden one."""
    draw = np.random.default_rng(0)
    for part, number in (("train", 16), ("test", 4)):
        for level, name in enumerate(("dog", "猫")):
            (tmp_path / "images" / part / name).mkdir(parents=True)
            for k in range(number):
                pixels = draw.integers(0, 100, (8, 8, 3), dtype=np.uint8) + 100 * level
                Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "images" / part / name / f"{k}.png")
    (tmp_path / "images" / "train" / "猫" / ".hidden.png").write_bytes(b"")
    return tmp_path / "images"


def settings(images: Path) -> dict[str, dict[str, object]]:
    return {
        "model": {"name": "resnet18", "kind": "dense", "width": 4},
        "data": {"name": "folder", "root": str(images), "val_fraction": 0, "augment": False},
        "training": {"method": "standard", "epochs": 1, "batch_size": 16},
        "attack": {"steps": 1},
    }


def test_what_is_left_out_stands_in_the_manifest_and_in_results(images: Path, tmp_path: Path) -> None:
    run = train(Config.from_dict(settings(images)), run_dir=tmp_path / "run", accelerator="cpu", threads=1)
    assert json.loads((run / "manifest.json").read_text())["data_notes"] == [NOTE]
    assert evaluate_run(run, attacks=["pgd"], workers=1)["data"] == {"name": "folder", "split": "test", "notes": [NOTE]}
    (images / "train" / "猫" / ".hidden.png").unlink()
    assert evaluate_run(run, attacks=["pgd"], workers=1)["data"] == {"name": "folder", "split": "test"}


@pytest.mark.slow
@pytest.mark.parametrize("devices", ["1", "2"])
def test_it_is_told_once_however_many_processes_train(images: Path, tmp_path: Path, devices: str) -> None:
    Config.from_dict(settings(images)).dump(tmp_path / "config.yaml")
    words = ["train", "--config", tmp_path / "config.yaml", "--run-dir", tmp_path / "run", "--devices", devices]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, "-m", "advmoe", *words, "--threads", "1", "--accelerator", "cpu"],
        capture_output=True, env=environment, encoding="utf-8", check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("note  ")] == [f"note  {NOTE}"]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names of folders are text")
def test_a_run_directory_whose_name_is_no_text_is_refused_before_anything_is_made(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"r\xe9un")
    with pytest.raises(ValueError, match=r"^run_dir must be .* UTF-8 .*, got '/"):  # what follows is cut
        train(Config.from_dict(settings(images)), run_dir=folder, accelerator="cpu")
    assert not folder.exists()
