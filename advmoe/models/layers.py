"""The one place where a backbone's layers become Dense, S-Dense or MoE.

Backbones are written once, in the channels of the dense network; they ask a `LayerFactory` for their layers.
"""

from __future__ import annotations

from torch import nn

from advmoe.config import ModelConfig
from advmoe.moe.conv import MoEConv2d


class LayerFactory:
    """Makes the layers of one model. `num_moe_layers` counts the MoE layers made, in order of the forward pass."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.num_moe_layers = 0

    def channels(self, dense_channels: int) -> int:
        """Channels between layers: r times the backbone's, except in Dense."""
        return dense_channels if self.config.kind == "dense" else max(1, round(self.config.scale * dense_channels))

    def plain_conv(self, c_in: int, c_out: int, kernel_size: int, stride: int = 1, padding: int = 0) -> nn.Module:
        """A convolution that stays plain in every kind (stem, projection shortcut). Takes actual channels."""
        conv = nn.Conv2d(c_in, c_out, kernel_size, stride, padding, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        return conv

    def conv(self, c_in: int, c_out: int, kernel_size: int, stride: int = 1, padding: int = 0) -> nn.Module:
        """A convolution that is an MoE layer in an MoE-CNN. Takes the dense network's channels."""
        config = self.config
        narrow_in, narrow_out = self.channels(c_in), self.channels(c_out)
        if config.kind != "moe":
            return self.plain_conv(narrow_in, narrow_out, kernel_size, stride, padding)
        self.num_moe_layers += 1
        return MoEConv2d(
            narrow_in,
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
