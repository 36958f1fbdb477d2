"""The MoE convolution: a bank of filters, of which each sample uses one expert's.

Axes: `N` batch, `C_in C_out` channels of one pathway (r times the backbone's), `M` rows of the bank, `E` experts, `k`
kernel.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advmoe.moe.layer import MoELayer
from advmoe.moe.routers import LayerRouter


class MoEConv2d(MoELayer):
    """A convolution of which every sample computes one expert, chosen by a router.

    Args:
        c_in, c_out: channels of one pathway. The rest is as of `torch.nn.Conv2d` and `MoELayer`.
        own_router: whether the layer has its router (`router="layer"`) or takes the scores made ahead of all layers.
        shared_init: whether the experts start as copies of one another.
    """

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
        router = LayerRouter(c_in, num_experts) if own_router else None
        super().__init__(
            bank_rows=bank_rows, expert_rows=c_out, num_experts=num_experts, layer=layer, router=router
        )  # fmt: skip
        self.c_in, self.c_out, self.stride, self.padding = c_in, c_out, stride, padding
        self.bank = nn.Parameter(torch.empty(bank_rows, c_in, kernel_size, kernel_size))
        # The backbone's own initialisation: fan-out of one pathway, as in S-Dense.
        nn.init.normal_(self.bank, std=math.sqrt(2 / (c_out * kernel_size**2)))
        if shared_init:
            self.copy_first_expert()

    def banks(self) -> tuple[Tensor, ...]:
        """The filters (M, C_in, k, k)."""
        return (self.bank,)

    def compute(self, x: Tensor, *weights: Tensor) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, H', W') with the filters (C_out, C_in, k, k)."""
        return F.conv2d(x, weights[0], None, self.stride, self.padding)

    def compute_all(self, x: Tensor, *banks: Tensor) -> Tensor:
        """Every expert's output, (N, E, C_out, H', W'), in one convolution."""
        weights = torch.cat([self.of_expert(e, banks[0]) for e in range(self.num_experts)])
        outputs: Tensor = self.compute(x, weights).unflatten(1, (self.num_experts, self.c_out))
        return outputs

    def extra_repr(self) -> str:
        """Shape, for `print(model)`."""
        return (
            f"{self.c_in}, {self.c_out}, experts={self.num_experts}, bank={tuple(self.bank.shape)}, layer={self.layer}"
        )
