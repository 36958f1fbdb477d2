"""What all MoE layers share: banks of rows, of which each sample uses one expert's, by the active routing.

Axes: `N` batch, `M` rows of a bank, `R` rows of one expert, `E` experts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from advmoe import ops
from advmoe.errors import InputError, require_whole
from advmoe.moe.repeats import unrecorded
from advmoe.moe.routers import RouterOwner
from advmoe.moe.routing import Routing, active_routing, keep
from advmoe.moe.ways import WAYS, Decision, Output, Weights


def windows(bank_rows: int, expert_rows: int, num_experts: int) -> list[list[int]]:
    """Rows of each expert: windows of `expert_rows`, evenly spaced over the bank and wrapping around, sorted.

    Two experts of half the bank are its halves; experts as large as the bank are all the same.
    """
    starts = [e * bank_rows // num_experts for e in range(num_experts)]
    return [sorted((start + i) % bank_rows for i in range(expert_rows)) for start in starts]


class MoELayer(RouterOwner, ABC):
    """A layer of which every sample computes one expert, chosen by a router (Zhang et al., 2023, sec. 3).

    A subclass says which parameters are its `banks`, and how to `compute` with one expert's rows of them. The experts
    share out the first axis of every bank by the same windows of rows.

    Args:
        bank_rows: M, the rows that the experts' windows share (`experts="subset"`), or E * R for experts with no row in
            common. expert_rows: R.
        num_experts: E. layer: this layer's index in the pathway.
        router: the layer's own (`router="layer"`), or None where scores are made ahead of all layers.
    """

    row_index: Tensor

    def __init__(
        self, *, bank_rows: int, expert_rows: int, num_experts: int, layer: int, router: nn.Module | None
    ) -> None:
        super().__init__()
        for name, number, least in (
            ("num_experts", num_experts, 1), ("layer", layer, 0), ("expert_rows", expert_rows, 1),
            ("bank_rows", bank_rows, expert_rows),
        ):  # fmt: skip
            require_whole(name, number, least)
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
        self.masks = False
        """Whether a hard pass computes every expert and keeps each sample's own: more arithmetic, but the host does not
        wait for the choice (`models.compute`).
        """
        self.kernels = False
        """Whether kernels for GPUs compute a hard pass (`by_kernels`); all experts are computed where they do not."""

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """As a module does; of a layer that was made without memory, what no file holds is filled in too."""
        with torch.no_grad():
            self.row_index.copy_(torch.tensor(self.rows))
        super()._load_from_state_dict(*args, **kwargs)

    @abstractmethod
    def banks(self) -> tuple[Tensor, ...]:
        """The parameters that the experts share out, (M, ...) each."""

    def common(self) -> tuple[Tensor, ...]:
        """Parameters of the layer that are no expert's own."""
        return ()

    @abstractmethod
    def compute(self, x: Tensor, *weights: Tensor) -> Tensor:
        """One expert's output for `x` (N, ...), `weights` being its rows (R, ...) of each bank."""

    def compute_all(self, x: Tensor, *banks: Tensor) -> Tensor:
        """Every expert's output, (N, E, ...)."""
        each = [self.compute(x, *(self.of_expert(e, bank) for bank in banks)) for e in range(self.num_experts)]
        return torch.stack(each, 1)

    def compute_each(self, x: Tensor, choice: Tensor, *banks: Tensor) -> Tensor | None:
        """The output (N, ...), each sample by its own expert, in one call that moves no sample; None to group them."""
        return None

    def by_kernels(self, x: Tensor, gate: Tensor | None, choice: Tensor, *banks: Tensor) -> Output | None:
        """The output, each sample by its own expert, of kernels for GPUs that move no sample and leave the choice on
        the device; `x` (N, ...) goes through the `gate` (N,) first, if there is one. None where they do not take it.
        """
        return None

    def packed(self, *banks: Tensor, once: Tensor | None = None) -> ops.Packed | None:
        """`banks` that do not learn, packed for kernels (`ops.pack`, which says what `once` is), or None."""
        return None

    def of_expert(self, expert: int, bank: Tensor) -> Tensor:
        """The rows (R, ...) of `expert` in `bank`: a view where they are adjacent, which costs no copy."""
        first = self.adjacent[expert]
        if first is not None:
            return bank.narrow(0, first, self.expert_rows)
        return bank.index_select(0, self.row_index[expert])

    def each_expert(self, bank: Tensor) -> Tensor:
        """Every expert's rows of `bank`, (E, R, ...): a view where experts share none."""
        rows = bank if self.apart else bank.index_select(0, self.row_index.flatten())
        each: Tensor = rows.unflatten(0, (self.num_experts, self.expert_rows))
        return each

    def idle_parameters(self) -> int:
        """How many of the banks' numbers one pathway leaves unused."""
        return sum(bank[0].numel() * (len(bank) - self.expert_rows) for bank in self.banks())

    @property
    def overlapping(self) -> bool:
        """Whether experts share some of their rows, not none or all."""
        every = [row for rows in self.rows for row in rows]
        return any(rows != self.rows[0] for rows in self.rows) and len(set(every)) < len(every)

    def copy_first_expert(self) -> None:
        """Make every expert a copy of the first (`experts_init="shared"`). Raises `ValueError` where they overlap."""
        if self.overlapping:
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
        y = self.output(x, Weights(self.banks())).merged()
        keep(y)
        return y

    def output(self, x: Tensor, weights: Weights) -> Output:
        """The output for `x` (N, ...) with `weights`, which the operation that follows merges or computes."""
        decision = self.decide(x)
        if decision.scores.dim() == 2:
            return self._computed(x, decision, weights)
        # Tokens routed one by one: each is a sample of its own.
        scores, choice, routing = decision
        each = Decision(scores.flatten(0, 1), choice.flatten(), routing)
        y = self._computed(x.flatten(0, 1), each, weights).merged()
        return ops.Grouped((y.unflatten(0, choice.shape),))

    def decide(self, x: Tensor) -> Decision:
        """The router's scores of `x` and its choice, which the routing records: (N, E), (N,), or (N, T, E), (N, T)."""
        routing = active_routing()
        scores = self._scores(x, routing)
        if scores.shape[0] != x.shape[0]:  # not `len`, which a graph for any batch size cannot keep open
            rule = f"{self.title} must get one row for each of the {len(scores)} images"
            raise InputError(f"{rule}, got shape {tuple(x.shape)}: leave it plain (`to_moe(..., skip=...)`)")
        if scores.shape[-1] != self.num_experts:
            rule = f"the router of {self.title} must score its {self.num_experts} experts"
            raise InputError(f"{rule}, got shape {tuple(scores.shape)}")
        choice = routing.choose(self.layer, scores)
        return Decision(scores if routing.gated else scores.detach(), choice, routing)

    def _computed(self, x: Tensor, decision: Decision, weights: Weights) -> Output:
        """The output for samples `x` (N, ...), in the way of the routing's mode."""
        if torch.is_autocast_enabled(device := x.device.type):
            # One cast of the banks a pass: autocast would cast every expert's slice anew.
            dtype = torch.get_autocast_dtype(device)
            weights, x = weights._replace(banks=tuple(bank.to(dtype) for bank in weights.banks)), x.to(dtype)
        mode = decision.routing.mode
        if mode != "hard":
            decision.routing.settle()
        return WAYS[mode](self, x, decision, weights)

    def _scores(self, x: Tensor, routing: Routing) -> Tensor:
        """The router's scores of `x`, (N, E) or (N, T, E). A layer that runs again in a pass keeps its first scores."""
        if routing.one_pass and self.layer in routing.scores:
            scores: Tensor = routing.scores[self.layer]
            if torch.is_grad_enabled():
                routing.again[self.layer] = scores.detach().requires_grad_(scores.requires_grad)
            return scores
        if self.router is None:
            if len(routing.shared) <= self.layer:
                rule = f"{self.title} must have a router, or scores made ahead of it (a model's router of the image)"
                raise InputError(f"{rule}, got scores of {len(routing.shared)} layers")
            return routing.shared[self.layer]
        if routing.repeats is None:
            scores = self.router(x)
            return scores
        with unrecorded(self.router):
            later = routing.repeats.again.get(self.layer)
            if later is not None:  # the layer ran more than once: this may repeat a run after the first
                with torch.no_grad():
                    first = self.router(x)
                if first.shape != later.shape or not torch.allclose(first, later, 1e-3, 1e-5):
                    return later
            scores = self.router(x)
            return scores


def moe_layers(module: nn.Module) -> list[MoELayer]:
    """The MoE layers in a module, by their numbers."""
    return sorted((each for each in module.modules() if isinstance(each, MoELayer)), key=lambda each: each.layer)
