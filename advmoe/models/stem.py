"""How a network begins: at the images' own resolution, or at a quarter of it where they are large.

Axes: `N` batch, `C` channels, `H W` size.
"""

from __future__ import annotations

from torch import nn

from advmoe.models.fused import Steps
from advmoe.models.layers import LayerFactory
from advmoe.models.norm import BatchNorm2d

LARGE = 128
"""Images of at least this side in pixels get the 7x7 stem."""


def stem_stride(input_size: int) -> int:
    """By how much `stem` shrinks images of side `input_size`: 4 where they are large, else 1."""
    return 4 if input_size >= LARGE else 1


def stem(layers: LayerFactory, in_channels: int, c_out: int, input_size: int, *, activate: bool = True) -> Steps:
    """Images (N, C, H, W) -> (N, C', H', W') by a plain convolution, C' being the model's own of the dense `c_out`.

    Below `LARGE` pixels: 3x3 at full resolution. From there on, as for ImageNet (He et al., CVPR 2016): 7x7 with stride
    2, batch norm, ReLU and 3x3 max pooling with stride 2. Networks whose blocks begin with a norm of their own ask for
    `activate=False`, which leaves norm and ReLU out of the 3x3 stem.
    """
    narrow, large = layers.channels(c_out), stem_stride(input_size) > 1
    kernel, stride, padding = (7, 2, 3) if large else (3, 1, 1)
    steps: list[nn.Module] = [layers.plain_conv(in_channels, narrow, kernel, stride, padding)]
    if activate or large:
        steps += [BatchNorm2d(narrow), layers.rectifier()]
    if large:
        steps.append(nn.MaxPool2d(3, 2, 1))
    return Steps(*steps)
