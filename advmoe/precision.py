"""What PyTorch's flags decide of arithmetic: what fp32 means on a device, its own or a faster one that rounds more, and
whether a computation gives the same bits again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch


def _by_operation(device_type: str) -> dict[str, Any]:
    """The flags of a kind of device, by what they are of."""
    backends: Any = torch.backends
    if device_type == "cuda":
        conv, rnn, matmul = backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul
    else:
        conv, rnn, matmul = (getattr(backends.mkldnn, name) for name in ("conv", "rnn", "matmul"))
    return {"convolutions": conv, "recurrent layers": rnn, "products": matmul}


@contextmanager
def full_fp32() -> Iterator[None]:
    """Inside, what is computed in fp32 is fp32's: on a GPU no TF32, on a CPU neither that nor bf16.

    The flags are the process's, and stand as they stood afterwards.
    """
    flags = [*_by_operation("cuda").values(), *_by_operation("cpu").values()]
    before = [flag.fp32_precision for flag in flags]
    older: list[Callable[[], None]] = []
    try:
        # All names say the same inside, as PyTorch refuses to read the older ones of flags that do not.
        for read, write, full in _OLDER:
            with suppress(RuntimeError):
                older.append(partial(write, read()))
                write(full)
        for flag in flags:
            flag.fp32_precision = "ieee"
        yield
    finally:
        for restore in older:
            restore()
        for flag, value in zip(flags, before, strict=True):
            flag.fp32_precision = value


def _cudnn_allows_tf32() -> bool:
    return torch.backends.cudnn.allow_tf32


def _allow_cudnn_tf32(allowed: bool) -> None:
    torch.backends.cudnn.allow_tf32 = allowed


_OLDER: tuple[tuple[Callable[[], Any], Callable[[Any], None], Any], ...] = (
    (_cudnn_allows_tf32, _allow_cudnn_tf32, False),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"),
)
"""The flags by their older names: how they are read and set, and full fp32."""


def fp32_on(device: torch.device) -> str:
    """What fp32 is on `device` as the flags stand: `fp32`, or `fp32, TF32 convolutions`, say."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "fp32"  # it has no units for less
    operations: dict[str, list[str]] = {}
    for operation, flag in _by_operation(device.type).items():
        if operation != "recurrent layers" and (kind := flag.fp32_precision) not in ("ieee", "none"):
            operations.setdefault(kind.upper() if kind == "tf32" else kind, []).append(operation)
    return ", ".join(["fp32", *(f"{kind} {' and '.join(names)}" for kind, names in operations.items())])


@contextmanager
def deterministic(wanted: bool = True) -> Iterator[None]:
    """Inside, operations of a GPU give the same bits each time, or raise where they cannot; nothing without `wanted`.

    Slower. cuBLAS reads its setting once, when it is first used: before that this must have been entered.
    """
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


def gpu_libraries(device: torch.device) -> dict[str, Any] | None:
    """Of a GPU: versions of CUDA and cuDNN, and the flags by which they choose algorithms; None of another device."""
    if device.type != "cuda":
        return None
    return {
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
    }
