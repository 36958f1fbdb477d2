"""A router's scores, and a layer from its router to its rectifier.

Axes: `N` batch, `C` channels, `H W` size, `T` tokens, `E` experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advmoe.ops import raw
from advmoe.ops.hooks import listened
from advmoe.ops.once import once


def global_pool(x: Tensor) -> Tensor:
    """The mean of `x` over its pixels (N, C, H, W) or tokens (N, T, C), (N, C), in fp32 or better; (N, C) as it is."""
    if x.dim() != 4:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return x.sum(1) / x.shape[1] if x.dim() == 3 else x
    suits = raw.suits(x)
    if suits and not torch.is_grad_enabled():
        return raw.pooled(x)
    if torch.compiler.is_compiling() or raw.as_written():
        dtype = torch.promote_types(x.dtype, torch.float32)
        return x.sum((2, 3), dtype=dtype) / (x.shape[2] * x.shape[3])
    if suits or x.dtype in (torch.bfloat16, torch.float16):
        pooled: Tensor = _Pool.apply(x)  # type: ignore[no-untyped-call]
        return pooled
    # Not `mean`: its backward writes a full-size gradient, `sum`'s only a view of (N, C).
    return x.sum((2, 3)) / (x.shape[2] * x.shape[3])


def router_scores(
    x: Tensor, pooled: Tensor | None, norm: nn.Module, hidden: nn.Linear, last: nn.Linear, *, training: bool
) -> Tensor:
    """last(relu(hidden(norm(global_pool(x))))), (N, E), for `x` (N, C, H, W), (N, T, C) or (N, C), whose mean may be
    known: `pooled` (N, C). `training` is the router's own mode.
    """
    learns = torch.is_grad_enabled()
    # For one image a router's cost is that of its calls, of which a kernel's has more around it than PyTorch's.
    if x.dim() == 4 and (learns or x.shape[0] != 1) and not norm.training and raw.suits(x):
        if pooled is None:
            pooled = global_pool(x)
        scorer = _scorer(pooled, norm, hidden, last)
        if scorer is not None and not learns:
            return scorer.scores(pooled)[0]
        if scorer is not None:
            scored: Tensor = _Scored.apply(pooled, scorer)  # type: ignore[no-untyped-call]
            return scored
    if training or norm.training or learns or not isinstance(norm, nn.BatchNorm1d):
        scores: Tensor = last(hidden(norm(global_pool(x) if pooled is None else pooled)).relu())
        return scores
    # Functions have less around them than modules.
    if pooled is None:
        pooled = x.mean((2, 3)) if x.dtype == torch.float32 and x.dim() == 4 else global_pool(x)
    mean, var = norm.running_mean, norm.running_var
    centred = torch.batch_norm(pooled, norm.weight, norm.bias, mean, var, False, 0.0, norm.eps, False)
    return F.linear(F.linear(centred, hidden.weight, hidden.bias).relu_(), last.weight, last.bias)


def whole_layer(
    router: tuple[nn.Module, nn.Linear, nn.Linear],
    pooled: Tensor,
    filters: raw.Packed,
    x: Tensor,
    shortcut: Tensor | None,
    *,
    pool: bool,
) -> raw.LayerOutput | None:
    """max(conv(x) + shortcut, 0) for `x` (N, C, H, W) and its mean `pooled` (N, C), each sample by the one of `filters`
    that the `router`'s parts (see `router_scores`) rate highest, without gradients; None where no kernel does it all.
    """
    experts, c_out = filters.filters.shape[:2]
    if torch.is_grad_enabled() or x.shape[0] < 2 or filters.dtype != x.dtype or c_out % raw.LANES:
        return None
    scorer = _scorer(pooled, *router)
    if scorer is None or scorer.last.out_features != experts:
        return None
    if not raw.suits(x, *(() if shortcut is None else (shortcut,))):
        return None
    return raw.whole_layer(scorer, pooled, filters, x, shortcut, pool=pool)


def _scorer(pooled: Tensor, norm: nn.Module, hidden: nn.Linear, last: nn.Linear) -> raw.Scorer | None:
    """These three as kernels compute them on `pooled` (N, C) in eval mode; None where a parameter learns, a part has
    hooks, or is of another class.
    """
    if type(norm) is not nn.BatchNorm1d or type(hidden) is not nn.Linear or type(last) is not nn.Linear:
        return None
    if norm.training or any(map(listened, (norm, hidden, last))):
        return None
    learnable = (norm.weight, norm.bias, hidden.weight, hidden.bias, last.weight, last.bias)
    each = [one for one in (norm.running_mean, norm.running_var, *learnable) if one is not None]
    if len(each) < 8 or not pooled.shape[1] == norm.num_features == hidden.in_features:
        return None
    if hidden.out_features != last.in_features:
        return None
    if torch.is_grad_enabled() and any(p.requires_grad for p in learnable):
        return None
    return raw.Scorer(norm, hidden, last) if raw.suits(pooled, *each) else None


class _Pool(torch.autograd.Function):
    """Global average pool of (N, C, H, W), to fp32 (N, C) from lower precisions, whose gradient is a view."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.dtype, ctx.shape = x.dtype, x.shape
        if raw.suits(x):
            return raw.pooled(x)
        return x.sum((2, 3), dtype=torch.promote_types(x.dtype, torch.float32)) / (x.shape[2] * x.shape[3])

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        _, _, h, w = ctx.shape
        spread: Tensor = (grad / (h * w)).to(ctx.dtype)[:, :, None, None].expand(ctx.shape)
        return spread


class _Scored(torch.autograd.Function):
    """A router's scores of pooled features, by kernels."""

    @staticmethod
    def forward(ctx: Any, pooled: Tensor, scorer: raw.Scorer) -> Tensor:
        scores, hidden = scorer.scores(pooled)
        ctx.scorer = scorer
        ctx.save_for_backward(hidden, *scorer.tensors())  # so that a change of these does not go unnoticed
        return scores

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        hidden, *_ = ctx.saved_tensors
        scorer: raw.Scorer = ctx.scorer
        return scorer.backward(grad.contiguous(), hidden), None
