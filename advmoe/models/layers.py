"""The one place where a backbone's layers become Dense, S-Dense or MoE.

Backbones are written once, in the channels of the dense network; they ask a `LayerFactory` for their layers.
"""

from __future__ import annotations

from math import ceil

from torch import Tensor, nn
from torch.nn import functional as F

from advmoe import native
from advmoe.config import ModelConfig
from advmoe.moe.conv import MoEConv2d, kept_pixels
from advmoe.moe.mlp import MoEMLP
from advmoe.moe.rectifier import Rectifier


def narrowed(dense_channels: int, scale: float) -> int:
    """The channels that `scale` leaves of the dense network's: rounded, halves down, so that two experts of an odd
    number of channels stay apart at r = 1/2; at least 1.
    """
    return max(1, ceil(scale * dense_channels - 0.5))


def linear(d_in: int, d_out: int) -> nn.Linear:
    """A linear layer as transformers start it: Glorot's weights, no bias."""
    layer = nn.Linear(d_in, d_out)
    nn.init.xavier_normal_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class Projection(nn.Conv2d):
    """A strided 1x1 convolution, as one of stride 1 on the pixels that it keeps (see `moe.conv.kept_pixels`)."""

    def forward(self, input: Tensor) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, H', W')."""
        return F.conv2d(kept_pixels(input, self.stride), self.weight, self.bias)

    def packed(self, filters: Tensor, biases: Tensor) -> native.Packed | None:
        """`filters` (C_out, C_in, 1, 1) and `biases` (C_out,) as the kernels read them, or None where they do not."""
        if not native.Packed.suits(filters, 1):
            return None
        return native.Packed.of(filters[None], biases[None], (self.stride[0], self.stride[1]), (0, 0))


class LayerFactory:
    """Makes the layers of one model. `num_moe_layers` counts the MoE layers made, in order of the forward pass."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.num_moe_layers = 0

    def channels(self, dense_channels: int) -> int:
        """Channels between layers: r times the backbone's (`narrowed`), except in Dense and under a sparse model's
        masks.
        """
        return (
            dense_channels if self.config.kind in ("dense", "sparse") else narrowed(dense_channels, self.config.scale)
        )

    def rectifier(self) -> Rectifier:
        """A ReLU, of which MoE layers with routers of their own take what these pool."""
        return Rectifier(pools=self.config.kind == "moe" and self.config.router == "layer")

    def plain_conv(self, c_in: int, c_out: int, kernel_size: int, stride: int = 1, padding: int = 0) -> nn.Module:
        """A convolution that stays plain in every kind (stem, projection shortcut). Takes actual channels."""
        conv: nn.Conv2d
        if kernel_size == 1 and stride > 1 and padding == 0:
            conv = Projection(c_in, c_out, 1, stride, bias=False)
        else:
            conv = nn.Conv2d(c_in, c_out, kernel_size, stride, padding, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        return conv

    def conv(self, c_in: int, c_out: int, kernel_size: int, stride: int = 1, padding: int = 0) -> nn.Module:
        """A convolution that is an MoE layer in an MoE-CNN.

        Takes the channels that arrive (where feature maps are concatenated, a sum of rounded parts) and the dense
        network's channels to make.
        """
        config, narrow_out = self.config, self.channels(c_out)
        if config.kind != "moe":
            return self.plain_conv(c_in, narrow_out, kernel_size, stride, padding)
        self.num_moe_layers += 1
        return MoEConv2d(
            c_in,
            narrow_out,
            kernel_size,
            stride,
            padding,
            bank_rows=c_out if config.experts == "subset" else config.num_experts * narrow_out,
            num_experts=config.num_experts,
            layer=self.num_moe_layers - 1,
            own_router=config.router == "layer",
            shared_init=config.experts_init == "shared",
        )

    def mlp(self, dim: int, hidden: int) -> nn.Module:
        """A transformer's MLP, which is an MoE layer in an MoE-ViT: tokens (N, T, D) -> (N, T, D). Takes the dense
        network's hidden units, which are what r narrows; D stays.
        """
        config = self.config
        narrow = self.channels(hidden)
        if config.kind != "moe":
            return nn.Sequential(linear(dim, narrow), nn.GELU(), linear(narrow, dim))
        self.num_moe_layers += 1
        return MoEMLP(
            dim,
            narrow,
            bank_rows=hidden if config.experts == "subset" else config.num_experts * narrow,
            num_experts=config.num_experts,
            layer=self.num_moe_layers - 1,
            own_router=config.router == "layer",
            per_token=config.route_per == "token",
            shared_init=config.experts_init == "shared",
        )
