"""The forms that a model can be written in, and the checks of what is asked for.

Axes: `N` batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn

from advmoe.config import typed
from advmoe.errors import InputError, lacking
from advmoe.files import require_writable
from advmoe.moe import moe_layers, routers_of
from advmoe.moe.routing import RoutingMode

Format = Literal["onnx", "torch-export"]

SUFFIXES: dict[str, str] = {"onnx": ".onnx", "torch-export": ".pt2"}
"""What a file's name ends in, by format."""

_OLDEST_OPSET = 18
"""The oldest that PyTorch's exporter has operators for."""

_COMPUTES: dict[RoutingMode, str] = {
    "hard": "the whole of a plain model",
    "gathered": "the chosen experts alone",
    "masked": "all experts, of which the chosen ones are kept",
}


@dataclass(frozen=True)
class ExportForm:
    """How a model is written."""

    format: Format
    dynamic_batch: bool
    """Whether the graph takes any number of images N, or one."""
    opset: int | None
    """Of the ONNX standard operators; None for PyTorch's choice."""
    mode: RoutingMode
    """How its MoE layers compute."""

    @property
    def computes(self) -> str:
        """What the graph computes, in words."""
        return _COMPUTES[self.mode]

    @property
    def batch(self) -> str | int:
        """The first entry of its inputs' and outputs' shapes."""
        return "N" if self.dynamic_batch else 1


def form_for(model: nn.Module, format: Format, dynamic_batch: bool, opset: int | None) -> ExportForm:
    """How `model` is written in this `format`. Raises `ValueError` for what cannot be had or used together."""
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
    if moe_layers(model):
        per_token = any(getattr(router, "per_token", False) for router in routers_of(model))
        mode = "masked" if dynamic_batch or per_token else "gathered"
    return ExportForm(format, dynamic_batch, opset, mode)


def require_onnx() -> None:
    """Raise `ValueError`, which names the extra, where ONNX files cannot be written or run."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise lacking("format onnx", "export", error) from error


def _require_opset(opset: int) -> None:
    from onnx.defs import onnx_opset_version

    newest = onnx_opset_version()
    if not _OLDEST_OPSET <= opset <= newest:
        raise InputError(f"opset must be >= {_OLDEST_OPSET} and <= {newest}, the newest of onnx here, got {opset!r}")


def require_place(path: Path, form: ExportForm) -> None:
    """Raise `ValueError` unless a file of this `form` can be written to `path`."""
    suffix = SUFFIXES[form.format]
    if path.suffix != suffix:
        raise InputError(f"the file to write must end in {suffix} for format {form.format}, got {str(path)!r}")
    if not path.parent.is_dir() or path.is_dir():
        raise InputError(f"the file to write must lie in a directory that exists, and be none, got {str(path)!r}")
    require_writable("the file to write", path.parent)
