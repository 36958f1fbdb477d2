"""Convolution, batch norm, ReLU and shortcut as blocks write them, in as few passes over activations as can be.

    y = conv_norm_act(self.conv1, self.norm1, self.relu, x)
    return conv_norm_act(self.conv2, self.norm2, self.relu, y, self.shortcut(fork(x)))

Each computes what its modules compute one after another, in whatever mode they are. The pass's `Routing` hands on what
one block knows and the next one needs: the mean over pixels that a router begins with, an activation's second use.

Axes: `N` batch, `C` channels, `H W` size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from advmoe import ops
from advmoe.models.folding import Folded, convolution, folded
from advmoe.models.norm import BatchNorm2d
from advmoe.models.rectifier import Rectifier, registered
from advmoe.moe.conv import MoEConv2d
from advmoe.moe.routers import LayerRouter
from advmoe.moe.routing import active_routing, keep
from advmoe.moe.ways import Output, Weights


def norm_act(norm: nn.Module, act: Rectifier, x: Tensor) -> Tensor:
    """act(norm(x)) for `x` (N, C, H, W)."""
    return _finished(ops.Grouped((x,)), norm, act, None)


def conv_norm(conv: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    """norm(conv(x)) for `x` (N, C, H, W), by one convolution where that is the same (`folding.folded`)."""
    fold = folded(conv, norm, x)
    if fold is None:
        normed: Tensor = norm(conv(x))
        return normed
    return _remembered(conv, _convolved(conv, x, fold).merged())


def conv_norm_act(
    conv: nn.Module, norm: nn.Module, act: Rectifier, x: Tensor, shortcut: Tensor | None = None
) -> Tensor:
    """act(norm(conv(x)) + shortcut) for `x` (N, C, H, W)."""
    fold = folded(conv, norm, x)
    if fold is not None:
        y = _in_one_pass(conv, fold[2], act, x, shortcut)
        if y is None:
            y = registered(ops.norm_act(_convolved(conv, x, fold), None, act, shortcut, pool=act.pools))
    elif type(conv) is MoEConv2d and not ops.listened(conv) and not torch.compiler.is_compiling():
        y = _finished(conv.output(x, Weights(conv.banks())), norm, act, shortcut)
    else:
        y = _finished(ops.Grouped((conv(x),)), norm, act, shortcut)
    return _remembered(conv, y)


def fork(x: Tensor) -> Tensor:
    """`x`, for its use beside the main path: a gradient of its own, added to the other's where that costs no pass."""
    return x if torch.compiler.is_compiling() else active_routing().fork(x)


class Steps(nn.Sequential):
    """Modules in sequence, of which a convolution, the batch norm after it and its rectifier run as one."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the last step's output."""
        steps, done = list(self), 0
        while done < len(steps):
            step, (norm, act) = steps[done], (*steps[done + 1 : done + 3], None, None)[:2]
            if not isinstance(norm, BatchNorm2d):
                x, done = step(x), done + 1
            elif isinstance(act, Rectifier):
                x, done = conv_norm_act(step, norm, act, x), done + 3
            else:
                x, done = conv_norm(step, norm, x), done + 2
        return x


def _finished(y: Output, norm: nn.Module, act: Rectifier, shortcut: Tensor | None) -> Tensor:
    if type(norm) is not BatchNorm2d or torch.compiler.is_compiling():
        out: Tensor = act(norm(y.merged()), shortcut)
        return out
    return registered(ops.norm_act(y, norm, act, shortcut, pool=act.pools))


def _convolved(conv: nn.Module, x: Tensor, fold: Folded) -> Output:
    if isinstance(conv, MoEConv2d):
        filters, biases, packed = fold
        return conv.output(x, Weights((filters, biases), affine=True, filters=packed))
    assert isinstance(conv, nn.Conv2d)
    return ops.Grouped((convolution(conv, x, fold),))


def _remembered(conv: nn.Module, y: Tensor) -> Tensor:
    """`y`; where an MoE layer computed it, the pass's routing stays known as long as the graph of `y` is there."""
    if isinstance(conv, MoEConv2d):
        keep(y)
    return y


def _in_one_pass(
    conv: nn.Module, filters: ops.Packed | None, act: Rectifier, x: Tensor, shortcut: Tensor | None
) -> Tensor | None:
    """An MoE layer from its router's choice to its rectifier in one call, or None where there is more to it."""
    if filters is None or not isinstance(conv, MoEConv2d) or torch.is_grad_enabled():
        return None
    routing, router = active_routing(), conv.router
    usual = routing.mode == "hard" and routing.forced is None and conv.layer not in routing.scores
    if not usual or routing.repeats is not None or type(router) is not LayerRouter:
        return None
    pooled = routing.pooled(x)
    if pooled is None or ops.listened(router) or ops.listened(act):
        return None
    parts = router.norm, router.hidden, router.scores
    output = ops.whole_layer(parts, pooled, filters, x, shortcut, pool=act.pools)
    if output is None:
        return None
    routing.scores[conv.layer], routing.choices[conv.layer] = output.scores, output.choice
    return registered(ops.Rectified(output.y, output.pooled))
