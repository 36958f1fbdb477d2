"""The MoE convolution: a bank of filters, of which each sample uses one expert's.

Axes: `N` batch, `C_in C_out` channels of one pathway (r times the backbone's), `M` rows of the bank, `E` experts, `k`
kernel.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advmoe.moe.dispatch import merge, split, straight_through
from advmoe.moe.routers import LayerRouter
from advmoe.moe.routing import active_routing


def expert_rows(bank_rows: int, expert_rows: int, num_experts: int) -> list[list[int]]:
    """Rows of each expert: windows of `expert_rows`, evenly spaced over the bank and wrapping around, sorted.

    Two experts of half the bank are its halves; experts as large as the bank are all the same.
    """
    starts = [e * bank_rows // num_experts for e in range(num_experts)]
    return [sorted((start + i) % bank_rows for i in range(expert_rows)) for start in starts]


class MoEConv2d(nn.Module):
    """A convolution of which every sample computes one expert, chosen by a router (Zhang et al., 2023, sec. 3).

    Args:
        c_in, c_out: channels of one pathway.
        bank_rows: M, the rows that the experts' windows share (`experts="subset"`), or N * c_out for experts with no
            row in common.
        num_experts: E. layer: this layer's index in the pathway.
        own_router: whether the layer has its router (`router="layer"`) or takes the scores made ahead of all layers.
    """

    row_index: Tensor

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        *,
        bank_rows: int,
        num_experts: int,
        layer: int,
        own_router: bool = True,
        shared_init: bool = False,
    ) -> None:
        super().__init__()
        self.c_in, self.c_out, self.stride, self.padding = c_in, c_out, stride, padding
        self.num_experts, self.layer = num_experts, layer
        self.rows = expert_rows(bank_rows, c_out, num_experts)
        self.adjacent = [r[0] if r[-1] - r[0] + 1 == len(r) else None for r in self.rows]
        self.register_buffer("row_index", torch.tensor(self.rows), persistent=False)
        self.bank = nn.Parameter(torch.empty(bank_rows, c_in, kernel_size, kernel_size))
        self.router = LayerRouter(c_in, num_experts) if own_router else None
        # The backbone's own initialisation: fan-out of one pathway, as in S-Dense.
        nn.init.normal_(self.bank, std=math.sqrt(2 / (c_out * kernel_size**2)))
        if shared_init:
            self._copy_first_expert()

    def _copy_first_expert(self) -> None:
        taken = [row for rows in self.rows for row in rows]
        same = all(rows == self.rows[0] for rows in self.rows)
        if not same and len(set(taken)) < len(taken):
            raise ValueError(
                f"model.experts_init must be independent where experts overlap (scale * num_experts > 1), got 'shared' "
                f"with {self.num_experts} experts of {self.c_out} of {len(self.bank)} channels"
            )
        with torch.no_grad():
            first = self.bank[self.rows[0]].clone()
            for rows in self.rows[1:]:
                self.bank[rows] = first

    def weight(self, expert: int, bank: Tensor | None = None) -> Tensor:
        """The filters of `expert`, (C_out, C_in, k, k): a view where its rows are adjacent, which costs no copy."""
        bank = self.bank if bank is None else bank
        first = self.adjacent[expert]
        if first is not None:
            return bank.narrow(0, first, self.c_out)
        return bank.index_select(0, self.row_index[expert])

    def _conv(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, None, self.stride, self.padding)

    def _all_experts(self, x: Tensor, bank: Tensor) -> Tensor:
        """Every expert's output, (N, E, C_out, H, W)."""
        weights = torch.cat([self.weight(e, bank) for e in range(self.num_experts)])
        outputs: Tensor = self._conv(x, weights).unflatten(1, (self.num_experts, self.c_out))
        return outputs

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, H', W'), by the active routing (see `routing.route`)."""
        routing = active_routing()
        router = self.router
        scores = router(x) if router is not None else routing.shared[self.layer]
        choice = routing.choose(self.layer, scores)
        # One cast of the bank a pass: autocast would cast every expert's slice anew.
        bank: Tensor = self.bank
        dtype = bank.dtype
        if torch.is_autocast_enabled(device := x.device.type):
            dtype = torch.get_autocast_dtype(device)
            bank, x = bank.to(dtype), x.to(dtype)
        if routing.mode == "hard":
            plan = routing.plan(scores, choice)
            if len(plan.experts) == 1:
                y = self._conv(x, self.weight(plan.experts[0], bank))
            else:
                parts = zip(plan.experts, split(x, plan), strict=True)
                y = merge(tuple(self._conv(part, self.weight(expert, bank)) for expert, part in parts), plan)
            if not (torch.is_grad_enabled() and scores.requires_grad):
                return y
            return straight_through(y, scores.softmax(1).gather(1, choice[:, None])[:, 0])
        if routing.mode == "soft":
            weights = (scores / routing.temperature).softmax(1)
        else:
            probability = scores.softmax(1)
            weights = F.one_hot(choice, self.num_experts) * (1 + (probability - probability.detach()))
        return (self._all_experts(x, bank) * weights.to(dtype)[:, :, None, None, None]).sum(1)

    def extra_repr(self) -> str:
        """Shape, for `print(model)`."""
        return (
            f"{self.c_in}, {self.c_out}, experts={self.num_experts}, bank={tuple(self.bank.shape)}, layer={self.layer}"
        )
