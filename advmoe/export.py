"""A trained model as one file that runs without this library: ONNX, or PyTorch's exported program (`.pt2`).

By default the graph takes one image and computes the chosen experts alone, whose weights it gathers by index. A graph
for any batch size computes all experts and keeps the chosen ones, which is slower. Every file is compared with the
model before it takes its name.

Axes: `N` batch, `C` channels, `H W` size, `K` classes, `L` MoE layers. Pixels are in [0, 1].
"""

from __future__ import annotations

import io
import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule

from advmoe import __version__
from advmoe.config import typed
from advmoe.errors import InputError
from advmoe.evaluation.accuracy import placed, positive
from advmoe.evaluation.cost import gmacs
from advmoe.evaluation.images import input_shape, random_images, run_images
from advmoe.evaluation.scoring import measuring
from advmoe.files import checksum, require_writable, write_text, write_whole
from advmoe.models import Classifier
from advmoe.models.runs import load_run
from advmoe.moe import MoELayer, Routing, route, routers_of
from advmoe.moe.routing import RoutingMode
from advmoe.pool import threads_set
from advmoe.progress import tracked
from advmoe.pruning import deployed
from advmoe.rundir import DIGEST, WEIGHTS
from advmoe.text import one_line

Format = Literal["onnx", "torch-export"]

SUFFIXES: dict[str, str] = {"onnx": ".onnx", "torch-export": ".pt2"}
"""What a file's name ends in, by format."""

TOLERANCE = 1e-4
"""How far a logit may lie from PyTorch's, times the largest logit where that is above 1."""

TIE = 1e-5
"""Scores of two experts this close are a tie: two libraries' rounding moves fp32 scores by about 1e-6."""

_OLDEST_OPSET = 18
"""The oldest that PyTorch's exporter has operators for."""

_CPU = torch.device("cpu")
_MIXED = 8
"""Images at once where a graph for any batch size is checked."""

Run = Callable[[Tensor], tuple[Tensor, ...]]
"""An exported graph as a function: pixels -> logits and, of a routed model, the pathway."""


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


@dataclass(frozen=True)
class _Form:
    """How a model is written."""

    format: Format
    dynamic_batch: bool
    opset: int | None
    mode: RoutingMode


_COMPUTES: dict[RoutingMode, str] = {
    "hard": "the whole of a plain model",
    "gathered": "the chosen experts alone",
    "masked": "all experts, of which the chosen ones are kept",
}


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
    described = "images given" if images is not None else "random images"
    images = random_images(_input_shape(model)) if images is None else images
    return _export(model, Path(path), _form(model, format, dynamic_batch, opset), images, described, threads, {})


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
    form = _form(model, format, dynamic_batch, opset)
    _require_place(path, form)  # before the data are read
    placed(model, _CPU)
    images, described = run_images(home, model, num_examples, source=source)
    origin = {
        "run": home.resolve().name, "weights_sha256": checksum(home / WEIGHTS), DIGEST: model.origin.digest,
    }  # fmt: skip
    return path, _export(model, path, form, images, described, threads, origin)


def require_onnx() -> None:
    """Raise `ValueError`, which names the extra, where ONNX files cannot be written or run."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(f"format onnx needs the extra export: pip install 'advmoe[export]', got: {error}") from error


# Checks of what is asked for


def _form(model: nn.Module, format: Format, dynamic_batch: bool, opset: int | None) -> _Form:
    typed("format", Format, format)
    if format == "onnx":
        require_onnx()
        if opset is not None:
            _require_opset(opset)
    elif opset is not None:
        raise InputError(f"opset must be left out for format {format}, got {opset!r}")
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        raise InputError(f"model must be on the CPU, got {next(model.parameters()).device}")
    mode: RoutingMode = "hard"
    if any(isinstance(module, MoELayer) for module in model.modules()):
        per_token = any(getattr(router, "per_token", False) for router in routers_of(model))
        mode = "masked" if dynamic_batch or per_token else "gathered"
    return _Form(format, dynamic_batch, opset, mode)


def _require_opset(opset: int) -> None:
    from onnx.defs import onnx_opset_version

    newest = onnx_opset_version()
    if not _OLDEST_OPSET <= opset <= newest:
        raise InputError(f"opset must be >= {_OLDEST_OPSET} and <= {newest}, the newest of onnx here, got {opset!r}")


def _require_place(path: Path, form: _Form) -> None:
    suffix = SUFFIXES[form.format]
    if path.suffix != suffix:
        raise InputError(f"the file to write must end in {suffix} for format {form.format}, got {str(path)!r}")
    if not path.parent.is_dir() or path.is_dir():
        raise InputError(f"the file to write must lie in a directory that exists, and be none, got {str(path)!r}")
    require_writable("the file to write", path.parent)


def _input_shape(model: nn.Module) -> tuple[int, int, int]:
    if not isinstance(model, Classifier):
        raise InputError(f"images must be given for a model without an input size, got a {type(model).__name__}")
    return input_shape(model)


# Making the file


def _export(
    model: nn.Module,
    path: Path,
    form: _Form,
    images: Tensor,
    described: str,
    threads: int | None,
    source: dict[str, Any],
) -> dict[str, Any]:
    _require_place(path, form)
    if images.dim() != 4 or len(images) == 0 or images.dtype != torch.float32:
        raise InputError(f"images must be float32 (N, C, H, W) with N >= 1, got {images.dtype} {tuple(images.shape)}")
    if threads is not None:
        positive("threads", threads)
    report: dict[str, Any] = {"file": path.name}

    def write(partial: Path) -> None:
        program = _traced(model, form, images.shape[1:])
        report.update(_description(model, form, images, source))
        (_write_onnx if form.format == "onnx" else _write_program)(program, form, report, partial)
        report["bytes"] = partial.stat().st_size
        run = _opened(partial, form)
        batch = _MIXED if form.dynamic_batch else 1
        report["check"] = {"on": described, **compared(model, run, images, batch)}
        if report["check"]["pathways"] == 1:  # a graph with the choice as a constant would pass
            others = random_images(images.shape[1:])
            report["check"]["also"] = {"on": "random images", **compared(model, run, others, batch)}
        report["time"] = timed(model, run, images)

    with threads_set(threads), measuring(model, _CPU), torch.no_grad():
        write_whole(path, write)
    write_text(path.with_name(f"{path.name}.json"), json.dumps(report, indent=2) + "\n")
    return report


def _description(model: nn.Module, form: _Form, images: Tensor, source: dict[str, Any]) -> dict[str, Any]:
    """What a file says of itself."""
    batch = "N" if form.dynamic_batch else 1
    with route(form.mode) as routing:
        logits = model(images[:1])
    outputs = {"logits": [batch, logits.shape[1]]}
    if routing.choices:
        outputs["pathway"] = [batch, *routing.pathway().shape[1:]]
    packages = ("torch", *(("onnx", "onnxscript", "onnxruntime") if form.format == "onnx" else ()))
    return {
        "format": form.format,
        "computes": _COMPUTES[form.mode],
        "input": {
            "name": "pixels", "shape": [batch, *images.shape[1:]], "type": "float32",
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


def _traced(model: nn.Module, form: _Form, shape: tuple[int, ...]) -> ExportedProgram:
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


def _write_onnx(program: ExportedProgram, form: _Form, report: dict[str, Any], path: Path) -> None:
    try:
        with _quiet():
            made = torch.onnx.export(
                program, (), input_names=["pixels"], output_names=list(report["outputs"]), opset_version=form.opset,
                dynamic_shapes=({0: "batch"},) if form.dynamic_batch else None, dynamo=True, verbose=False,
            )  # fmt: skip
    except Exception as error:
        raise ExportFailed(f"PyTorch could not write the graph as ONNX: {one_line(error, 300)}") from error
    assert made is not None
    proto = made.model_proto
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


def _write_program(program: ExportedProgram, form: _Form, report: dict[str, Any], path: Path) -> None:
    content = io.BytesIO()  # PyTorch, writing to a full disk itself, ends the process
    with _quiet():
        torch.export.save(program, content, extra_files={"advmoe.json": json.dumps(report)})
    path.write_bytes(content.getbuffer())


def _opened(path: Path, form: _Form) -> Run:
    """The written file, as a function of pixels, on as many threads as PyTorch has."""
    if form.format == "torch-export":
        module = torch.export.load(cast(Any, io.BytesIO(path.read_bytes()))).module()
        return cast(Run, module)
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


# Comparing the file with the model


def compared(model: nn.Module, run: Run, images: Tensor, batch: int = 1) -> dict[str, Any]:
    """How `run` differs from `model` on `images`, `batch` at once (and, of several, the first 1 and 3 as well).

    A router whose best scores lie within `TIE` may choose otherwise in another library. Such ties are listed, and the
    image's logits compared with PyTorch's on the pathway that `run` took.

    Raises `ExportFailed` where a pathway differs otherwise, or a logit by more than `TOLERANCE`.
    """
    largest, pathways, ties = 0.0, set(), []
    parts = [*zip(images.split(batch), range(0, len(images), batch), strict=True)]
    parts += [(images[:number], 0) for number in (1, 3) if number < batch]
    for x, first in tracked(parts, "compare"):
        with route() as routing:
            expected = model(x)
        logits, *rest = run(x)
        if routing.choices:
            (taken,) = rest
            parted = [{**each, "image": first + each["image"]} for each in _parted(routing, taken)]
            if parted:
                ties += [each for each in parted if each not in ties]
                with route(forced=taken):
                    expected = model(x)
            pathways |= {tuple(each) for each in taken.flatten(1).tolist()}
        largest = max(largest, _difference(logits, expected, first))
    return {
        "images": len(images), "pathways": len(pathways), "largest_difference": largest, "allowed": TOLERANCE,
        "ties": ties,
    }  # fmt: skip


def _parted(routing: Routing, taken: Tensor) -> list[dict[str, Any]]:
    """Where PyTorch's pathways and `taken` first part, by image, and how close the two experts' scores are there."""
    found: dict[int, dict[str, Any]] = {}
    for column, layer in enumerate(sorted(routing.choices)):
        ours, theirs, scores = routing.choices[layer], taken[:, column], routing.scores[layer]
        gaps = (scores.gather(-1, ours[..., None]) - scores.gather(-1, theirs[..., None])).flatten(1).amax(1)
        for image in (ours != theirs).flatten(1 if ours.dim() > 1 else 0).nonzero()[:, 0].tolist():
            found.setdefault(image, {"image": image, "layer": layer, "gap": float(gaps[image])})
    for each in found.values():
        if not each["gap"] <= TIE:
            raise ExportFailed(
                f"the graph must choose PyTorch's experts, got another in layer {each['layer']}, where the scores are "
                f"{each['gap']:.2g} apart"
            )
    return list(found.values())


def _difference(logits: Tensor, expected: Tensor, first: int) -> float:
    apart = (logits - expected).abs().amax(1)
    allowed = TOLERANCE * expected.abs().amax(1).clamp(min=1)
    for image in (~(apart <= allowed)).nonzero()[:, 0].tolist():  # NaN is not within it either
        raise ExportFailed(
            f"logits must be PyTorch's to {allowed[image]:.2g}, got {apart[image]:.2g} apart on image {first + image}"
        )
    return float(apart.max())


def timed(model: nn.Module, run: Run, images: Tensor, rounds: int = 10, repeats: int = 4) -> dict[str, Any]:
    """Milliseconds per image of `model` in PyTorch and of `run`, one image at a time: medians of
    `rounds` * `repeats`.

    The two take turns, and the first pass of a turn does not count: the other's threads may still be spinning.
    """
    times: dict[str, list[float]] = {"pytorch": [], "exported": []}
    for turn in tracked(range(rounds), "time", unit="round"):
        x = images[turn % len(images)][None].contiguous(memory_format=torch.channels_last)
        for name, call in (("pytorch", model), ("exported", run)):
            for attempt in range(1 + repeats):
                start = time.perf_counter()
                call(x)
                if attempt:
                    times[name].append(time.perf_counter() - start)
    ours, theirs = (1000 * statistics.median(each) for each in times.values())
    return {
        "pytorch_ms": round(ours, 4), "exported_ms": round(theirs, 4), "speedup": round(ours / theirs, 3), "batch": 1,
        "passes": rounds * repeats, "threads": torch.get_num_threads(),
    }  # fmt: skip
