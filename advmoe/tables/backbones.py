"""Backbones by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from advmoe.errors import InputError
from advmoe.tables.table import Family, Table, lazily
from advmoe.text import show


@dataclass(frozen=True)
class Backbone:
    """How a backbone is built, and what it can do."""

    build: Callable[..., Any]
    """`(layers, *, width, in_channels, num_classes, input_size) -> module` of normalised images."""
    width: int
    """Channels of the first stage (a transformer's embedding) at scale 1, unless others are asked for."""
    label: str
    """What tables and pages call it."""
    tokens: bool = False
    """Whether its MoE layers see tokens, which can be routed one by one; it has no Sparse-CNN then."""
    min_size: int = 8
    """Side of the smallest images that it takes, in pixels."""
    moe_layers: int | None = None
    """MoE layers of its MoE-CNN, where that is known without building it."""


def _wide_resnet(name: str) -> Backbone | None:
    """Wide ResNets, whose name says depth and widening."""
    if (match := re.fullmatch(r"wrn-([0-9]{1,9})-([0-9]{1,9})", name)) is None:
        return None
    depth, widening = int(match[1]), int(match[2])
    if not 10 <= depth <= 1000 or depth % 6 != 4 or not 1 <= widening <= 100:
        rule = "D = 6n + 4 >= 10 and <= 1000, and K >= 1 and <= 100"
        raise InputError(f"model.name wrn-D-K must have {rule}, got {show(name)}")
    build = lazily("advmoe.models.wide_resnet:WideResNet", depth=depth, widening=widening)
    return Backbone(build, 16 * widening, f"WRN-{depth}-{widening}", moe_layers=depth - 4)


_RESNET, _BOTTLENECK = "advmoe.models.resnet:ResNet", "advmoe.models.resnet:BottleneckResNet"

BACKBONES: Table[Backbone] = Table(
    "model.name",
    {
        "resnet18": Backbone(lazily(_RESNET, depths=(2, 2, 2, 2)), 64, "ResNet-18", moe_layers=16),
        "resnet34": Backbone(lazily(_RESNET, depths=(3, 4, 6, 3)), 64, "ResNet-34", moe_layers=32),
        "resnet50": Backbone(lazily(_BOTTLENECK, depths=(3, 4, 6, 3)), 64, "ResNet-50", moe_layers=48),
        "vgg16": Backbone(
            lazily("advmoe.models.vgg:VGG", depths=(2, 2, 3, 3, 3)), 64, "VGG-16", min_size=16, moe_layers=12
        ),
        "densenet40": Backbone(
            lazily("advmoe.models.densenet:DenseNet", depths=(6, 6, 6)), 24, "DenseNet-BC-40", moe_layers=38
        ),
        "deit-tiny": Backbone(
            lazily("advmoe.models.vit:VisionTransformer", depth=12), 192, "DeiT-Tiny", tokens=True, moe_layers=12
        ),
    },
    Family("wrn-D-K (as in wrn-28-10)", _wide_resnet, example="wrn-10-1"),
)
