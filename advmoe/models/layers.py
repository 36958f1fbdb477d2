"""The one place where a backbone's layers become Dense, S-Dense or MoE.

Backbones are written once, in the channels of the dense network; they ask a `LayerFactory` for their layers.

Axes: `N` batch, `C` channels, `H W` size, `T` tokens, `D` embedding.
"""

from __future__ import annotations

from functools import partial
from math import ceil

from torch import Tensor, nn
from torch.nn import functional as F

from advmoe import ops
from advmoe.config import ModelConfig
from advmoe.errors import InputError
from advmoe.models.rectifier import Rectifier
from advmoe.moe.conv import MoEConv2d
from advmoe.moe.mlp import MoEMLP
from advmoe.tables import KINDS, ROUTERS

MOST_PARAMETERS = 10_000_000_000
"""Of a new model: 40 GB in fp32."""


class TooLarge(InputError):
    """A model of more weights than there may be."""


class TooNarrow(InputError):
    """A layer of so many `channels` that `model.scale` leaves it no whole one."""

    def __init__(self, scale: float, channels: int, layer: str | None = None) -> None:
        where = "" if layer is None else f" of {layer}"
        super().__init__(
            "model.scale must leave every layer a whole channel (take a larger scale, or a larger model.width), "
            f"got {scale:g} of the {channels}{where}"
        )
        self.scale, self.channels = scale, channels


def narrowed(dense_channels: int, scale: float) -> int:
    """The channels that `scale` leaves of the dense network's: rounded, halves down, so that two experts of an odd
    number of channels stay apart at r = 1/2. Raises `TooNarrow` where it is less than one.
    """
    if scale * dense_channels < 1 - 1e-9:
        raise TooNarrow(scale, dense_channels)
    return ceil(scale * dense_channels - 0.5)


def linear(d_in: int, d_out: int) -> nn.Linear:
    """A linear layer as transformers start it: Glorot's weights, no bias."""
    layer = nn.Linear(d_in, d_out)
    nn.init.xavier_normal_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class Projection(nn.Conv2d):
    """A strided 1x1 convolution, as one of stride 1 on the pixels that it keeps (see `ops.kept_pixels`)."""

    def forward(self, input: Tensor) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, H', W')."""
        return F.conv2d(ops.kept_pixels(input, self.stride), self.weight, self.bias)

    def packed(self, filters: Tensor, biases: Tensor) -> ops.Packed | None:
        """`filters` (C_out, C_in, 1, 1) and `biases` (C_out,) as `ops.pack` has them, if it does."""
        return ops.pack(filters, biases, (self.stride[0], self.stride[1]), (0, 0))


class LayerFactory:
    """Makes the layers of one model. `num_moe_layers` counts its MoE layers so far, in order of the forward pass.

    Raises `TooLarge` before the model has more than `most` weights.
    """

    def __init__(self, config: ModelConfig, most: int = MOST_PARAMETERS) -> None:
        self.config, self.left, self.most = config, most, most
        self.kind, self.router = KINDS[config.kind], ROUTERS[config.router]
        # Routers of other packages know nothing of norms.
        self.router_options = {} if config.router_norm == "batch" else {"norm": config.router_norm}
        layer = self.router.layer
        self.make_router = partial(layer, **self.router_options) if layer and self.router_options else layer
        self.num_moe_layers = 0

    def _take(self, weights: int) -> None:
        self.left -= weights
        if self.left < 0:
            raise TooLarge(f"the model must have at most {self.most:,} weights, got more (model.name, model.width)")

    def _bank(self, rows: int, narrow: int) -> int:
        """Rows of the bank of an MoE layer that has `rows` in the dense network and `narrow` in a pathway."""
        config = self.config
        if config.experts == "independent":
            return config.num_experts * narrow
        if config.num_experts > rows:
            rule = f"<= the {rows} channels of every layer, of which experts are windows when model.experts is subset"
            raise InputError(f"model.num_experts must be {rule}, got {config.num_experts}")
        return rows

    def channels(self, dense_channels: int) -> int:
        """Channels between layers: r times the backbone's (`narrowed`), except in Dense and under a sparse model's
        masks.
        """
        return narrowed(dense_channels, self.config.scale) if self.kind.narrow else dense_channels

    def rectifier(self) -> Rectifier:
        """A ReLU, which pools for the routers of MoE layers that have their own."""
        return Rectifier(pools=self.kind.routed and self.router.in_layers)

    def plain_conv(self, c_in: int, c_out: int, kernel_size: int, stride: int = 1, padding: int = 0) -> nn.Module:
        """A convolution that stays plain in every kind (stem, projection shortcut). Takes actual channels."""
        self._take(c_in * c_out * kernel_size**2)
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
        if not self.kind.routed:
            return self.plain_conv(c_in, narrow_out, kernel_size, stride, padding)
        self.num_moe_layers += 1
        rows = self._bank(c_out, narrow_out)
        self._take(rows * c_in * kernel_size**2)
        return MoEConv2d(
            c_in,
            narrow_out,
            kernel_size,
            stride,
            padding,
            bank_rows=rows,
            num_experts=config.num_experts,
            layer=self.num_moe_layers - 1,
            make_router=self.make_router,
            shared_init=config.experts_init == "shared",
        )

    def mlp(self, dim: int, hidden: int) -> nn.Module:
        """A transformer's MLP, which is an MoE layer in an MoE-ViT: tokens (N, T, D) -> (N, T, D). Takes the dense
        network's hidden units, which are what r narrows; D stays.
        """
        config = self.config
        narrow = self.channels(hidden)
        self._take(2 * dim * narrow)
        if not self.kind.routed:
            return nn.Sequential(linear(dim, narrow), nn.GELU(), linear(narrow, dim))
        self.num_moe_layers += 1
        rows = self._bank(hidden, narrow)
        self._take(2 * dim * (rows - narrow))
        return MoEMLP(
            dim,
            narrow,
            bank_rows=rows,
            num_experts=config.num_experts,
            layer=self.num_moe_layers - 1,
            make_router=self.make_router,
            per_token=config.route_per == "token",
            shared_init=config.experts_init == "shared",
        )
