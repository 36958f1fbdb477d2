"""A checkpoint as files: what is written, what of its run travels, and what an earlier one leaves."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import advmoe
from advmoe import __version__
from advmoe.config import Config
from advmoe.models import Classifier, create_model

CONFIG = "config.yaml"


def small() -> Classifier:
    torch.manual_seed(0)
    return create_model("resnet18", num_classes=3, width=4, input_size=8)


def test_the_hub_s_configuration_describes_the_model(tmp_path: Path) -> None:
    folder = advmoe.save_pretrained(small(), tmp_path / "saved")
    told = json.loads((folder / "config.json").read_text())
    names = [str(k) for k in range(small().spec["num_classes"])]  # it knows no others
    assert told == {
        "library_name": "advmoe", "advmoe_version": __version__, "id2label": dict(zip(names, names, strict=True)),
        "label2id": {name: int(name) for name in names}, "model": small().spec,
    }  # fmt: skip


def test_a_loaded_model_takes_its_run_s_record_along(make_digits_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_digits_run(tmp_path / "run")
    model = advmoe.load_run(run)
    folder = advmoe.save_pretrained(model, tmp_path / "saved")
    assert (folder / CONFIG).read_bytes() == (run / CONFIG).read_bytes()
    # Of a model that has been changed since, the run says nothing.
    with torch.no_grad():
        next(model.parameters()).add_(1)
    advmoe.save_pretrained(model, folder)
    assert not (folder / CONFIG).exists()


@pytest.mark.parametrize(("model", "got"), [(3, "an object of type int"), ("absent", "'absent'")])
def test_what_is_no_model_is_named(tmp_path: Path, model: object, got: str) -> None:
    with pytest.raises(ValueError, match=f"model must be a run directory or a model of advmoe's, got {got}"):
        advmoe.save_pretrained(model, tmp_path / "saved")  # type: ignore[arg-type]
    assert not (tmp_path / "saved").exists()


def test_places_of_this_machine_do_not_travel(stored_run: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(stored_run, tmp_path / "run"))
    values = Config.load(stored_run / "config.yaml").to_dict()
    values["data"] |= {"name": "folder", "root": "/home/somebody/clients/acme"}
    values["training"] |= {"init_from": "~/runs/start"}
    Config.from_dict(values).dump(other / "config.yaml")
    manifest = json.loads((stored_run / "manifest.json").read_text())
    command = ["advmoe", "train", "--data.root", "/home/somebody/clients/acme", "--run-dir=/tmp/somewhere/run"]
    (other / "manifest.json").write_text(json.dumps(manifest | {"command": command}))
    folder = advmoe.save_pretrained(other, tmp_path / "saved")
    for file in folder.iterdir():
        assert b"somebody" not in file.read_bytes() and b"somewhere" not in file.read_bytes(), file
    config = Config.load(folder / "config.yaml")
    assert (config.data.root, config.training.init_from) == ("acme", "start")
    manifest_there = json.loads((folder / "manifest.json").read_text())
    assert manifest_there == manifest | {"command": ["advmoe", "train", "--data.root", "acme", "--run-dir=run"]}
    assert "read from `acme`" in (folder / "README.md").read_text()


def test_the_place_of_a_network_of_ones_own_does_not_travel(tmp_path: Path) -> None:
    model = advmoe.to_moe(nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)),
                          example=torch.rand(2, 3, 8, 8))  # fmt: skip
    model.spec["source"] = "/home/somebody/acme/net.py:make"
    folder = advmoe.save_pretrained(model, tmp_path / "saved")
    for name in ("model.json", "config.json", "README.md"):
        text = (folder / name).read_text()
        assert "somebody" not in text and ("net.py:make" in text or name == "README.md")
    assert model.spec["source"] == "/home/somebody/acme/net.py:make"


@pytest.mark.parametrize("writes", range(5))
def test_a_checkpoint_that_was_cut_short_is_written_again(
    stored_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    replace, done = Path.replace, []

    def cut(path: Path, target: Path) -> Path:
        if len(done) == writes:
            raise KeyboardInterrupt
        done.append(target)
        return replace(path, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", cut)
        advmoe.save_pretrained(stored_run, tmp_path / "saved")
    whole = advmoe.save_pretrained(stored_run, tmp_path / "whole")
    again = advmoe.save_pretrained(stored_run, tmp_path / "saved")
    assert {each.name for each in again.iterdir()} == {each.name for each in whole.iterdir()}
    assert (again / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
