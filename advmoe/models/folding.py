"""Batch norm folded into the convolution ahead of it, for as long as both stay as they are.

Axes: `N` batch, `C` channels, `H W` size, `M` rows of a bank, `E` experts.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advmoe import ops
from advmoe.models.layers import Projection
from advmoe.models.norm import BatchNorm2d
from advmoe.moe.conv import MoEConv2d
from advmoe.moe.routing import active_routing

Folded = tuple[Tensor, Tensor, ops.Packed | None]
"""Filters that hold the norm's scale, in the shape of the convolution's own, and a bias for each; both packed
(`ops.pack`), where that is better.
"""


@dataclass
class Folds:
    """The folded filters of each norm, with the state of what they were computed from: a change of it folds anew."""

    by_norm: dict[nn.Module, tuple[tuple[Tensor, ...], tuple[object, ...], Folded]] = field(default_factory=dict)

    def of(self, conv: nn.Conv2d | MoEConv2d, norm: BatchNorm2d, dtype: torch.dtype) -> Folded:
        """The filters of `conv` followed by `norm`, in `dtype`."""
        filters = conv.bank if isinstance(conv, MoEConv2d) else conv.weight
        mean, var = norm.running_mean, norm.running_var
        assert mean is not None and var is not None
        sources = (filters, norm.weight, norm.bias, mean, var)
        state = (dtype, norm.eps, *((each.data_ptr(), each._version) for each in sources))
        known = self.by_norm.get(norm)
        # The tensors themselves are kept: an address says nothing of weights that were passed in for one call.
        if known is None or known[1] != state or any(map(operator.is_not, known[0], sources)):
            # Computed outside inference mode, as a later pass may want gradients.
            with torch.inference_mode(False), torch.no_grad():
                scale = norm.weight * (var + norm.eps).rsqrt()
                shift = norm.bias - mean * scale
                experts = len(filters) // len(scale)
                each = (filters * scale.repeat(experts).view(-1, 1, 1, 1), shift.repeat(experts))
                folded = each[0].to(dtype), each[1].to(dtype)
                packed = conv.packed(*folded) if isinstance(conv, MoEConv2d | Projection) else None
                known = self.by_norm[norm] = sources, state, (*folded, packed)
        return known[2]


_active: ContextVar[Folds | None] = ContextVar("advmoe_folds", default=None)


@contextmanager
def folding() -> Iterator[None]:
    """Let passes inside fold what is fixed (see `folded`); nothing folded outlives it."""
    if _active.get() is not None:
        yield
        return
    token = _active.set(Folds())
    try:
        yield
    finally:
        _active.reset(token)


def folded(conv: nn.Module, norm: nn.Module, x: Tensor) -> Folded | None:
    """`conv` and the `norm` after it as one convolution of `x` (N, C, H, W); None where that is not the same.

    It is the same in eval mode, with nothing to learn and no hooks; it is done inside `folding`, or where it pays for a
    single pass. The reference (`masked`), and what is compiled or exported, stay as they are written.
    """
    if torch.compiler.is_compiling():
        return None
    folds = _active.get()
    if folds is None:
        once = type(conv) is MoEConv2d and ops.worth_packing(conv.bank, x, conv.num_experts)
        folds = Folds() if once else None
    if folds is None or not _fixed(conv, norm):
        return None
    assert isinstance(conv, nn.Conv2d | MoEConv2d) and isinstance(norm, BatchNorm2d)
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else norm.weight.dtype
    return folds.of(conv, norm, dtype)


def convolution(conv: nn.Conv2d, x: Tensor, folded: Folded) -> Tensor:
    """A plain `conv` of `x` (N, C, H, W), and what is `folded` into it."""
    filters, bias, packed = folded
    y = ops.fixed_convolution(x, packed)
    if y is not None:
        return y
    if isinstance(conv, Projection):
        return F.conv2d(ops.kept_pixels(x, conv.stride), filters, bias)
    return F.conv2d(x, filters, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def _fixed(conv: nn.Module, norm: nn.Module) -> bool:
    """Whether the two may be folded."""
    if type(norm) is not BatchNorm2d or type(conv) not in (nn.Conv2d, Projection, MoEConv2d):
        return False
    assert isinstance(conv, nn.Conv2d | MoEConv2d)
    filters, usual = (
        (conv.bank, conv.apart) if isinstance(conv, MoEConv2d) else (conv.weight, conv.padding_mode == "zeros")
    )
    if norm.training or not norm.track_running_stats or conv.bias is not None or not usual:
        return False
    if torch.is_grad_enabled() and any(each.requires_grad for each in (filters, norm.weight, norm.bias)):
        return False
    return not ops.listened(conv) and not ops.listened(norm) and active_routing().mode in ("hard", "soft")
