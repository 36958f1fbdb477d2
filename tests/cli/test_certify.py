"""`advmoe certify`: options, what is printed and written, and bad input in one line."""

import json

import pytest

from advmoe.cli import main
from advmoe.config import Config
from advmoe.training.run import train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    groups = {
        "model": {"width": 4, "router": "fixed-mean"}, "data": {"name": "digits", "train_examples": 64},
        "training": {"method": "at", "epochs": 1, "batch_size": 32, "attack_steps": 1, "val_attack_steps": 1},
    }  # fmt: skip
    return train(Config.from_dict(groups), run_dir=tmp_path_factory.mktemp("runs") / "fixed")


def test_certify(run, capsys):
    assert main(["certify", str(run), "--radii", "1/255,8/255", "--num-examples", "20"]) == 0
    said = capsys.readouterr().out
    assert "20 images, linf" in said and "1/255" in said and "certification.svg" in said
    assert [each["eps"] for each in json.loads((run / "certification.json").read_text())["points"]] == [
        1 / 255,
        8 / 255,
    ]
    assert (run / "certification.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize("radii", ["wide", "-1", ","])
def test_bad_radii_are_one_line(run, radii, capsys):
    assert main(["certify", str(run), f"--radii={radii}"]) == 2
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1 and said


def test_a_plain_run_is_refused(tmp_path, capsys):
    assert main(["certify", str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
