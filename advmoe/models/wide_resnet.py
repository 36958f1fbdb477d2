"""Wide ResNet of any depth and width (Zagoruyko and Komodakis, BMVC 2016), in the channels of a `LayerFactory`.

Axes: `N` batch, `C` channels, `H W` size, `K` classes.
"""

from __future__ import annotations

from torch import Tensor, nn

from advmoe.errors import InputError
from advmoe.models.fused import conv_norm_act, norm_act
from advmoe.models.layers import LayerFactory
from advmoe.models.norm import BatchNorm2d
from advmoe.models.stem import stem, stem_stride


class PreActivationBlock(nn.Module):
    """Norm, ReLU, 3x3 convolution, twice, and a shortcut: the input, or where the shape changes a plain 1x1 projection
    of the activated input.

    An MoE layer's input, which its router sees, is what its convolution sees: normalised and activated.
    """

    def __init__(self, layers: LayerFactory, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        narrow_in, narrow_out = layers.channels(c_in), layers.channels(c_out)
        self.norm1 = BatchNorm2d(narrow_in)
        self.conv1 = layers.conv(narrow_in, c_out, 3, stride, 1)
        self.norm2 = BatchNorm2d(narrow_out)
        self.conv2 = layers.conv(narrow_out, c_out, 3, 1, 1)
        self.relu = layers.rectifier()
        same = stride == 1 and c_in == c_out
        self.projection = None if same else layers.plain_conv(narrow_in, narrow_out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W')."""
        active = norm_act(self.norm1, self.relu, x)
        shortcut = x if self.projection is None else self.projection(active)
        y = conv_norm_act(self.conv1, self.norm2, self.relu, active)
        # Not in place: a gated convolution keeps its output for the gate's gradient.
        out: Tensor = self.conv2(y) + shortcut
        return out


class WideResNet(nn.Module):
    """Three stages of `(depth - 4) / 6` blocks, channels doubling from `width`, after a stem of `width / widening`."""

    def __init__(
        self,
        layers: LayerFactory,
        *,
        depth: int,
        widening: int,
        width: int,
        in_channels: int,
        num_classes: int,
        input_size: int,
    ) -> None:
        super().__init__()
        if width < widening:
            raise InputError(f"model.width must be >= {widening} for a Wide ResNet of that widening, got {width}")
        c_in = width // widening
        self.stem = stem(layers, in_channels, c_in, input_size, activate=False)
        self.router_pool = stem_stride(input_size)
        blocks: list[nn.Module] = []
        for stage in range(3):
            c_out = width * 2**stage
            for each in range((depth - 4) // 6):
                blocks.append(PreActivationBlock(layers, c_in, c_out, 2 if stage and not each else 1))
                c_in = c_out
        self.blocks = nn.Sequential(*blocks)
        self.norm = BatchNorm2d(layers.channels(c_in))
        self.relu = layers.rectifier()
        self.classifier = nn.Linear(layers.channels(c_in), num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, K) of normalised images (N, C, H, W)."""
        features = norm_act(self.norm, self.relu, self.blocks(self.stem(x)))
        logits: Tensor = self.classifier(features.mean((2, 3)))
        return logits
