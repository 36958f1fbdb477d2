"""ResNet with the 3x3 stem for 32x32 images (He et al., CVPR 2016), in the channels that a `LayerFactory` decides.

Axes: `N` batch, `C` channels, `H W` size, `K` classes.
"""

from __future__ import annotations

from torch import Tensor, nn

from advmoe.models.layers import LayerFactory
from advmoe.models.norm import BatchNorm2d


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, and a shortcut, projected by a plain 1x1 where the shape changes."""

    def __init__(self, layers: LayerFactory, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        narrow_in, narrow_out = layers.channels(c_in), layers.channels(c_out)
        self.conv1 = layers.conv(c_in, c_out, 3, stride, 1)
        self.norm1 = BatchNorm2d(narrow_out)
        self.conv2 = layers.conv(c_out, c_out, 3, 1, 1)
        self.norm2 = BatchNorm2d(narrow_out)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or c_in != c_out:
            projection = layers.plain_conv(narrow_in, narrow_out, 1, stride)
            self.shortcut = nn.Sequential(projection, BatchNorm2d(narrow_out))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W')."""
        y = self.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        y += self.shortcut(x)
        out: Tensor = self.relu(y)
        return out


class ResNet(nn.Module):
    """Four stages of basic blocks; `depths` blocks each, channels doubling from `width`."""

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
        stem = layers.channels(width)
        self.stem = nn.Sequential(layers.plain_conv(in_channels, stem, 3, 1, 1), BatchNorm2d(stem), nn.ReLU(True))
        blocks: list[nn.Module] = []
        c_in = width
        for stage, depth in enumerate(depths):
            c_out = width * 2**stage
            for block in range(depth):
                blocks.append(BasicBlock(layers, c_in, c_out, 2 if stage and not block else 1))
                c_in = c_out
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(layers.channels(c_in), num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, K) of normalised images (N, C, H, W)."""
        logits: Tensor = self.classifier(self.blocks(self.stem(x)).mean((2, 3)))
        return logits
