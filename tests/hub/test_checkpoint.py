"""A checkpoint as files: what is written, what of its run travels, and what an earlier one leaves."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import advmoe
from advmoe import __version__
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
