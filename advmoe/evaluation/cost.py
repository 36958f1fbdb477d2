"""What one inference costs: multiply-accumulates of what really runs, parameters, and measured time."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from advmoe.models import Classifier
from advmoe.models.modes import frozen
from advmoe.moe import MoELayer


def example_input(model: Classifier, batch: int) -> Tensor:
    """Random pixels (batch, C, H, W) of the model's input size, channels-last on its device."""
    spec = model.spec
    device = next(model.parameters()).device
    x = torch.rand(batch, spec["in_channels"], spec["input_size"], spec["input_size"], device=device)
    return x.contiguous(memory_format=torch.channels_last)


def gmacs(model: Classifier) -> float:
    """Multiply-accumulates (10^9) of one image's pathway, routers included, counted on the operators that run."""
    with frozen(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(example_input(model, 1))
    return float(counter.get_total_flops()) / 2e9


def parameters(model: nn.Module) -> tuple[int, int]:
    """(stored, active): all parameters, and those that one image's pathway uses."""
    stored = sum(p.numel() for p in model.parameters())
    idle = sum(layer.idle_parameters() for layer in model.modules() if isinstance(layer, MoELayer))
    return stored, stored - idle


def milliseconds_per_image(model: Classifier, batch: int = 128, repeats: int = 7) -> float:
    """Median forward time per image in eval mode, in milliseconds, as the machine stands."""
    x = example_input(model, batch)
    times = []
    with frozen(model), torch.no_grad():
        for attempt in range(repeats + 2):
            start = time.perf_counter()
            model(x)
            if x.is_cuda:
                torch.cuda.synchronize()
            if attempt >= 2:
                times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times) / batch


def cost(model: Classifier, batch: int = 128) -> dict[str, Any]:
    """All of it as one dictionary, with the setting that the time was measured in."""
    stored, active = parameters(model)
    return {
        "gmacs": round(gmacs(model), 6),
        "parameters": stored,
        "active_parameters": active,
        "ms_per_image": round(milliseconds_per_image(model, batch), 4),
        "batch": batch,
        "device": next(model.parameters()).device.type,
        "threads": torch.get_num_threads(),
    }
