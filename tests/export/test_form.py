"""The forms of a file: which one a model gets, and what is refused before anything is traced."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from advmoe.export.form import ExportForm, form_for, require_onnx, require_place
from advmoe.models import create_model

PLAIN = nn.Conv2d(1, 1, 1)


def routed(name="resnet18", **kwargs):
    return create_model(name, num_classes=2, width=4, input_size=8, **kwargs)


@pytest.mark.parametrize(
    ("make", "dynamic", "mode", "computes"),
    [
        (lambda: PLAIN, False, "hard", "the whole of a plain model"),
        (lambda: PLAIN, True, "hard", "the whole of a plain model"),
        (routed, False, "gathered", "the chosen experts alone"),
        (routed, True, "masked", "all experts, of which the chosen ones are kept"),
        (lambda: routed("deit-tiny", route_per="token"), False, "masked", "all experts, of which the chosen ones"),
    ],
    ids=["plain", "plain, any batch", "routed", "routed, any batch", "tokens"],
)
@pytest.mark.usefixtures("shallow_backbones")
def test_how_a_model_is_written(make, dynamic, mode, computes):
    form = form_for(make(), "torch-export", dynamic, None)
    assert form == ExportForm("torch-export", dynamic, None, mode)
    assert form.computes.startswith(computes) and form.batch == ("N" if dynamic else 1)


@pytest.mark.parametrize(
    ("format", "opset", "message"),
    [
        ("tflite", None, "format must be one of onnx, torch-export, got 'tflite'"),
        ("torch-export", 20, "opset must be left out for format torch-export, got 20"),
        ("onnx", 17, "opset must be >= 18 and <= "),
        ("onnx", 10**6, "opset must be >= 18 and <= "),
    ],
)
def test_what_cannot_be_had_is_named(format, opset, message):
    with pytest.raises(ValueError) as error:
        form_for(PLAIN, format, False, opset)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_the_model_must_lie_on_the_cpu():
    with pytest.raises(ValueError, match=r"^model must be on the CPU, got meta$"):
        form_for(nn.Conv2d(1, 1, 1, device=torch.device("meta")), "torch-export", False, None)


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_the_extra_is_needed_for_onnx_alone(monkeypatch, package):
    require_onnx()
    monkeypatch.setitem(sys.modules, package, None)
    assert form_for(PLAIN, "torch-export", False, None).format == "torch-export"
    with pytest.raises(ValueError, match=r"^format onnx needs the extra export: pip install 'advmoe\[export\]', got: "):
        form_for(PLAIN, "onnx", False, None)


@pytest.mark.parametrize(
    ("format", "name", "message"),
    [
        ("onnx", "net.onnx", None),
        ("torch-export", "net.pt2", None),
        ("torch-export", "net.onnx", "must end in .pt2 for format torch-export, got "),
        ("onnx", "net", "must end in .onnx for format onnx, got "),
        ("onnx", "absent/net.onnx", "must lie in a directory that exists, and be none, got "),
        ("onnx", "folder.onnx", "must lie in a directory that exists, and be none, got "),
    ],
)
def test_where_a_file_may_be_written(tmp_path: Path, format, name, message):
    (tmp_path / "folder.onnx").mkdir()
    form = ExportForm(format, False, None, "hard")
    if message is None:
        require_place(tmp_path / name, form)
        return
    with pytest.raises(ValueError) as error:
        require_place(tmp_path / name, form)
    assert str(error.value) == f"the file to write {message}{str(tmp_path / name)!r}"
