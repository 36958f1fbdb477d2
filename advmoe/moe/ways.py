"""The ways to compute a routed layer once its experts are chosen. `masked` is the definition. `hard` and `gathered`
agree with it; `soft` is a differentiable surrogate.

Axes: `N` batch, `M` rows of a bank, `E` experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from advmoe import ops
from advmoe.errors import InputError
from advmoe.moe.routing import Routing, RoutingMode

if TYPE_CHECKING:
    from advmoe.moe.layer import MoELayer


class Weights(NamedTuple):
    """What a layer computes with in a pass."""

    banks: tuple[Tensor, ...]
    """(M, ...) each."""
    affine: bool = False
    """Whether the gate scales what is linear in the input alone, not the last of the banks, which are biases."""
    filters: ops.Packed | None = None
    """The banks of a convolution that do not learn, packed ahead (`ops.pack`)."""


class Decision(NamedTuple):
    """What a layer's router decided."""

    scores: Tensor
    """(N, E)."""
    choice: Tensor
    """(N,)."""
    routing: Routing


Output = ops.Grouped | ops.Convolved | ops.Routed
"""A layer's output (N, ...), until it is `merged`: on demand, or by the operation that follows."""


def masked(layer: MoELayer, x: Tensor, decision: Decision, weights: Weights) -> Output:
    """The sum over experts of [e is chosen] * (1 + p_e - stop_grad(p_e)) * expert_e(x), with p = softmax(scores)."""
    scores, choice, _ = decision
    every = layer.compute_all(x, *weights.banks)
    if not (torch.is_grad_enabled() and scores.requires_grad):
        # No gradient to give the choice: the chosen one's output is taken as it is.
        chosen = torch.arange(x.shape[0], device=x.device) * layer.num_experts + choice
        return _whole(every.flatten(0, 1).index_select(0, chosen))
    probability = scores.softmax(1)
    gates = F.one_hot(choice, layer.num_experts) * (1 + (probability - probability.detach()))
    return _whole((every * gates.to(weights.banks[0].dtype).view(*gates.shape, *[1] * (every.dim() - 2))).sum(1))


def soft(layer: MoELayer, x: Tensor, decision: Decision, weights: Weights) -> Output:
    """The sum over all experts of softmax(scores / temperature)_e * expert_e(x)."""
    mixture = (decision.scores / decision.routing.temperature).softmax(1)
    return _whole(ops.mix(layer.compute_all(x, *weights.banks), mixture))


def gathered(layer: MoELayer, x: Tensor, decision: Decision, weights: Weights) -> Output:
    """The chosen expert's rows of the banks, gathered by index: for one image, without gradients for the choice."""
    choice = decision.choice
    if len(choice) != 1:
        raise InputError(f"mode gathered must be for 1 image with 1 expert a layer, got {len(choice)} choices")
    rows = layer.row_index.index_select(0, choice)[0]
    return _whole(layer.compute(x, *(bank.index_select(0, rows) for bank in weights.banks)))


def hard(layer: MoELayer, x: Tensor, decision: Decision, weights: Weights) -> Output:
    """Each sample's chosen expert alone: all samples at once, if that is faster, or expert by expert."""
    scores, choice, routing = decision
    banks, filters = weights.banks, weights.filters
    gate = ops.chosen_probability(scores, choice) if torch.is_grad_enabled() and scores.requires_grad else None
    # The gate can scale x instead of y = W x + b: <dL/dy, W x> = <dL/dx, x>. So y may be overwritten, and the product
    # is taken in the pass that puts the samples' gradients back in order.
    ahead, behind = (gate, None) if weights.affine or (layer.linear and x.requires_grad) else (None, gate)
    learns = torch.is_grad_enabled() and any(bank.requires_grad for bank in banks)
    if filters is None and not learns:
        filters = layer.packed(*banks, once=x)
    y: Output | None = ops.convolved(x, ahead, choice, filters)
    if y is None and (y := _at_once(layer, x, ahead, choice, banks)) is not None:
        routing.settle()
    if y is None:
        y = _expert_by_expert(layer, x, ahead, decision, banks)
    if behind is not None:  # a copy, as the network may change y in place and the gate's gradient needs it as it is
        y = _whole(ops.straight_through(y.merged(), behind).clone())
    return y


def _at_once(
    layer: MoELayer, x: Tensor, gate: Tensor | None, choice: Tensor, banks: tuple[Tensor, ...]
) -> Output | None:
    """Each sample's own expert, without grouping samples on the host; None where that is slower. Of a layer that
    `masks`, every expert for all samples, of which each keeps its own; also where it has `kernels` that do not take it.
    """
    y = layer.by_kernels(x, gate, choice, *banks) if layer.kernels else None
    masks = layer.masks or layer.kernels
    if y is not None or not (masks or len(x) > 1):
        return y
    gated = x if gate is None else ops.straight_through(x, gate)
    if masks:
        return _whole(ops.chosen(layer.compute_all(gated, *banks), choice))
    each = layer.compute_each(gated, choice, *banks)
    return None if each is None else _whole(each)


def _expert_by_expert(
    layer: MoELayer, x: Tensor, gate: Tensor | None, decision: Decision, banks: tuple[Tensor, ...]
) -> Output:
    plan = decision.routing.plan(decision.scores, decision.choice)
    if layer.apart and len(plan.experts) > 1:
        # One node of autograd splits each bank and puts the experts' gradients side by side; a slice each would add
        # up gradients as large as the bank.
        shares = [bank.split(layer.expert_rows) for bank in banks]
        rows = [tuple(share[e] for share in shares) for e in plan.experts]
    else:
        rows = [tuple(layer.of_expert(e, bank) for bank in banks) for e in plan.experts]
    parts = zip(ops.split(x, plan.members, gate), rows, strict=True)
    return ops.Grouped(tuple(_padded(layer, part, weights) for part, weights in parts), plan.members)


_MULTIPLE = 16
"""Samples of which a group has a multiple where a GPU times its ways to convolve anew for each number of them."""


def _padded(layer: MoELayer, part: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
    """One expert's output for its samples `part` (n_e, ...): of few sizes where sizes cost (`cudnn.benchmark`)."""
    short = -len(part) % _MULTIPLE
    if short == 0 or part.device.type == "cpu" or not torch.backends.cudnn.benchmark:
        return layer.compute(part, *weights)
    whole = F.pad(part, (0, 0) * (part.dim() - 1) + (0, short))
    return layer.compute(whole, *weights)[: len(part)]


def _whole(y: Tensor) -> Output:
    return ops.Grouped((y,))


Way = Callable[["MoELayer", Tensor, Decision, Weights], Output]
WAYS: Mapping[RoutingMode, Way] = {"masked": masked, "soft": soft, "gathered": gathered, "hard": hard}
