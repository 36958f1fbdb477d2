"""ResNet (He et al., CVPR 2016), in the channels that a `LayerFactory` decides.

Axes: `N` batch, `C` channels, `H W` size, `K` classes.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from advmoe.models.fused import Steps, conv_norm_act, fork
from advmoe.models.layers import LayerFactory
from advmoe.models.norm import BatchNorm2d
from advmoe.models.stem import stem, stem_stride


def _shortcut(layers: LayerFactory, c_in: int, c_out: int, stride: int) -> nn.Module:
    """The identity, or a plain 1x1 projection with batch norm where the shape changes."""
    if stride == 1 and c_in == c_out:
        return nn.Identity()
    narrow_in, narrow_out = layers.channels(c_in), layers.channels(c_out)
    return Steps(layers.plain_conv(narrow_in, narrow_out, 1, stride), BatchNorm2d(narrow_out))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, and a shortcut. Takes the dense network's channels."""

    expansion: ClassVar[int] = 1

    def __init__(self, layers: LayerFactory, c_in: int, channels: int, stride: int) -> None:
        super().__init__()
        narrow = layers.channels(channels)
        self.conv1 = layers.conv(layers.channels(c_in), channels, 3, stride, 1)
        self.norm1 = BatchNorm2d(narrow)
        self.conv2 = layers.conv(narrow, channels, 3, 1, 1)
        self.norm2 = BatchNorm2d(narrow)
        self.relu = layers.rectifier()
        self.shortcut = _shortcut(layers, c_in, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W')."""
        y = conv_norm_act(self.conv1, self.norm1, self.relu, x)
        return conv_norm_act(self.conv2, self.norm2, self.relu, y, self.shortcut(fork(x)))


class Bottleneck(nn.Module):
    """1x1, 3x3 (which takes the stride) and 1x1 to four times the channels, with batch norm, and a shortcut."""

    expansion: ClassVar[int] = 4

    def __init__(self, layers: LayerFactory, c_in: int, channels: int, stride: int) -> None:
        super().__init__()
        wide = self.expansion * channels
        narrow = layers.channels(channels)
        self.conv1 = layers.conv(layers.channels(c_in), channels, 1)
        self.norm1 = BatchNorm2d(narrow)
        self.conv2 = layers.conv(narrow, channels, 3, stride, 1)
        self.norm2 = BatchNorm2d(narrow)
        self.conv3 = layers.conv(narrow, wide, 1)
        self.norm3 = BatchNorm2d(layers.channels(wide))
        self.relu = layers.rectifier()
        self.shortcut = _shortcut(layers, c_in, wide, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W')."""
        y = conv_norm_act(self.conv1, self.norm1, self.relu, x)
        y = conv_norm_act(self.conv2, self.norm2, self.relu, y)
        return conv_norm_act(self.conv3, self.norm3, self.relu, y, self.shortcut(fork(x)))


class ResNet(nn.Module):
    """Four stages of `depths` blocks each, channels doubling from `width`; the stem follows the images' size."""

    block: ClassVar[type[BasicBlock | Bottleneck]] = BasicBlock

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
        self.stem = stem(layers, in_channels, width, input_size)
        self.router_pool = stem_stride(input_size)
        blocks: list[nn.Module] = []
        c_in = width
        for stage, depth in enumerate(depths):
            channels = width * 2**stage
            for each in range(depth):
                blocks.append(self.block(layers, c_in, channels, 2 if stage and not each else 1))
                c_in = self.block.expansion * channels
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(layers.channels(c_in), num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, K) of normalised images (N, C, H, W)."""
        logits: Tensor = self.classifier(self.blocks(self.stem(x)).mean((2, 3)))
        return logits


class BottleneckResNet(ResNet):
    """A ResNet of bottleneck blocks, as from ResNet-50 on."""

    block = Bottleneck
