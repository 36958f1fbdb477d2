"""A model as a graph: traced, written to a file as ONNX or as PyTorch's exported program, and opened from there.

Axes: `N` batch, `C` channels, `H W` size, `K` classes, `L` MoE layers.
"""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule

from advmoe.export.form import ExportForm
from advmoe.moe import route
from advmoe.moe.routing import RoutingMode
from advmoe.text import one_line

ExportedGraph = Callable[[Tensor], tuple[Tensor, ...]]
"""A written graph as a function: pixels (N, C, H, W) -> logits (N, K) and, of a routed model, the pathway (N, L)."""


class ExportFailed(RuntimeError):
    """A graph that could not be made, or that does not compute what the model computes."""


class _Deployed(nn.Module):
    """What is exported: pixels (N, C, H, W) -> logits (N, K) and, of a routed model, the pathway (N, L)."""

    def __init__(self, model: nn.Module, mode: RoutingMode) -> None:
        super().__init__()
        self.model, self.mode = model, mode

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        with route(self.mode) as routing:
            logits: Tensor = self.model(pixels)
        return (logits, routing.pathway()) if routing.choices else (logits,)


def traced(model: nn.Module, form: ExportForm, shape: tuple[int, ...]) -> ExportedProgram:
    """The program of `model` for images of this `shape` (C, H, W). Raises `ExportFailed` where there is none."""
    # Two images where the batch may vary: of one, PyTorch would take the size for a constant. Not the user's images:
    # a `.pt2` keeps the example.
    example = torch.zeros(2 if form.dynamic_batch else 1, *shape)
    shapes = {"pixels": {0: Dim("batch")}} if form.dynamic_batch else None
    try:
        program = torch.export.export(_Deployed(model, form.mode), (example,), dynamic_shapes=shapes, strict=False)
    except Exception as error:
        raise ExportFailed(f"PyTorch could not trace the model: {one_line(error, 300)}") from error
    for module in program.graph_module.modules():
        if isinstance(module, GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)  # it names files of this machine
    return program


def write_program(program: ExportedProgram, form: ExportForm, report: dict[str, Any], path: Path) -> None:
    """Write `program` to `path` with its `report` inside, and note in the report the opset that was taken.

    Raises `ExportFailed` where PyTorch cannot write it as asked for.
    """
    (_write_onnx if form.format == "onnx" else _write_pt2)(program, form, report, path)


def _write_onnx(program: ExportedProgram, form: ExportForm, report: dict[str, Any], path: Path) -> None:
    try:
        with _quiet():
            exported = torch.onnx.export(
                program, (), input_names=["pixels"], output_names=list(report["outputs"]), opset_version=form.opset,
                dynamic_shapes=({0: "batch"},) if form.dynamic_batch else None, dynamo=True, verbose=False,
            )  # fmt: skip
    except Exception as error:
        raise ExportFailed(f"PyTorch could not write the graph as ONNX: {one_line(error, 300)}") from error
    assert exported is not None
    proto = exported.model_proto
    report["opset"] = next(each.version for each in proto.opset_import if each.domain == "")
    if form.opset not in (None, report["opset"]):
        raise ExportFailed(f"PyTorch wrote opset {report['opset']}, not {form.opset}")
    graph = proto.graph
    for item in (*graph.node, *graph.value_info, *graph.input, *graph.output, graph):
        del item.metadata_props[:]  # PyTorch's notes for debugging, longer than a small model's weights
    graph.doc_string = f"Image classifier; computes {report['computes']}."
    graph.input[0].doc_string = report["input"]["meaning"]
    proto.producer_name, proto.producer_version = "advmoe", report["versions"]["advmoe"]
    del proto.metadata_props[:]
    for name, value in report.items():
        text = value if isinstance(value, str) else json.dumps(value)
        proto.metadata_props.add(key=name, value=text)
    path.write_bytes(proto.SerializeToString())


def _write_pt2(program: ExportedProgram, _: ExportForm, report: dict[str, Any], path: Path) -> None:
    content = io.BytesIO()  # PyTorch, writing to a full disk itself, ends the process
    with _quiet():
        torch.export.save(program, content, extra_files={"advmoe.json": json.dumps(report)})
    path.write_bytes(content.getbuffer())


def opened(path: Path, form: ExportForm) -> ExportedGraph:
    """The written file, as a function of pixels, on as many threads as PyTorch has."""
    if form.format == "torch-export":
        module = torch.export.load(cast(Any, io.BytesIO(path.read_bytes()))).module()
        return cast(ExportedGraph, module)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors; they are raised as well
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportFailed(f"ONNX Runtime could not load the graph: {one_line(error, 300)}") from error

    def run(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.from_numpy(each) for each in session.run(None, {"pixels": x.contiguous().numpy()}))

    return run


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks, none of which is about the model."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
