"""DenseNet-BC (Huang et al., CVPR 2017), in the channels that a `LayerFactory` decides.

Axes: `N` batch, `C` channels, `H W` size, `K` classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from advmoe.errors import InputError
from advmoe.models.fused import conv_norm_act, norm_act
from advmoe.models.layers import LayerFactory
from advmoe.models.norm import BatchNorm2d
from advmoe.models.stem import stem, stem_stride


class DenseLayer(nn.Module):
    """Norm, ReLU and convolution, 1x1 to four times the growth, then 3x3 to the growth: appended to the input.

    Both convolutions are MoE layers, and their routers see what they see: normalised and activated. `narrow_in` are the
    channels that arrive, which are a sum of rounded parts.
    """

    def __init__(self, layers: LayerFactory, narrow_in: int, growth: int) -> None:
        super().__init__()
        narrow = layers.channels(4 * growth)
        self.norm1 = BatchNorm2d(narrow_in)
        self.conv1 = layers.conv(narrow_in, 4 * growth, 1)
        self.norm2 = BatchNorm2d(narrow)
        self.conv2 = layers.conv(narrow, growth, 3, 1, 1)
        self.relu = layers.rectifier()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C + growth, H, W)."""
        y = norm_act(self.norm1, self.relu, x)
        y = conv_norm_act(self.conv1, self.norm2, self.relu, y)
        return torch.cat((x, self.conv2(y)), 1)


class Transition(nn.Module):
    """Norm, ReLU, 1x1 convolution (an MoE layer) to `c_out`, and 2x2 average pooling."""

    def __init__(self, layers: LayerFactory, narrow_in: int, c_out: int) -> None:
        super().__init__()
        self.norm = BatchNorm2d(narrow_in)
        self.conv = layers.conv(narrow_in, c_out, 1)
        self.relu = layers.rectifier()
        self.pool = nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H/2, W/2)."""
        out: Tensor = self.pool(self.conv(norm_act(self.norm, self.relu, x)))
        return out


class DenseNet(nn.Module):
    """Blocks of `depths` bottleneck layers, growth `width / 2`, transitions to half the channels between them."""

    def __init__(
        self,
        layers: LayerFactory,
        *,
        depths: tuple[int, ...],
        width: int,
        in_channels: int,
        num_classes: int,
        input_size: int,
    ) -> None:
        super().__init__()
        self.stem = stem(layers, in_channels, width, input_size, activate=False)
        self.router_pool = stem_stride(input_size)
        if width < 2:
            raise InputError(f"model.width must be >= 2 for a DenseNet (it grows by half of it), got {width}")
        growth = width // 2
        c, narrow = width, layers.channels(width)
        steps: list[nn.Module] = []
        for block, depth in enumerate(depths):
            if block:
                c //= 2
                steps.append(Transition(layers, narrow, c))
                narrow = layers.channels(c)
            for _ in range(depth):
                steps.append(DenseLayer(layers, narrow, growth))
                c, narrow = c + growth, narrow + layers.channels(growth)
        self.blocks = nn.Sequential(*steps)
        self.norm = BatchNorm2d(narrow)
        self.relu = layers.rectifier()
        self.classifier = nn.Linear(narrow, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, K) of normalised images (N, C, H, W)."""
        features = norm_act(self.norm, self.relu, self.blocks(self.stem(x)))
        logits: Tensor = self.classifier(features.mean((2, 3)))
        return logits
