"""What TensorBoard shows, read back from the event files."""

import io
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from advmoe import cli
from advmoe.config import Config
from advmoe.data import load_dataset
from advmoe.training import board as boards
from advmoe.training.board import Board, scalars
from advmoe.training.run import resume, train

pytestmark = pytest.mark.usefixtures("shallow_backbones")

SMALL = {
    "model": {"width": 4, "experts_init": "shared"},
    "data": {"name": "digits", "image_size": 8, "val_fraction": 0.3, "train_examples": 60},
    "threat": {"eps": "0.1"},
    # Both levels in every epoch, short as these are.
    "training": {"alternation": "both", "epochs": 3, "batch_size": 20, "step_size": 0.06, "val_attack_steps": 2},
}
THREADS = {"accelerator": "cpu", "threads": 1}


def events(run):
    """What TensorBoard reads: scalars as {tag: {step: value}}, and images as {tag: {step: their pixels}}."""
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()
    numbers = {tag: [(each.step, each.value) for each in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    pictures = {
        tag: [(each.step, each.encoded_image_string) for each in events.Images(tag)] for tag in events.Tags()["images"]
    }
    return numbers, pictures


def logged(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def tiles(png):
    """The images (8, 8, 8) of a picture of eight, side by side in rows."""
    whole = torch.from_numpy(np.array(Image.open(io.BytesIO(png)).convert("L"))).float() / 255
    return whole.unfold(0, 8, 8).unfold(1, 8, 8).reshape(-1, 8, 8)[:8]


@pytest.fixture
def finished(tmp_path):
    return train(Config.from_dict(SMALL), run_dir=tmp_path / "whole", tensorboard=True, **THREADS)


def test_a_line_as_scalars():
    layer = {"load": [0.25, 0.75, 0.0], "entropy": 0.5, "dead_experts": [2]}
    line = {
        "epoch": 4, "lr": 0.1, "phase": "prune", "train": {"routers": {"ce": 1.5}}, "val": None,
        "layers": [{"layer": 0, **layer}, {"layer": 1, **layer}],
    }  # fmt: skip
    of_layer = {"load/00": 0.25, "load/01": 0.75, "load/02": 0.0, "entropy": 0.5, "dead_experts": 1.0}
    expected = {f"layers/{place}/{name}": value for place in ("00", "01") for name, value in of_layer.items()}
    assert scalars(line) == {"lr": 0.1, "train/routers/ce": 1.5, **expected}
    assert line["layers"][0]["dead_experts"] == [2]


def test_scalars_and_images_of_every_epoch(finished):
    numbers, pictures = events(finished)
    lines = logged(finished)
    assert numbers.keys() == scalars(lines[0]).keys() > {"train/experts/kl", "val/robust_accuracy", "layers/01/load/00"}
    for tag, values in numbers.items():
        assert [step for step, _ in values] == [1, 2, 3]
        assert [value for _, value in values] == pytest.approx([scalars(line)[tag] for line in lines], rel=1e-6)
    # Eight of the 18 held-out digits, laid out side by side; the attack stays within eps, and moves.
    val = load_dataset("digits", image_size=8, val_fraction=0.3, train_examples=60).val
    shown = val.pixels(torch.linspace(0, 17, 8).long())[:, 0]
    assert pictures.keys() == {"val/clean", "val/adversarial"}
    for (step, clean), (other, adversarial) in zip(pictures["val/clean"], pictures["val/adversarial"], strict=True):
        assert step == other
        clean, adversarial = (tiles(png) for png in (clean, adversarial))
        torch.testing.assert_close(clean, shown, rtol=0, atol=1 / 255)
        assert 0.05 < (adversarial - clean).abs().max() <= 0.1 + 1 / 255
    assert sorted(path.name for path in (finished / "tensorboard").iterdir()) == [
        f"events.out.tfevents.epoch-00000{epoch}" for epoch in (1, 2, 3)
    ]
    assert not (finished / ".tensorboard.partial").exists()


def test_a_resumed_run_goes_on_without_duplicates_and_trains_the_same(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "last")  # stopped within the third epoch, which was shown already
    (run / ".tensorboard.partial").mkdir()
    (run / ".tensorboard.partial" / "torn").touch()
    resume(run)
    numbers, pictures = events(run)
    for entries in (*numbers.values(), *pictures.values()):
        assert [step for step, _ in entries] == [1, 2, 3]
    alone = train(Config.from_dict(SMALL), run_dir=tmp_path / "alone", **THREADS)
    assert not (alone / "tensorboard").exists()
    for name in ("last/model.safetensors", "model.safetensors"):
        ours, theirs = load_file(run / name), load_file(alone / name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    # Begun after the run's end: all its epochs, but no images of those that are over.
    resume(alone, tensorboard=True)
    numbers, pictures = events(alone)
    assert [value for _, value in numbers["lr"]] == pytest.approx([line["lr"] for line in logged(alone)])
    assert not pictures


def test_no_images_without_a_validation_split(tmp_path):
    config = {**SMALL, "data": {**SMALL["data"], "val_fraction": 0.0}, "training": {**SMALL["training"], "epochs": 1}}
    run = train(Config.from_dict(config), run_dir=tmp_path / "run", tensorboard=True, **THREADS)
    numbers, pictures = events(run)
    assert not pictures and "train/routers/ce" in numbers and not any(tag.startswith("val/") for tag in numbers)


def test_what_metrics_do_not_hold_is_dropped(tmp_path):
    board = Board(tmp_path)
    lines = [{"epoch": epoch, "lr": 0.1 * epoch, "layers": []} for epoch in (1, 2, 3, 12)]
    for line in lines:
        board.write(line, {})
    board.follow(lines[:2])
    assert events(tmp_path)[0] == {"lr": [(1, pytest.approx(0.1)), (2, pytest.approx(0.2))]}
    board.write(lines[2] | {"lr": 7.0}, {})
    board.write(lines[2] | {"lr": 8.0}, {})  # an epoch trained again
    assert events(tmp_path)[0]["lr"][2:] == [(3, 8.0)]


def test_the_command_line_shows_epochs_and_names_the_missing_extra(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Config.from_dict({**SMALL, "training": {**SMALL["training"], "epochs": 1}}).dump("small.yaml")
    words = ["train", "--config", "small.yaml", "--accelerator", "cpu", "--threads", "1"]
    assert cli.main([*words, "--run-dir", "run", "--tensorboard"]) == 0
    assert [step for step, _ in events(tmp_path / "run")[0]["lr"]] == [1]
    capsys.readouterr()
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    before = sorted(tmp_path.rglob("*"))
    for more in (["--run-dir", "other", "--tensorboard"], ["--resume", "run"]):
        assert cli.main([*(words if "other" in more else ["train"]), *more]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1
        assert "--tensorboard needs the extra tensorboard: pip install 'advmoe[tensorboard]', got: " in err
    assert sorted(tmp_path.rglob("*")) == before
    assert cli.main([*words, "--run-dir", "other"]) == 0
    with pytest.raises(ValueError, match="needs the extra tensorboard"):
        boards.require_tensorboard()
