"""The MoE linear layer: a bank of rows, of which each sample uses one expert's.

Axes: `N` batch, `T` tokens, `C_in C_out` features, `M` rows of the bank, `E` experts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advmoe import ops
from advmoe.errors import require_whole
from advmoe.moe.described import Described
from advmoe.moe.layer import MoELayer
from advmoe.moe.routers import LayerRouter, MakeRouter
from advmoe.moe.ways import Output


class MoELinear(MoELayer):
    """A linear layer of which every sample computes one expert, chosen by a router that sees the mean of its tokens.

    Args:
        c_in, c_out: features of one pathway. bias: whether the rows have one. The rest is as of `MoEConv2d`.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        *,
        bank_rows: int,
        num_experts: int,
        layer: int,
        bias: bool = True,
        make_router: MakeRouter | None = LayerRouter,
        shared_init: bool = False,
    ) -> None:
        require_whole("c_in", c_in, 1)
        router = make_router(c_in, num_experts) if make_router else None
        super().__init__(bank_rows=bank_rows, expert_rows=c_out, num_experts=num_experts, layer=layer, router=router)
        self.c_in, self.c_out = c_in, c_out
        self.in_features, self.out_features = c_in, c_out  # as a `Linear` calls them
        self.bank = nn.Parameter(torch.empty(bank_rows, c_in))
        self.bias = nn.Parameter(torch.empty(bank_rows)) if bias else None
        bound = 1 / math.sqrt(c_in)  # as `torch.nn.Linear` starts
        for bank in self.banks():
            nn.init.uniform_(bank, -bound, bound)
        if shared_init:
            self.copy_first_expert()

    def banks(self) -> tuple[Tensor, ...]:
        """The rows (M, C_in) and, where there is a bias, its numbers (M,)."""
        return (self.bank,) if self.bias is None else (self.bank, self.bias)

    @property
    def weight(self) -> Described:
        """Type, place and shape of one expert's rows (C_out, C_in)."""
        return Described(self.bank, self.c_out, f"the weight of {self.title}")

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, C_in), tokens (N, T, C_in), or tokens in several axes (N, H, W, C_in) -> the same with C_out."""
        if x.dim() <= 3:
            return super().forward(x)
        # To the router four axes would be an image, channels first.
        y: Tensor = super().forward(x.flatten(1, -2)).unflatten(1, x.shape[1:-1])
        return y

    def by_kernels(self, x: Tensor, gate: Tensor | None, choice: Tensor, *banks: Tensor) -> Output | None:
        """By `ops.routed_linear`."""
        assert gate is None  # which stands ahead of layers that are `linear` alone
        y = ops.routed_linear(x, choice, *map(self.each_expert, banks))
        return None if y is None else ops.Grouped((y,))

    def compute(self, x: Tensor, *weights: Tensor) -> Tensor:
        """(N, ..., C_in) -> (N, ..., C_out) with the rows (C_out, C_in) and the bias (C_out,), if any."""
        return F.linear(x, *weights)

    def compute_each(self, x: Tensor, choice: Tensor, *banks: Tensor) -> Tensor | None:
        """Each sample by its own expert, where a GPU has such a product (`ops.products`)."""
        by_expert = ops.sorted_by_expert(x, choice, self.num_experts, self.c_in, self.c_out)
        if by_expert is None:
            return None
        rows, *biases = map(self.each_expert, banks)
        return by_expert.merge(by_expert.product(by_expert.split(x), rows.mT, *biases))

    def compute_all(self, x: Tensor, *banks: Tensor) -> Tensor:
        """Every expert's output, (N, E, ..., C_out), in one matrix product."""
        every = [torch.cat([self.of_expert(e, bank) for e in range(self.num_experts)]) for bank in banks]
        outputs: Tensor = self.compute(x, *every).unflatten(-1, (self.num_experts, self.c_out))
        return outputs.movedim(-2, 1)

    def extra_repr(self) -> str:
        """Shape, for `print(model)`."""
        return (
            f"{self.c_in}, {self.c_out}, experts={self.num_experts}, bank={tuple(self.bank.shape)}, layer={self.layer}"
        )
