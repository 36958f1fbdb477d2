"""Backbones by name, as Dense, S-Dense and MoE-CNN, and the model files that rebuild one with nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from advmoe.config import ExpertInit, ExpertLayout, ModelConfig, ModelKind, RouterKind, typed
from advmoe.files import write_text, write_whole
from advmoe.models.layers import LayerFactory
from advmoe.models.normalize import Normalize
from advmoe.models.resnet import ResNet
from advmoe.moe.routers import ImageRouter, routers_of
from advmoe.moe.routing import forward_scope


@dataclass(frozen=True)
class Backbone:
    """How a backbone is built."""

    build: Callable[..., nn.Module]
    """`(layers, *, width, in_channels, num_classes, input_size) -> module` of normalised images."""
    width: int
    """Channels of the first stage at scale 1, unless others are asked for."""


BACKBONES: dict[str, Backbone] = {"resnet18": Backbone(partial(ResNet, depths=(2, 2, 2, 2)), 64)}
"""Backbones by name."""


class Classifier(nn.Module):
    """[0, 1] pixels (N, C, H, W) -> logits (N, K): normalisation, the router that sees the image if any, the backbone.

    `spec` holds the arguments of `create_model` that rebuild it.
    """

    def __init__(
        self, normalize: Normalize, backbone: nn.Module, router: ImageRouter | None, spec: dict[str, Any]
    ) -> None:
        super().__init__()
        self.normalize, self.backbone, self.router, self.spec = normalize, backbone, router, spec

    @property
    def routed(self) -> bool:
        """Whether the model has MoE layers."""
        return bool(self.spec["kind"] == "moe")

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, K), under the active routing."""
        with forward_scope() as routing:
            x = self.normalize(x)
            if self.router is not None:
                routing.shared = self.router(x)
            logits: Tensor = self.backbone(x)
            return logits


def create_model(
    name: str,
    *,
    num_classes: int,
    kind: ModelKind = "moe",
    scale: float = 0.5,
    num_experts: int = 2,
    router: RouterKind = "layer",
    experts: ExpertLayout = "subset",
    experts_init: ExpertInit = "independent",
    width: int | None = None,
    input_size: int = 32,
    in_channels: int = 3,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Classifier:
    """A new model with random weights, in train mode.

    Args:
        name: backbone (`BACKBONES`). num_classes: K. input_size: side of the images in pixels. in_channels: their
        channels. kind: `moe`, the `dense` backbone, or `s-dense`, whose every layer has `scale` times the channels.
        scale: r, in (0, 1]. num_experts: N. router, experts, experts_init: see `config.ModelConfig`.
        width: channels of the first stage at scale 1, by default the backbone's own (64 in ResNets). mean, std: pixel
        statistics per channel, normalised inside the model.

    Raises `ValueError` that names the argument, the rule and the value.
    """
    if name not in BACKBONES:
        raise ValueError(f"model.name must be one of {', '.join(BACKBONES)}, got {name!r}")
    for argument, value, low in (
        ("num_classes", num_classes, 2),
        ("input_size", input_size, 8),
        ("in_channels", in_channels, 1),
    ):
        if typed(argument, int, value) < low:
            raise ValueError(f"{argument} must be >= {low}, got {value!r}")
    config = ModelConfig(
        name=name, kind=kind, scale=scale, num_experts=num_experts, router=router, experts=experts,
        experts_init=experts_init, width=width,
    )  # fmt: skip
    mean = [0.5] * in_channels if mean is None else list(mean)
    std = [0.25] * in_channels if std is None else list(std)
    if len(mean) != in_channels or len(std) != in_channels:
        raise ValueError(f"mean and std must have in_channels={in_channels} entries, got {mean!r} and {std!r}")
    if not min(std) > 0:
        raise ValueError(f"std must be > 0 in every channel, got {std!r}")
    layers = LayerFactory(config)
    config.width = wide = config.width or BACKBONES[name].width
    backbone = BACKBONES[name].build(
        layers, width=wide, in_channels=in_channels, num_classes=num_classes, input_size=input_size
    )
    image_router = None
    if kind == "moe" and router != "layer":
        image_router = ImageRouter(in_channels, wide, layers.num_moe_layers, num_experts, shared=router == "image")
    spec = {**vars(config), "num_classes": num_classes, "input_size": input_size, "in_channels": in_channels}
    return Classifier(Normalize(mean, std), backbone, image_router, spec | {"mean": mean, "std": std})


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(psi, phi): the parameters of the backbone and those of the routers; together all, none twice."""
    phi = [parameter for router in routers_of(model) for parameter in router.parameters()]
    known = {id(parameter) for parameter in phi}
    return [parameter for parameter in model.parameters() if id(parameter) not in known], phi


def save_model(model: Classifier, folder: Path) -> None:
    """Write `model.safetensors` and `model.json`, which rebuild the model with no other file, each atomically."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_whole(folder / "model.safetensors", lambda path: save_file(weights, path))
    write_text(folder / "model.json", json.dumps(model.spec, indent=2) + "\n")


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else f"{text[:200]}..."


def load_model(folder: Path) -> Classifier:
    """The model that `save_model` wrote, in eval mode on the CPU. Runs no code from the files.

    Raises `ValueError` naming the file that is missing or damaged.
    """
    description, weights = folder / "model.json", folder / "model.safetensors"
    for path in (description, weights):
        if not path.is_file():
            raise ValueError(f"a run directory must hold {path.name}, got {str(folder)!r}")
    try:
        with torch.random.fork_rng(devices=[]):  # the weights drawn here are replaced below
            model = create_model(**json.loads(description.read_text()))
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{description} must be an undamaged model description, got: {_one_line(error)}") from error
    try:
        model.load_state_dict(load_file(weights))
    except (SafetensorError, RuntimeError) as error:
        reason = _one_line(error)
        raise ValueError(f"{weights} must hold the weights that {description.name} describes, got: {reason}") from error
    return model.eval()


__all__ = ["BACKBONES", "Classifier", "create_model", "load_model", "save_model", "split_parameters"]
