"""The converted network: MoE layers in the place of plain ones, and a classifier around them.

Axes: `N` batch, `C` channels, `H W` size, `K` classes, `E` experts, `L` MoE layers.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from advmoe.errors import InputError
from advmoe.models.classifier import Classifier
from advmoe.models.convert.probe import place_of
from advmoe.models.normalize import Normalize
from advmoe.moe.conv import MoEConv2d
from advmoe.moe.layer import MoELayer
from advmoe.moe.linear import MoELinear
from advmoe.moe.routers import MakeRouter
from advmoe.moe.routing import forward_scope
from advmoe.moe.wrapped import MoEWrapped
from advmoe.tables import ROUTERS
from advmoe.text import few


@dataclass(frozen=True)
class Conversion:
    """What became of a network's layers."""

    converted: tuple[str, ...]
    """Those that are MoE layers now, by name, in the order of the pathway."""
    skipped: dict[str, str]
    """Why each of the others stayed plain, by name."""

    def __str__(self) -> str:
        total = len(self.converted) + len(self.skipped)
        head = f"{len(self.converted)} of {total} layers are MoE layers"
        return "\n".join([head, *(f"  plain  {name}: {reason}" for name, reason in self.skipped.items())])


class ConvertedClassifier(Classifier):
    """A `Classifier` that `to_moe` converts a network to; `conversion` lists which of its layers."""

    def __init__(
        self, normalize: nn.Module, backbone: nn.Module, router: nn.Module | None, spec: dict[str, Any],
        conversion: Conversion,
    ) -> None:  # fmt: skip
        super().__init__(normalize, backbone, router, spec)
        self.conversion = conversion

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, K), under the active routing. Raises `ValueError` unless every layer chose once per image."""
        with forward_scope() as routing:
            logits = super().forward(x)
            names = self.conversion.converted
            number = x.shape[0]  # not `len`, which a graph for any batch size cannot keep open
            chosen = {layer: choice.shape[0] for layer, choice in routing.choices.items()}
            if len(chosen) != len(names) or any(each != number for each in chosen.values()):
                wrong = [f"{name} with {chosen.get(i, 0)}" for i, name in enumerate(names) if chosen.get(i) != number]
                rule = "every MoE layer must make one choice per image (leave others plain: `to_moe(..., skip=...)`)"
                raise InputError(f"{rule}, got of {number} images {few(wrong)}")
            return logits


def convert(module: nn.Module, conversion: Conversion, settings: dict[str, Any]) -> ConvertedClassifier:
    """`module` with the layers of `conversion` replaced, and the router that sees the image, if any.

    Raises `ValueError` where there is nothing to convert, or a layer is missing.
    """
    num_experts, router = settings["num_experts"], settings["router"]
    name = type(module).__name__
    if not conversion.converted:
        listed = few([f"{layer} ({reason})" for layer, reason in conversion.skipped.items()])
        raise InputError(f"module must have a Conv2d to convert, got {name} with {listed or 'none'}")
    image_router = None
    if not ROUTERS[router].in_layers:
        image_router = _image_router(module, settings, len(conversion.converted))
    for index, layer in enumerate(conversion.converted):
        try:
            plain = module.get_submodule(layer)
        except AttributeError:
            plain = None
        if not isinstance(plain, nn.Conv2d | nn.Linear):
            raise InputError(f"module must have the layers that were converted, got {name} without {layer}")
        routed = _moe_layer(plain, num_experts, index, make_router=ROUTERS[router].layer)
        routed.title = f"MoE layer {index} ({layer})" if layer else routed.title
        _answer_for(routed, plain)
        if not layer:
            module = routed
        else:
            parent, _, child = layer.rpartition(".")
            setattr(module.get_submodule(parent), child, routed)
    spec = {
        "name": name, "kind": "moe", "source": None, **settings, "layers": list(conversion.converted),
        "skipped": conversion.skipped,
    }  # fmt: skip
    normalize = normalizer(settings["mean"], settings["std"]).to(place_of(module)[0])
    model = ConvertedClassifier(normalize, module, image_router, spec, conversion)
    model.training = module.training  # of the parts, each keeps its own
    return model


def _moe_layer(
    layer: nn.Conv2d | nn.Linear, num_experts: int, index: int, *, make_router: MakeRouter | None
) -> MoELayer:
    """`layer` as an MoE layer, all of whose experts are copies of it; on its device, in its precision and mode."""
    device, dtype, rows = layer.weight.device, layer.weight.dtype, num_experts * len(layer.weight)
    shared: dict[str, Any] = {"num_experts": num_experts, "layer": index, "make_router": make_router}
    routed: MoELayer
    if type(layer) is nn.Conv2d:
        padding = layer.padding if isinstance(layer.padding, str) else _two(layer.padding)
        routed = MoEConv2d(
            layer.in_channels, layer.out_channels, _two(layer.kernel_size), _two(layer.stride), padding,
            dilation=_two(layer.dilation), groups=layer.groups, bias=layer.bias is not None,
            padding_mode=layer.padding_mode, bank_rows=rows, **shared,
        )  # fmt: skip
    elif type(layer) is nn.Linear:
        routed = MoELinear(layer.in_features, layer.out_features, bias=layer.bias is not None, bank_rows=rows, **shared)
    else:
        routed = MoEWrapped(layer, layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features, **shared)
    if not isinstance(routed, MoEWrapped):
        with torch.no_grad():
            for bank, own in zip(routed.banks(), layer.parameters(recurse=False), strict=True):
                bank.copy_(own.repeat(num_experts, *[1] * (own.dim() - 1)))
                bank.requires_grad_(own.requires_grad)
    routed.to(device, dtype).train(layer.training)
    if routed.router is not None:
        routed.router.to(torch.promote_types(dtype, torch.float32))
    return routed


def _answer_for(routed: MoELayer, layer: nn.Module) -> None:
    """Copy the plain attributes of `layer` to `routed`, which replaces it, for networks that read them."""
    for name in dir(layer):
        if not name.startswith("_") and not hasattr(routed, name):
            value = inspect.getattr_static(layer, name, layer)  # runs no property, and passes over submodules
            if not (callable(value) or hasattr(value, "__get__") or isinstance(value, Tensor)):
                setattr(routed, name, value)


def _two(numbers: tuple[int, ...]) -> tuple[int, int]:
    return numbers[0], numbers[1]


def _image_router(module: nn.Module, settings: dict[str, Any], num_layers: int) -> nn.Module:
    """The router that sees the image: as wide as the network begins, and at the resolution that it begins with."""
    first = next((each for each in module.modules() if isinstance(each, nn.Conv2d)), None)
    if first is None:
        raise InputError(f"router must be layer for a network without Conv2d, got {settings['router']!r}")
    build = ROUTERS[settings["router"]].build
    assert build is not None
    router: nn.Module = build(
        settings["in_channels"] or first.in_channels, first.out_channels, num_layers, settings["num_experts"],
        pool=_two(first.stride)[0],
    )  # fmt: skip
    device, dtype = place_of(module)
    return router.to(device, torch.promote_types(dtype, torch.float32)).train(module.training)


def normalizer(mean: Sequence[float] | None, std: Sequence[float] | None) -> nn.Module:
    """Normalisation of pixels, or none. Raises `ValueError` for statistics that do not fit each other."""
    if mean is None and std is None:
        return nn.Identity()
    try:
        means, stds = ([float(each) for each in statistics or ()] for statistics in (mean, std))
    except (TypeError, ValueError):
        means, stds = [], []
    if not means or len(means) != len(stds) or not all(map(math.isfinite, [*means, *stds])) or min(stds) <= 0:
        raise InputError(f"mean and std must both have one entry per channel, std > 0, got {mean!r} and {std!r}")
    return Normalize(means, stds)
