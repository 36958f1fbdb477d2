"""What all MoE layers share: banks of rows, of which each sample uses one expert's, by the active routing.

Axes: `N` batch, `M` rows of a bank, `R` rows of one expert, `E` experts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advmoe.errors import InputError
from advmoe.moe.dispatch import Plan, chosen_probability, convolution, merge, mix, split, straight_through
from advmoe.moe.rectifier import Rectifier
from advmoe.moe.repeats import unrecorded
from advmoe.moe.routers import LayerRouter
from advmoe.moe.routing import Routing, active_routing, keep
from advmoe.ops import raw


def windows(bank_rows: int, expert_rows: int, num_experts: int) -> list[list[int]]:
    """Rows of each expert: windows of `expert_rows`, evenly spaced over the bank and wrapping around, sorted.

    Two experts of half the bank are its halves; experts as large as the bank are all the same.
    """
    starts = [e * bank_rows // num_experts for e in range(num_experts)]
    return [sorted((start + i) % bank_rows for i in range(expert_rows)) for start in starts]


WORTH_PACKING = 16
"""Samples from which on it pays to have a kernel read weights that are packed for this pass alone."""


@dataclass(frozen=True)
class Weights:
    """What a pass computes with."""

    banks: tuple[Tensor, ...]
    """(M, ...) each."""
    affine: bool = False
    """Whether the gate scales what is linear in the input alone, not the last of the banks, which are biases."""
    fixed: raw.Packed | None = None
    """The same, of a convolution whose weights do not learn, as the kernels read them."""


@dataclass(frozen=True)
class Finish:
    """What becomes of a layer's output y (N, C, H, W): max(norm(y) + shortcut, 0), with or without a norm."""

    rectifier: Rectifier
    norm: nn.BatchNorm2d | None
    shortcut: Tensor | None

    def __call__(self, *parts: Tensor, plan: Plan | None = None) -> Tensor:
        """What becomes of an output in one part, which may be overwritten, or in experts' parts by their `plan`."""
        return self.rectifier.finish(parts, plan, self.norm, self.shortcut)


class MoELayer(nn.Module, ABC):
    """A layer of which every sample computes one expert, chosen by a router (Zhang et al., 2023, sec. 3).

    A kind of layer says which parameters are `banks`, whose first axis the experts share out by the same windows of
    rows, and how to `compute` with one expert's rows of each.

    Args:
        bank_rows: M, the rows that the experts' windows share (`experts="subset"`), or E * R for experts with no row in
            common. expert_rows: R.
        num_experts: E. layer: this layer's index in the pathway.
        router: the layer's own (`router="layer"`), or None where scores are made ahead of all layers.
    """

    row_index: Tensor

    def __init__(
        self, *, bank_rows: int, expert_rows: int, num_experts: int, layer: int, router: LayerRouter | None
    ) -> None:
        super().__init__()
        self.num_experts, self.layer, self.bank_rows, self.expert_rows = num_experts, layer, bank_rows, expert_rows
        self.rows = windows(bank_rows, expert_rows, num_experts)
        self.adjacent = [r[0] if r[-1] - r[0] + 1 == len(r) else None for r in self.rows]
        self.apart = [row for rows in self.rows for row in rows] == list(range(bank_rows))
        """Whether the experts' rows lie one after another, none shared and none left."""
        self.register_buffer("row_index", torch.tensor(self.rows), persistent=False)
        self.router = router
        self.linear = False
        """Whether the layer is a linear map of its input, with no bias."""
        self.title = f"MoE layer {layer}"
        """What errors call it."""
        self.copies = False
        """Whether the output is a copy, which may be changed in place; else the router's gradient needs it as it is."""

    @abstractmethod
    def banks(self) -> tuple[Tensor, ...]:
        """The parameters that the experts share out, (M, ...) each."""

    @abstractmethod
    def compute(self, x: Tensor, *weights: Tensor) -> Tensor:
        """One expert's output for `x` (N, ...), `weights` being its rows (R, ...) of each bank."""

    def compute_all(self, x: Tensor, *banks: Tensor) -> Tensor:
        """Every expert's output, (N, E, ...)."""
        each = [self.compute(x, *(self.of_expert(e, bank) for bank in banks)) for e in range(self.num_experts)]
        return torch.stack(each, 1)

    def compute_each(self, x: Tensor, choice: Tensor, *banks: Tensor) -> Tensor | None:
        """Each sample's own expert's output, (N, ...), in one call that moves no sample, or None to group them."""
        return None

    def packed(self, *banks: Tensor) -> raw.Packed | None:
        """`banks` that do not learn in this pass as kernels read them, if there are kernels for the layer."""
        return None

    def of_expert(self, expert: int, bank: Tensor) -> Tensor:
        """The rows (R, ...) of `expert` in `bank`: a view where they are adjacent, which costs no copy."""
        first = self.adjacent[expert]
        if first is not None:
            return bank.narrow(0, first, self.expert_rows)
        return bank.index_select(0, self.row_index[expert])

    def idle_parameters(self) -> int:
        """How many of the banks' numbers one pathway leaves unused."""
        return sum(bank[0].numel() * (len(bank) - self.expert_rows) for bank in self.banks())

    def copy_first_expert(self) -> None:
        """Make every expert a copy of the first (`experts_init="shared"`). Raises `ValueError` where they overlap."""
        taken = [row for rows in self.rows for row in rows]
        same = all(rows == self.rows[0] for rows in self.rows)
        if not same and len(set(taken)) < len(taken):
            raise InputError(
                f"model.experts_init must be independent where experts overlap (scale * num_experts > 1), got 'shared' "
                f"with {self.num_experts} experts of {self.expert_rows} of {self.bank_rows} channels"
            )
        with torch.no_grad():
            for bank in self.banks():
                if bank.is_meta:  # nothing to copy, and PyTorch imports sympy to index without memory
                    continue
                first = bank[self.rows[0]].clone()
                for rows in self.rows[1:]:
                    bank[rows] = first

    def forward(self, x: Tensor) -> Tensor:
        """(N, ...) -> (N, ...), by the active routing (see `routing.route`)."""
        return self._pass(x, Weights(self.banks()))

    def _pass(self, x: Tensor, weights: Weights, finish: Finish | None = None) -> Tensor:
        """The layer with `weights`, its output finished if there is something to `finish` it."""
        routing = active_routing()
        scores = self._scores(x, routing)
        if scores.shape[0] != x.shape[0]:  # not `len`, which a graph for any batch size cannot keep open
            rule = f"{self.title} must get one row for each of the {len(scores)} images"
            raise InputError(f"{rule}, got shape {tuple(x.shape)}: leave it plain (`to_moe(..., skip=...)`)")
        choice = routing.choose(self.layer, scores)
        if scores.dim() == 2:
            y = self._routed(x, scores, choice, routing, weights, finish)
        else:  # tokens routed one by one: each is a sample of its own
            each = self._routed(x.flatten(0, 1), scores.flatten(0, 1), choice.flatten(), routing, weights)
            y = each.unflatten(0, choice.shape)
        keep(y)
        return y

    def _scores(self, x: Tensor, routing: Routing) -> Tensor:
        """The router's scores of `x`, (N, E) or (N, T, E); of a layer that has run in this pass, those that it had."""
        if routing.one_pass and self.layer in routing.scores:
            scores = routing.scores[self.layer]
            if torch.is_grad_enabled():
                routing.again[self.layer] = scores.detach().requires_grad_(scores.requires_grad)
            return scores
        if self.router is None:
            return routing.shared[self.layer]
        if routing.repeats is None:
            made: Tensor = self.router(x)
            return made
        with unrecorded(self.router):
            known = routing.repeats.again.get(self.layer)
            if known is not None:  # the run that is repeated may be a later one
                with torch.no_grad():
                    first = self.router(x)
                if first.shape != known.shape or not torch.allclose(first, known, 1e-3, 1e-5):
                    return known
            repeated: Tensor = self.router(x)
            return repeated

    def _grouped(
        self, x: Tensor, gate: Tensor | None, plan: Plan, banks: tuple[Tensor, ...], finish: Finish | None
    ) -> Tensor:
        """The output for samples `x` (N, ...), `straight_through` the `gate` (N,) if there is one, one expert's samples
        at a time.
        """
        if self.apart and len(plan.experts) > 1:
            # One node of autograd for all experts, whose gradients it puts side by side: a slice each adds zeros.
            shares = [bank.split(self.expert_rows) for bank in banks]
            rows = [tuple(share[e] for share in shares) for e in plan.experts]
        else:
            rows = [tuple(self.of_expert(e, bank) for bank in banks) for e in plan.experts]
        parts = zip(split(x, plan, gate), rows, strict=True)
        made = tuple(self.compute(part, *weights) for part, weights in parts)
        return merge(made, plan) if finish is None else finish(*made, plan=plan)

    def _chosen(
        self,
        x: Tensor,
        scores: Tensor,
        choice: Tensor,
        routing: Routing,
        weights: Weights,
        finish: Finish | None,
    ) -> Tensor:
        """The output for samples `x` (N, ...), of which each is computed by its expert alone."""
        gate = None
        if torch.is_grad_enabled() and scores.requires_grad:
            gate = chosen_probability(scores, choice)
        # Of y = W x + b the gate's gradient is <dL/dy, W x> = <dL/dx, x>, which leaves y free to be changed and is had
        # where gradients are brought back in order.
        ahead, behind = (gate, None) if weights.affine or (self.linear and x.requires_grad) else (None, gate)
        banks, fixed = weights.banks, weights.fixed
        learnt = torch.is_grad_enabled() and any(bank.requires_grad for bank in banks)
        if fixed is None and not learnt and len(x) >= WORTH_PACKING and raw.suits(x):
            fixed = self.packed(*banks)
        direct = finish if behind is None and not self.copies else None
        if len(x) > 1 and fixed is not None and fixed.dtype == x.dtype and raw.suits(x):
            if direct is not None and direct.norm is None:
                made = direct.rectifier.convolved(x, ahead, choice, fixed, direct.shortcut)
                if made is not None:
                    return made
            y = convolution(x, ahead, choice, fixed)
        elif len(x) > 1 and (each := self.compute_each(_gated(x, ahead), choice, *banks)) is not None:
            y = each
            routing.settle()
        else:
            y = self._grouped(x, ahead, routing.plan(scores, choice), banks, direct)
            if direct is not None:
                return y
        y = _gated(y, behind)
        if self.copies and y.requires_grad:
            y = y.clone()
        return y if finish is None else finish(y)

    def _routed(
        self,
        x: Tensor,
        scores: Tensor,
        choice: Tensor,
        routing: Routing,
        weights: Weights,
        finish: Finish | None = None,
    ) -> Tensor:
        """The output for samples `x` (N, ...) with `scores` (N, E) and `choice` (N,)."""
        if torch.is_autocast_enabled(device := x.device.type):
            # One cast of the banks a pass: autocast would cast every expert's slice anew.
            dtype = torch.get_autocast_dtype(device)
            weights, x = replace(weights, banks=tuple(bank.to(dtype) for bank in weights.banks)), x.to(dtype)
        if routing.mode == "hard":
            return self._chosen(x, scores, choice, routing, weights, finish)
        routing.settle()
        banks = weights.banks
        if routing.mode == "soft":
            y = mix(self.compute_all(x, *banks), (scores / routing.temperature).softmax(1))
        else:
            y = self._reference(x, scores, choice, routing, banks)
        return y if finish is None else finish(y)

    def _reference(
        self, x: Tensor, scores: Tensor, choice: Tensor, routing: Routing, banks: tuple[Tensor, ...]
    ) -> Tensor:
        """The output, by the formula of the mode."""
        if routing.mode == "gathered":
            if len(choice) != 1:
                raise InputError(f"mode gathered must be for 1 image with 1 expert a layer, got {len(choice)} choices")
            rows = self.row_index.index_select(0, choice)[0]
            return self.compute(x, *(bank.index_select(0, rows) for bank in banks))
        if routing.mode == "masked" and not (torch.is_grad_enabled() and scores.requires_grad):
            # No gradient to give the choice: the chosen one's output is taken as it is.
            every = self.compute_all(x, *banks).flatten(0, 1)
            return every.index_select(0, torch.arange(x.shape[0], device=x.device) * self.num_experts + choice)
        probability = scores.softmax(1)
        mixed = F.one_hot(choice, self.num_experts) * (1 + (probability - probability.detach()))
        every = self.compute_all(x, *banks)
        return (every * mixed.to(banks[0].dtype).view(*mixed.shape, *[1] * (every.dim() - 2))).sum(1)


def _gated(x: Tensor, gate: Tensor | None) -> Tensor:
    return x if gate is None else straight_through(x, gate)
