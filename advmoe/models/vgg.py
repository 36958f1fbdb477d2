"""VGG with batch norm (Simonyan and Zisserman, ICLR 2015) for small images, in the channels of a `LayerFactory`.

Axes: `N` batch, `C` channels, `H W` size, `K` classes.
"""

from __future__ import annotations

from torch import Tensor, nn

from advmoe.models.fused import Steps
from advmoe.models.layers import LayerFactory
from advmoe.models.norm import BatchNorm2d


class VGG(nn.Module):
    """Five stages of `depths` 3x3 convolutions with max pooling between them, and a classifier of two hidden layers.

    Stages have 1, 2, 4, 8 and 8 times `width` channels, hidden layers 4 times. The first convolution is the stem, and
    plain. The last stage's output is averaged to 2x2 pixels whatever the images' size; at 32x32 it has that size.
    The classifier is plain in every kind; S-Dense and MoE narrow its hidden layers as they narrow every layer.
    """

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
        steps: list[nn.Module] = []
        narrow = in_channels
        for stage, depth in enumerate(depths):
            if stage:
                steps.append(nn.MaxPool2d(2))
            c_out = width * min(2**stage, 8)
            for _ in range(depth):
                wide = layers.channels(c_out)
                conv = layers.conv(narrow, c_out, 3, 1, 1) if steps else layers.plain_conv(narrow, wide, 3, 1, 1)
                steps += [conv, BatchNorm2d(wide), layers.rectifier()]
                narrow = wide
        self.features = Steps(*steps, nn.AdaptiveAvgPool2d(2), nn.Flatten())
        hidden = layers.channels(4 * width)
        self.classifier = nn.Sequential(
            nn.Linear(4 * narrow, hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, K) of normalised images (N, C, H, W)."""
        logits: Tensor = self.classifier(self.features(x))
        return logits
