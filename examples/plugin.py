"""One of each that a plugin can add; docs/how-to/extend.md explains them one by one.

advmoe train --plugin examples/plugin.py --config digits-advmoe --run-dir runs/tiny \
    --data.name shifted-digits --model.name tiny --model.router brightness --training.method experts-twice
advmoe evaluate runs/tiny --plugin examples/plugin.py --attacks corner,pgd-50-logit
"""

import torch
from torch import Tensor, nn

from advmoe import (
    register_attack,
    register_backbone,
    register_dataset,
    register_loss,
    register_method,
    register_router,
)
from advmoe.data.digits import load_digits
from advmoe.extend import Level
from advmoe.models.fused import Steps
from advmoe.models.norm import BatchNorm2d
from advmoe.moe.routers import ImageRouter


@register_backbone("tiny", width=8, label="Tiny CNN")
class Tiny(nn.Module):
    """A plain convolution, an MoE one, and the mean over the image."""

    def __init__(self, layers, *, width, in_channels, num_classes, input_size):
        super().__init__()
        first, second = layers.channels(width), layers.channels(2 * width)
        self.features = Steps(
            layers.plain_conv(in_channels, first, 3, 1, 1),
            BatchNorm2d(first),
            layers.rectifier(),
            layers.conv(first, 2 * width, 3, 2, 1),
            BatchNorm2d(second),
            layers.rectifier(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.classifier = nn.Linear(second, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, K) of normalised images (N, C, H, W)."""
        return self.classifier(self.features(x))


@register_router("brightness")
class Brightness(ImageRouter):
    """Each layer's scores are a linear function of what the image router sees."""

    def __init__(self, *sizes: int, pool: int) -> None:
        super().__init__(*sizes, shared=False, pool=pool)


@register_dataset("shifted-digits", label="digits, inverted", licence="CC BY 4.0 (UCI)")
def inverted(request):
    """The digits, dark on light."""
    source = load_digits(request)
    for part in (source.train, source.test):
        part.images.neg_().add_(255)
    return source


@register_loss("logit")
def logit(logits: Tensor, labels: Tensor) -> Tensor:
    """How little the true class's logit is, (N,)."""
    return -logits.gather(1, labels[:, None])[:, 0]


@register_attack("corner")
def corner(predict, x: Tensor, y: Tensor, *, threat, seed: int) -> Tensor:
    """A random corner of the ball: no gradient, no query."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, x.shape, generator=generator).to(x) * 2 - 1
    return x + threat.eps * signs


register_method(
    "experts-twice",
    (Level("routers"), Level("experts", batch=1), Level("experts", batch=2)),
    label="AdvMoE, experts twice",
    sentence="routers once and experts twice an iteration, each against attacks",
)
