"""Which tensors the kernels take, and how they are handed over."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from advmoe.ops.raw.build import built

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
LANES = 8
"""Output channels are stored in multiples of this."""

_off: ContextVar[bool] = ContextVar("advmoe_native_off", default=False)


def available() -> bool:
    """Whether this machine has the kernels; the first call may compile them, which takes a few seconds."""
    return not _off.get() and built().functions is not None


def missing() -> str | None:
    """Why this machine has no kernels, in a few words; None where it has them."""
    return None if built().functions is not None else built().reason


def kernels_used() -> str:
    """Whose kernels CPUs use here, as results say it: `advmoe`, or `PyTorch` and why not ours."""
    return "advmoe" if available() else f"PyTorch ({missing() or 'ours are switched off'})"


def as_written() -> bool:
    """Whether operations are to be computed as they are defined, by PyTorch's own: within `without_kernels`."""
    return not torch.compiler.is_compiling() and _off.get()


@contextmanager
def without_kernels() -> Iterator[None]:
    """Inside, everything is computed by PyTorch's own operations: what second derivatives need, which our backward
    passes do not have, by kernels or not.
    """
    token = _off.set(True)
    try:
        yield
    finally:
        _off.reset(token)


def suits(*tensors: Tensor) -> bool:
    """Whether `tensors` can be given to a kernel: on the CPU, of one dtype that the kernels know, and each sample one
    row of memory, which nobody traces, counts or batches.
    """
    if not eager():
        return False
    dtype = tensors[0].dtype
    if dtype not in NAMES:
        return False
    for each in tensors:
        if type(each) not in _PLAIN or not each.is_cpu or each.dtype != dtype or not _by_pixels(each):
            return False
    return available()


_PLAIN = (Tensor, nn.Parameter)


def eager() -> bool:
    """Whether operations are done as they are called: no graph is traced, no mode sees them, no transform is on."""
    if torch.compiler.is_compiling():
        return False
    if (
        torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack()
        or forward_ad._current_level >= 0
    ):
        return False
    return torch._C._functorch.maybe_current_level() is None


def _by_pixels(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.is_contiguous()


def threads_for(samples: int) -> int:
    """How many threads share a kernel over as many samples."""
    return max(1, min(torch.get_num_threads(), samples))


def room(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor for a kernel to fill, whatever PyTorch's defaults are."""
    return torch.empty(shape, dtype=dtype, device="cpu")


def images(*shape: int, dtype: torch.dtype) -> Tensor:
    """The same, channels-last."""
    return torch.empty(shape, dtype=dtype, device="cpu", memory_format=torch.channels_last)


def addresses(tensors: Sequence[Tensor]) -> Any:
    """Where their memory begins, as an array in C."""
    return (ctypes.c_void_p * len(tensors))(*(each.data_ptr() for each in tensors))


def address(x: Tensor | None) -> int | None:
    """Where its memory begins."""
    return None if x is None else x.data_ptr()
