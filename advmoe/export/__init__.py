"""A trained model as one file that runs without this library: ONNX, or PyTorch's exported program (`.pt2`).

By default the graph takes one image and computes the chosen experts alone, whose weights it gathers by index. A graph
for any batch size computes all experts and keeps the chosen ones, which is slower. Every file is compared with the
model before it takes its name.

Axes: `N` batch, `C` channels, `H W` size, `K` classes, `L` MoE layers. Pixels are in [0, 1].
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from advmoe import __version__
from advmoe.config import typed
from advmoe.errors import InputError
from advmoe.evaluation.accuracy import placed, positive
from advmoe.evaluation.cost import gmacs
from advmoe.evaluation.images import input_shape, random_images, run_images
from advmoe.evaluation.scoring import measuring
from advmoe.export.comparison import compared, timed
from advmoe.export.form import SUFFIXES, ExportForm, Format, form_for, require_place
from advmoe.export.graph import ExportFailed, opened, traced, write_program
from advmoe.files import checksum, write_text, write_whole
from advmoe.models import Classifier
from advmoe.models.runs import load_run
from advmoe.moe import route
from advmoe.moe.routing import RoutingMode
from advmoe.pool import threads_set
from advmoe.pruning import deployed
from advmoe.rundir import DIGEST, WEIGHTS

_CPU = torch.device("cpu")
_MIXED = 8
"""Images at once where a graph for any batch size is checked."""


class _Examples(NamedTuple):
    """Images (N, C, H, W) that a graph is compared on, and what they are, in words."""

    images: Tensor
    described: str


def export_model(
    model: nn.Module,
    path: str | Path,
    *,
    format: Format = "onnx",
    dynamic_batch: bool = False,
    opset: int | None = None,
    images: Tensor | None = None,
    threads: int | None = None,
) -> dict[str, Any]:
    """Write `model` to `path` for deployment, compare the file with PyTorch, and time the two.

    Args:
        model: in fp32 on the CPU; exported as it computes in eval mode, a sparse one compacted, and left in the mode it
            is in.
        path: ends in `.onnx` or, for `torch-export`, `.pt2`.
        format: `onnx` (needs the extra `export`) or `torch-export`.
        dynamic_batch: a graph for any batch size, in which all experts are computed, instead of one for a single image.
            A model whose tokens are routed one by one has all experts computed in either.
        opset: of the ONNX standard operators, at least 18; by default PyTorch's choice.
        images: pixels (N, C, H, W) to compare on; by default 100 random ones of the model's input size.
        threads: CPU threads of both that are compared; by default PyTorch's number.

    Returns what the file is (kept in it too), how it compared, and the times; `path` with `.json` appended holds the
    same. Raises `ValueError` for what cannot be used, `ExportFailed` where the graph cannot be made or computes
    something else: `path` is left as it was then.
    """
    model = deployed(model)
    if images is None:
        examples = _Examples(random_images(_input_shape(model)), "random images")
    else:
        examples = _Examples(images, "images given")
    return _export(model, Path(path), form_for(model, format, dynamic_batch, opset), examples, threads, {})


def export_run(
    run: str | Path,
    *,
    out: str | Path | None = None,
    format: Format = "onnx",
    dynamic_batch: bool = False,
    opset: int | None = None,
    threads: int | None = None,
    num_examples: int = 100,
    source: str | None = None,
) -> tuple[Path, dict[str, Any]]:
    """Export a run directory's model, compared on test images of its data or, where those cannot be read, random ones.

    Args: as of `export_model` and, for source, `load_run`. out: the file, by default `model.onnx` or `model.pt2` in the
        run. num_examples: images.

    Returns where the file is, and the report. Raises as `export_model` does.
    """
    home = Path(run)
    path = home / f"model{SUFFIXES[typed('format', Format, format)]}" if out is None else Path(out)
    positive("num_examples", num_examples)
    model = deployed(load_run(home, source))
    assert model.origin is not None
    form = form_for(model, format, dynamic_batch, opset)
    require_place(path, form)  # before the data are read
    placed(model, _CPU)
    examples = _Examples(*run_images(home, model, num_examples, source=source))
    origin = {
        "run": home.resolve().name, "weights_sha256": checksum(home / WEIGHTS), DIGEST: model.origin.digest,
    }  # fmt: skip
    return path, _export(model, path, form, examples, threads, origin)


def _input_shape(model: nn.Module) -> tuple[int, int, int]:
    if not isinstance(model, Classifier):
        raise InputError(f"images must be given for a model without an input size, got a {type(model).__name__}")
    return input_shape(model)


def _export(
    model: nn.Module, path: Path, form: ExportForm, examples: _Examples, threads: int | None, source: dict[str, Any]
) -> dict[str, Any]:
    """Write, compare and time; the report."""
    require_place(path, form)
    images = examples.images
    if images.dim() != 4 or len(images) == 0 or images.dtype != torch.float32:
        raise InputError(f"images must be float32 (N, C, H, W) with N >= 1, got {images.dtype} {tuple(images.shape)}")
    if threads is not None:
        positive("threads", threads)
    report: dict[str, Any] = {"file": path.name}

    def write(partial: Path) -> None:
        program = traced(model, form, images.shape[1:])
        report.update(_description(model, form, images, source))
        write_program(program, form, report, partial)
        report["bytes"] = partial.stat().st_size
        graph = opened(partial, form)
        batch = _MIXED if form.dynamic_batch else 1
        report["check"] = {"on": examples.described, **compared(model, graph, images, batch)}
        if report["check"]["pathways"] == 1:  # a graph with the choice as a constant would pass
            others = random_images(images.shape[1:])
            report["check"]["also"] = {"on": "random images", **compared(model, graph, others, batch)}
        report["time"] = timed(model, graph, images)

    with threads_set(threads), measuring(model, _CPU), torch.no_grad():
        write_whole(path, write)
    write_text(path.with_name(f"{path.name}.json"), json.dumps(report, indent=2) + "\n")
    return report


def _description(model: nn.Module, form: ExportForm, images: Tensor, source: dict[str, Any]) -> dict[str, Any]:
    """What a file says of itself."""
    with route(form.mode) as routing:
        logits = model(images[:1])
    outputs = {"logits": [form.batch, logits.shape[1]]}
    if routing.choices:
        outputs["pathway"] = [form.batch, *routing.pathway().shape[1:]]
    packages = ("torch", *(("onnx", "onnxscript", "onnxruntime") if form.format == "onnx" else ()))
    return {
        "format": form.format,
        "computes": form.computes,
        "input": {
            "name": "pixels", "shape": [form.batch, *images.shape[1:]], "type": "float32",
            "meaning": "pixels in [0, 1], not normalised; the graph normalises",
        },
        "outputs": outputs,
        "classes": logits.shape[1],
        **_known(model, form.mode),
        "source": source,
        "versions": {"advmoe": __version__, **{name: version(name) for name in packages}},
    }  # fmt: skip


def _known(model: nn.Module, mode: RoutingMode) -> dict[str, Any]:
    """What only this library's own classifiers say of themselves."""
    if not isinstance(model, Classifier):
        return {}
    known = {"model": {name: value for name, value in model.spec.items() if name != "source"}}  # a file of the user's
    if model.spec["input_size"] is None:
        return known
    with route(mode):
        return {"gmacs": round(gmacs(model), 6), **known}


__all__ = ["ExportFailed", "Format", "compared", "export_model", "export_run"]
