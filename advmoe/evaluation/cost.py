"""What one inference costs: multiply-accumulates of what really runs, parameters, memory, and measured time.

A sparse model is measured in its compacted form, which is what runs in use.
Axes: `N` images, `C` channels, `H W` size.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from advmoe.models import Classifier
from advmoe.models.modes import evaluating, frozen
from advmoe.moe import moe_layers
from advmoe.ops import kernels_used
from advmoe.precision import full_fp32
from advmoe.progress import tracked
from advmoe.pruning import deployed


def example_input(model: Classifier, batch: int) -> Tensor:
    """Random pixels (batch, C, H, W) of the model's input size, channels-last on its device."""
    spec = model.spec
    device = next(model.parameters()).device
    x = torch.rand(batch, spec["in_channels"], spec["input_size"], spec["input_size"], device=device)
    return x.contiguous(memory_format=torch.channels_last)


class _Dispatch:
    """The base of `_OperatorWatch`: for a mode's own `__torch_dispatch__` PyTorch imports its compiler, two seconds."""

    def __init__(self, see: Callable[[Any, Any, tuple[Any, ...], dict[str, Any]], None]) -> None:
        super().__init__()
        self._see = see

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator, then see it."""
        out = func(*args, **(kwargs or {}))
        self._see(func, out, args, kwargs or {})
        return out


class _OperatorWatch(_Dispatch, TorchDispatchMode):
    """Inside, `see(operator, result, args, kwargs)` is called after every operator."""


class _Counter:
    """Counts `flops` by PyTorch's formulas: two for each multiply-accumulate."""

    def __init__(self) -> None:
        self.flops = 0
        self._formulas = FlopCounterMode(display=False).flop_registry

    def see(self, func: Any, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Count the operator, if it is a matrix product of some kind."""
        if (formula := self._formulas.get(func.overloadpacket)) is not None:
            self.flops += int(formula(*args, **kwargs, out_val=out))


def gmacs(model: Classifier) -> float:
    """Multiply-accumulates (10^9) of one image's pathway, routers included, counted on the operators that run."""
    model = deployed(model)
    # The counter knows matrix products, but not every fused attention kernel, and none on the CPU.
    attention = sdpa_kernel(SDPBackend.MATH)
    with frozen(model), torch.no_grad(), attention, _OperatorWatch((counter := _Counter()).see):
        model(example_input(model, 1))
    return int(counter.flops) / 2e9


def parameters(model: nn.Module) -> tuple[int, int]:
    """(stored, active): all parameters, and those that one image's pathway uses."""
    model = deployed(model)
    stored = sum(p.numel() for p in model.parameters())
    idle = sum(layer.idle_parameters() for layer in moe_layers(model))
    return stored, stored - idle


@contextmanager
def timing(*models: nn.Module) -> Iterator[None]:
    """Inside, passes can be timed: eval mode, frozen parameters, no gradients, full fp32, whatever is set outside."""
    with ExitStack() as stack:
        stack.enter_context(full_fp32())
        for kind in {each.device.type for model in models for each in model.parameters()}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        for model in models:
            stack.enter_context(frozen(model))
        stack.enter_context(torch.no_grad())
        yield


def settled(device: torch.device) -> None:
    """Wait for what `device` still has to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)


def milliseconds_per_image(model: Classifier, batch: int = 128, repeats: int = 7) -> float:
    """Median forward time per image in eval mode and fp32, in milliseconds, as the machine stands."""
    model, x = deployed(model), example_input(model, batch)
    times = []
    with timing(model):
        for attempt in range(repeats + 2):
            settled(x.device)
            start = time.perf_counter()
            model(x)
            settled(x.device)
            if attempt >= 2:
                times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times) / batch


class _LiveMemory:
    """Follows the memory of operators' results while they are alive: at most `peak` bytes at once."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        self.peak = 0
        self._known = {StorageWeakRef(tensor.untyped_storage()) for tensor in known}
        self._alive: dict[StorageWeakRef, int] = {}

    def see(self, func: Any, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Count what is alive: the operator's results, and earlier ones that something still refers to."""
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if (reference := StorageWeakRef(storage)) not in self._known:
                self._alive[reference] = storage.nbytes()
        self._alive = {reference: size for reference, size in self._alive.items() if not reference.expired()}
        self.peak = max(self.peak, sum(self._alive.values()))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)


def activation_bytes(model: nn.Module, x: Tensor) -> int:
    """The most bytes that the activations of one forward pass of `x` (N, C, H, W) take at once, in eval mode.

    Activations are what operators return: hidden layers, routers' scores, dispatched samples and logits, each until
    nothing refers to it any more; not `x`, parameters and buffers. On the CPU a kernel's own scratch memory is not
    seen. On CUDA it is what the allocator's peak grew by, which includes scratch memory and rounds sizes up.
    """
    # Not `frozen`: folded filters are weights, but would be counted.
    with evaluating(model), torch.no_grad():
        if x.is_cuda:
            model(x)  # libraries take their workspaces, which stay, at their first call
            torch.cuda.synchronize(x.device)
            torch.cuda.reset_peak_memory_stats(x.device)
            before = torch.cuda.memory_allocated(x.device)
            model(x)
            torch.cuda.synchronize(x.device)
            return int(torch.cuda.max_memory_allocated(x.device) - before)
        memory = _LiveMemory([x, *model.parameters(), *model.buffers()])
        with _OperatorWatch(memory.see):
            model(x)
    return memory.peak


def in_turn(
    sides: Mapping[str, Callable[[Tensor], object]], x: Tensor, *, seconds: float = 10.0
) -> dict[str, list[float]]:
    """Milliseconds per image of every timed pass of `x` (N, C, H, W), by side; the sides take turns.

    Two rounds come first and do not count, then as many as fit in `seconds`: at least 3 and at most 50. The caller
    prepares the sides (see `timing`).
    """

    def lap(side: Callable[[Tensor], object]) -> float:
        start = time.perf_counter()
        side(x)
        settled(x.device)
        return time.perf_counter() - start

    settled(x.device)

    for side in sides.values():
        lap(side)
    round_takes = sum(lap(side) for side in sides.values())
    times: dict[str, list[float]] = {name: [] for name in sides}
    rounds = max(3, min(50, int(seconds / max(round_takes, 1e-6))))
    for _ in tracked(range(rounds), f"batch {len(x)}", unit="round"):
        for name, side in sides.items():
            times[name].append(1000 * lap(side) / len(x))
    return times


def setting(device: torch.device) -> dict[str, Any]:
    """What times on `device` depend on: CPU threads and, on a CPU, whose kernels run."""
    return {"threads": torch.get_num_threads(), "kernels": kernels_used() if device.type == "cpu" else None}


def cost(model: Classifier, batch: int = 128) -> dict[str, Any]:
    """GMACs, parameters and time per image, with the setting that the time was measured in."""
    stored, active = parameters(model)
    device = next(model.parameters()).device
    return {
        "gmacs": round(gmacs(model), 6),
        "parameters": stored,
        "active_parameters": active,
        "ms_per_image": round(milliseconds_per_image(model, batch), 4),
        "batch": batch,
        "device": device.type,
        "precision": "fp32",
        **setting(device),
    }
