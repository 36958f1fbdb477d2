"""Batch norm folded into the convolution ahead of it, for as long as both stay as they are.

Axes: `N` batch, `C` channels, `H W` size, `M` rows of a bank, `E` experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advmoe.models.layers import Projection
from advmoe.models.norm import BatchNorm2d
from advmoe.moe.conv import MoEConv2d, kept_pixels
from advmoe.moe.dispatch import fixed_convolution
from advmoe.moe.layer import WORTH_PACKING, Finish
from advmoe.moe.rectifier import Rectifier, listened
from advmoe.moe.routing import active_routing
from advmoe.ops import raw

Folded = tuple[Tensor, Tensor, raw.Packed | None]
"""Filters that hold the norm's scale, in the shape of the convolution's own, and a bias for each; both as the kernels
read them.
"""


@dataclass
class Folds:
    """What has been folded, by norm, each with what it was made of: a change of that makes it anew."""

    made: dict[nn.Module, tuple[tuple[object, ...], Folded]] = field(default_factory=dict)

    def of(self, conv: nn.Conv2d | MoEConv2d, norm: BatchNorm2d, dtype: torch.dtype) -> Folded:
        """The filters of `conv` followed by `norm`, in `dtype`."""
        filters = conv.bank if isinstance(conv, MoEConv2d) else conv.weight
        mean, var = norm.running_mean, norm.running_var
        assert mean is not None and var is not None
        sources = (filters, norm.weight, norm.bias, mean, var)
        state = (dtype, norm.eps, *((each.data_ptr(), each._version) for each in sources))
        known = self.made.get(norm)
        if known is None or known[0] != state:
            # Made outside inference mode, as a later pass may want gradients.
            with torch.inference_mode(False), torch.no_grad():
                scale = norm.weight * (var + norm.eps).rsqrt()
                shift = norm.bias - mean * scale
                experts = len(filters) // len(scale)
                each = (filters * scale.repeat(experts).view(-1, 1, 1, 1), shift.repeat(experts))
                folded = each[0].to(dtype), each[1].to(dtype)
                packed = conv.packed(*folded) if isinstance(conv, MoEConv2d | Projection) else None
                known = self.made[norm] = state, (*folded, packed)
        return known[1]


_active: ContextVar[Folds | None] = ContextVar("advmoe_folds", default=None)


@contextmanager
def folding() -> Iterator[None]:
    """Let passes inside fold what is fixed (see `conv_norm`); nothing folded outlives it."""
    if _active.get() is not None:
        yield
        return
    token = _active.set(Folds())
    try:
        yield
    finally:
        _active.reset(token)


def conv_norm(
    conv: nn.Module, norm: nn.Module, x: Tensor, rectifier: Rectifier | None = None, shortcut: Tensor | None = None
) -> Tensor:
    """`norm(conv(x))` for `x` (N, C, H, W), by one convolution where that is the same: inside `folding`, in eval mode,
    with nothing to learn and nobody's hooks; then, if there is one, the `rectifier` of that and the `shortcut`. The
    reference (`masked`), and what is compiled or exported, stay as they are written.
    """
    compiling = torch.compiler.is_compiling()
    folds = None if compiling else _active.get()
    if folds is None and not compiling and _worth_folding(conv, x):
        folds = Folds()
    if folds is None or not _fixed(conv, norm):
        finish = None if rectifier is None or type(norm) is not BatchNorm2d else Finish(rectifier, norm, shortcut)
        if finish is None or compiling:
            y: Tensor = norm(conv(x))
            return y if rectifier is None else rectifier(y, shortcut)
        if type(conv) is MoEConv2d and not listened(conv):
            return conv.finished(x, finish)
        return finish(conv(x))
    finish = None if rectifier is None else Finish(rectifier, None, shortcut)
    assert isinstance(conv, nn.Conv2d | MoEConv2d) and isinstance(norm, BatchNorm2d)
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else norm.weight.dtype
    filters, bias, packed = folds.of(conv, norm, dtype)
    if isinstance(conv, MoEConv2d):
        return conv.folded(x, filters, bias, packed, finish)
    if packed is not None and packed.dtype == x.dtype and raw.suits(x):
        y = fixed_convolution(x, packed)
    elif isinstance(conv, Projection):
        y = F.conv2d(kept_pixels(x, conv.stride), filters, bias)
    else:
        y = F.conv2d(x, filters, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    return y if finish is None else finish(y)


def _worth_folding(conv: nn.Module, x: Tensor) -> bool:
    """Whether a single pass gains by it: where kernels read filters that are packed for this pass anyway."""
    if type(conv) is not MoEConv2d or torch.is_grad_enabled() or len(x) < WORTH_PACKING:
        return False
    return raw.suits(x) and raw.Packed.suits(conv.bank, conv.num_experts)


def _fixed(conv: nn.Module, norm: nn.Module) -> bool:
    """Whether `conv_norm` may fold the two."""
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
    return not listened(conv) and not listened(norm) and active_routing().mode in ("hard", "soft")


class Steps(nn.Sequential):
    """Modules in sequence, of which a convolution, the batch norm after it and its rectifier run as `conv_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> what the last step makes."""
        steps, done = list(self), 0
        while done < len(steps):
            step, following = steps[done], steps[done + 1 : done + 3]
            if following and isinstance(following[0], BatchNorm2d):
                last = following[-1]
                rectifier = last if isinstance(last, Rectifier) else None
                x, done = conv_norm(step, following[0], x, rectifier), done + (2 if rectifier is None else 3)
            else:
                x, done = step(x), done + 1
        return x
