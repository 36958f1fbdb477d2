"""An exported file predicts: of a graph written by hand, and of files that are none of ours."""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from advmoe.errors import InputError
from advmoe.exported import ExportedModel

SPEC = {"num_classes": 2, "classes": ["dark", "light"], "input_size": 2, "in_channels": 1}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a file whose logits are 0 and 4 times the mean pixel, and whose one layer chooses the larger."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    helper, floats, whole = onnx.helper, onnx.TensorProto.FLOAT, onnx.TensorProto.INT64

    def make(batch: int | str = 1, *, routed: bool = True, told: Mapping[str, str] | None = None) -> Path:
        weights = helper.make_tensor("weights", floats, [4, 2], [0.0, 1.0] * 4)
        nodes = [
            helper.make_node("Flatten", ["pixels"], ["flat"]),
            helper.make_node("MatMul", ["flat", "weights"], ["logits"]),
            helper.make_node("ArgMax", ["logits"], ["pathway"], axis=1, keepdims=1),
        ]
        outputs = [
            helper.make_tensor_value_info("logits", floats, [batch, 2]),
            helper.make_tensor_value_info("pathway", whole, [batch, 1]),
        ]
        pixels = helper.make_tensor_value_info("pixels", floats, [batch, 1, 2, 2])
        if not routed:
            del nodes[2:], outputs[1:]
        model = helper.make_model(
            helper.make_graph(nodes, "by-hand", [pixels], outputs, [weights]),
            opset_imports=[helper.make_opsetid("", 18)], ir_version=9,
        )  # fmt: skip
        helper.set_model_props(
            model,
            {"model": json.dumps(SPEC), "input": json.dumps({"shape": [batch, 1, 2, 2]})} if told is None else told,
        )
        path = tmp_path / "net.onnx"
        onnx.save(model, path)
        return path

    return make


@pytest.mark.parametrize("batch", [1, "N"])
def test_predictions_by_hand(write: Callable[..., Path], batch: int | str) -> None:
    model = ExportedModel(write(batch))
    assert model.spec == SPEC
    # A sum of ln 3 over the four pixels: e^0 to e^(ln 3) is 1 to 3.
    light = torch.full((1, 2, 2), torch.tensor(3.0).log().item() / 4)
    one, other, third = model.predict([light, torch.zeros(1, 2, 2), light])
    assert one == third
    assert (one.classes, one.pathway) == (("light", "dark"), (1,))
    assert one.probabilities == pytest.approx((0.75, 0.25))
    assert other.probabilities == pytest.approx((0.5, 0.5)) and other.pathway == (0,)
    assert model.predict(light, top=1).classes == ("light",)


def test_a_plain_model_has_no_pathway(write: Callable[..., Path]) -> None:
    assert ExportedModel(write(routed=False)).predict(torch.ones(1, 2, 2)).pathway is None


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({}, "got one without 'model' in its metadata"),
        ({"model": json.dumps(SPEC)}, "got one without 'input' in its metadata"),
        ({"model": "{", "input": "{}"}, "must be an ONNX file that `advmoe export` wrote, got JSONDecodeError"),
        (
            {"model": json.dumps({**SPEC, "classes": ["one"]}), "input": json.dumps({"shape": [1]})},
            "classes must be 2 names, got",
        ),
    ],
)
def test_what_others_wrote_is_refused(write: Callable[..., Path], told: dict[str, str], message: str) -> None:
    path = write(told=told)
    with pytest.raises(InputError) as caught:
        ExportedModel(path)
    assert str(caught.value).startswith(f"{path} must ") and message in str(caught.value)


def test_what_is_no_such_file_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    (tmp_path / "net.onnx").write_bytes(b"not a graph")
    for name in ("net.onnx", "absent.onnx"):
        with pytest.raises(InputError, match=f"{name} must be an ONNX file that `advmoe export` wrote, got"):
            ExportedModel(tmp_path / name)


def test_without_onnx_runtime_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InputError, match=r"pip install 'advmoe\[export\]'"):
        ExportedModel(tmp_path / "net.onnx")
