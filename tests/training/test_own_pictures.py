"""A run on a folder of pictures as people have them: no split, no one size, names of classes that travel."""

import json
from pathlib import Path

import pytest
from PIL import Image

from advmoe.config import Config
from advmoe.errors import InputError
from advmoe.evaluation.runs import evaluate_run
from advmoe.models.runs import load_run
from advmoe.training.run import train


def fill(root: Path, number: int = 10, side: int = 40) -> None:
    """Pictures of two colours, each of another size."""
    for name, colour in (("moss", (20, 160, 20)), ("sky", (40, 60, 220))):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(number):
            Image.new("RGB", (side + i, side + 2 * i), colour).save(root / name / f"{side}-{i}.png")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("pictures")
    fill(home / "photos")
    config = Config.from_dict(
        {
            "model": {"name": "wrn-10-1", "width": 4},
            "data": {"name": "folder", "root": str(home / "photos"), "val_fraction": 0.2, "augment": False},
            "training": {"method": "at", "epochs": 1, "batch_size": 4, "attack_steps": 1, "val_attack_steps": 1},
            "attack": {"steps": 1},
        }
    )
    return train(config, run_dir=home / "run", accelerator="cpu", threads=1)


def test_the_run_keeps_the_size_that_was_chosen(run: Path) -> None:
    assert Config.load(run / "config.yaml").data.image_size == 32
    notes = json.loads((run / "manifest.json").read_text())["data_notes"]
    assert any("4 of the 20 images" in note for note in notes) and any("resized to 32" in note for note in notes)
    # Many larger pictures added later: others would get 64 pixels; this run's model goes on with 32.
    fill(run.parent / "photos", number=30, side=100)
    with pytest.raises(InputError, match=r"^data.root must hold the 20 images that the run's test set was drawn from"):
        evaluate_run(run, attacks=["pgd"], workers=1)
    named = {"data": {"root": str(run.parent / "photos")}}  # whose test set, a fifth of 80, the user is asked to know
    assert evaluate_run(run, attacks=["pgd"], workers=1, overrides=named)["num_examples"] == 16
    assert json.loads((run / "manifest.json").read_text())["data_notes"] == notes


def test_predictions_have_the_folders_names(run: Path) -> None:
    model = load_run(run)
    assert model.spec["classes"] == ["moss", "sky"] and model.spec["input_size"] == 32
    told = model.predict(Image.new("RGB", (300, 200), (40, 60, 220)))
    assert set(told.classes) == {"moss", "sky"}


def test_other_classes_than_the_models_are_refused(run: Path) -> None:
    photos = run.parent / "photos"
    (photos / "moss").rename(photos / "zebra")  # now the second by name
    try:
        with pytest.raises(
            InputError, match=r"data must have the model's classes in their order, got 'sky' for 'moss'"
        ):
            evaluate_run(run, attacks=["pgd"], workers=1)
    finally:
        (photos / "zebra").rename(photos / "moss")
