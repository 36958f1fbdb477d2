"""A model as a graph: traced, written, and opened again from the file alone."""

import json
import logging
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

from advmoe.evaluation.images import random_images
from advmoe.export import ExportFailed, export_model
from advmoe.export.form import ExportForm
from advmoe.export.graph import opened, traced, write_program

ROOT = Path(__file__).parents[2]
REPORT = {
    "computes": "the whole of a plain model", "input": {"meaning": "pixels in [0, 1]"}, "outputs": {"logits": [1, 2]},
    "versions": {"advmoe": "0.0"},
}  # fmt: skip


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)).eval()


def written(form, path):
    """A plain network's graph in a file; the network, and the report, which the writer may add to."""
    model, report = network(), dict(REPORT)
    with torch.no_grad():
        write_program(traced(model, form, (1, 4, 4)), form, report, path)
    return model, report


@pytest.mark.parametrize("dynamic", [False, True], ids=["one", "any"])
def test_a_program_comes_back_from_its_file(tmp_path, dynamic):
    form = ExportForm("torch-export", dynamic, None, "hard")
    model, report = written(form, tmp_path / "net.pt2")
    assert report == REPORT  # there is no opset to note
    graph = opened(tmp_path / "net.pt2", form)
    for batch in (1, 2, 5) if dynamic else (1,):
        x = torch.rand(batch, 1, 4, 4)
        (logits,) = graph(x)
        torch.testing.assert_close(logits, model(x))
    extra = {"advmoe.json": ""}
    torch.export.load(tmp_path / "net.pt2", extra_files=extra)
    assert json.loads(extra["advmoe.json"]) == REPORT


def test_an_onnx_file_says_what_it_is(tmp_path):
    form, path = ExportForm("onnx", False, 18, "hard"), tmp_path / "net.onnx"
    levels = [logging.getLogger(name).level for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    model, report = written(form, path)
    assert [logging.getLogger(name).level for name in ("torch.onnx", "onnxscript", "onnx_ir")] == levels
    assert report == {**REPORT, "opset": 18}
    x = torch.rand(1, 1, 4, 4)
    (logits,) = opened(path, form)(x)
    torch.testing.assert_close(logits, model(x))
    proto = onnx.load(path)
    assert {each.key: each.value for each in proto.metadata_props} == {
        name: value if isinstance(value, str) else json.dumps(value) for name, value in report.items()
    }
    assert (proto.producer_name, proto.producer_version) == ("advmoe", "0.0")
    assert proto.graph.doc_string == "Image classifier; computes the whole of a plain model."
    assert [each.name for each in proto.graph.input] == ["pixels"] and proto.graph.input[0].doc_string
    assert [each.name for each in proto.graph.output] == ["logits"]
    assert str(ROOT).encode() not in path.read_bytes()  # nor what PyTorch notes for debugging
    assert not any(node.metadata_props for node in proto.graph.node)


def test_a_graph_does_not_name_files_of_this_machine():
    program = traced(network(), ExportForm("torch-export", False, None, "hard"), (1, 4, 4))
    assert not any("stack_trace" in node.meta for node in program.graph_module.graph.nodes)


def test_a_file_that_is_no_graph_is_one_line(tmp_path):
    (tmp_path / "net.onnx").write_bytes(b"no graph")
    with pytest.raises(ExportFailed, match=r"^ONNX Runtime could not load the graph: ") as error:
        opened(tmp_path / "net.onnx", ExportForm("onnx", False, None, "hard"))
    assert "\n" not in str(error.value)


def test_a_model_that_cannot_be_traced_is_one_line(tmp_path):
    class ByValue(nn.Module):
        def forward(self, x):
            return torch.zeros(len(x), 2) + (1 if float(x.mean()) > 0.5 else 0)

    with pytest.raises(ExportFailed, match="PyTorch could not trace the model: "):
        export_model(ByValue(), tmp_path / "a.pt2", format="torch-export", images=random_images((3, 8, 8), 2))
    assert list(tmp_path.iterdir()) == []
