"""The MoE MLP of a transformer: banks of hidden units, of which each sample uses one expert's.

Axes: `N` batch, `T` tokens, `D` embedding, `M` hidden units of the bank, `R` hidden units of one expert, `E` experts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advmoe import ops
from advmoe.moe.layer import MoELayer
from advmoe.moe.routers import LayerRouter, MakeRouter
from advmoe.moe.ways import Output


class MoEMLP(MoELayer):
    """Linear, GELU, linear over tokens, of which every sample computes one expert's hidden units, chosen by a router.

    A hidden unit is a row of each bank: its incoming weights, its bias and its outgoing weights. The second layer's
    bias belongs to no unit and is shared by the experts.

    Args:
        dim: D. hidden: R, the hidden units of one pathway. The rest is as of `MoELayer`.
        make_router: makes the layer's own router; None where scores are made ahead of all layers.
        per_token: whether its router chooses for each token rather than for each image.
        shared_init: whether the experts start as copies of one another.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        bank_rows: int,
        num_experts: int,
        layer: int,
        make_router: MakeRouter | None = LayerRouter,
        per_token: bool = False,
        shared_init: bool = False,
    ) -> None:
        router = make_router(dim, num_experts, per_token=per_token) if make_router else None
        super().__init__(bank_rows=bank_rows, expert_rows=hidden, num_experts=num_experts, layer=layer, router=router)
        self.dim, self.hidden = dim, hidden
        self.in_features = self.out_features = dim  # as `Linear` layers call them
        self.hidden_features = hidden
        self.fc1_weight = nn.Parameter(torch.empty(bank_rows, dim))
        self.fc1_bias = nn.Parameter(torch.zeros(bank_rows))
        self.fc2_weight = nn.Parameter(torch.empty(bank_rows, dim))
        self.fc2_bias = nn.Parameter(torch.zeros(dim))
        for weight in (self.fc1_weight, self.fc2_weight):
            # The backbone's own initialisation: Glorot's for one pathway, as in S-Dense.
            nn.init.normal_(weight, std=math.sqrt(2 / (dim + hidden)))
        if shared_init:
            self.copy_first_expert()

    def banks(self) -> tuple[Tensor, ...]:
        """Incoming weights (M, D), biases (M,) and outgoing weights (M, D) of the hidden units."""
        return self.fc1_weight, self.fc1_bias, self.fc2_weight

    def common(self) -> tuple[Tensor, ...]:
        """The second layer's bias (D,)."""
        return (self.fc2_bias,)

    def by_kernels(self, x: Tensor, gate: Tensor | None, choice: Tensor, *banks: Tensor) -> Output | None:
        """By `ops.routed_linear`, twice."""
        assert gate is None  # which stands ahead of layers that are `linear` alone
        into, bias, out = map(self.each_expert, banks)
        units = ops.routed_linear(x, choice, into, bias)
        if units is None:
            return None
        last = self.fc2_bias.to(units.dtype).expand(self.num_experts, -1)
        y = ops.routed_linear(F.gelu(units), choice, out.transpose(1, 2), last)
        return None if y is None else ops.Grouped((y,))

    def compute(self, x: Tensor, *weights: Tensor) -> Tensor:
        """(N, T, D) -> (N, T, D) with the hidden units `weights`: (R, D), (R,), (R, D)."""
        into, bias, out = weights
        return F.linear(F.gelu(F.linear(x, into, bias)), out.t(), self.fc2_bias)

    def compute_each(self, x: Tensor, choice: Tensor, *banks: Tensor) -> Tensor | None:
        """Each sample by its own expert, where a GPU has such products (`ops.products`)."""
        by_expert = ops.sorted_by_expert(x, choice, self.num_experts, self.dim, self.hidden)
        if by_expert is None:
            return None
        into, bias, out = map(self.each_expert, banks)
        units = F.gelu(by_expert.product(by_expert.split(x), into.mT, bias))
        return by_expert.merge(by_expert.product(units, out) + self.fc2_bias.to(units.dtype))

    def compute_all(self, x: Tensor, *banks: Tensor) -> Tensor:
        """Every expert's output, (N, E, T, D), in two matrix products."""
        into, bias, out = (torch.cat([self.of_expert(e, bank) for e in range(self.num_experts)]) for bank in banks)
        units = F.gelu(F.linear(x, into, bias)).unflatten(-1, (self.num_experts, self.hidden))
        every = torch.einsum("n...er,erd->ne...d", units, out.unflatten(0, (self.num_experts, self.hidden)))
        return every + self.fc2_bias.to(every.dtype)

    def extra_repr(self) -> str:
        """Shape, for `print(model)`."""
        return f"{self.dim}, {self.hidden}, experts={self.num_experts}, units={self.bank_rows}, layer={self.layer}"
