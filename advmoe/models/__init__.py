"""Backbones by name, as Dense, S-Dense, Sparse-CNN and MoE-CNN, and the model files that rebuild one with nothing
else.

Axes: `C` channels, `H W` size, `K` classes, `E` experts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from advmoe.config import (
    Channels,
    Classes,
    ExpertInit,
    ExpertLayout,
    ModelConfig,
    ModelKind,
    RoutePer,
    RouterKind,
    RouterNorm,
    Side,
    Within,
    typed,
)
from advmoe.errors import InputError
from advmoe.files import read_object, write_text, write_whole
from advmoe.models.classifier import Classifier, Origin
from advmoe.models.convert import rebuilt
from advmoe.models.layers import MOST_PARAMETERS, LayerFactory, TooLarge, TooNarrow
from advmoe.models.modes import Undrawn
from advmoe.models.normalize import Normalize
from advmoe.models.predictions import require_labels
from advmoe.models.sparse import SparseBackbone
from advmoe.models.state import count, digest, read_shapes, require_fitting, savable, write_tensors
from advmoe.moe.routers import routers_of
from advmoe.rundir import DIGEST, MODEL, WEIGHTS, require_plain, stored_digest
from advmoe.tables import BACKBONES, ROUTERS, Backbone
from advmoe.text import one_line, show


def find_backbone(name: str) -> Backbone:
    """The backbone called `name`. Raises `ValueError`, which lists what there is, for an unknown one."""
    return BACKBONES.find(name)


def create_model(
    name: str,
    *,
    num_classes: int,
    kind: ModelKind = "moe",
    scale: float = 0.5,
    num_experts: int = 2,
    router: RouterKind = "layer",
    router_norm: RouterNorm = "batch",
    route_per: RoutePer = "image",
    experts: ExpertLayout = "subset",
    experts_init: ExpertInit = "independent",
    width: int | None = None,
    input_size: int = 32,
    in_channels: int = 3,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    classes: Sequence[str] | None = None,
    cut: str | None = None,
    most_parameters: int = MOST_PARAMETERS,
) -> Classifier:
    """A new model with random weights, in train mode.

    Args:
        name: backbone (`find_backbone`). num_classes: K. input_size: side of the images in pixels. in_channels: their
        channels. kind: `moe`, the `dense` backbone, `s-dense`, whose every layer has `scale` times the channels, or
        `sparse`: the Dense backbone (no transformer) under masks that keep `scale` of every layer's channels.
        scale: r, in (0, 1]. num_experts: E. router, router_norm, route_per, experts, experts_init: see
        `config.ModelConfig`.
        width: channels of the first stage at scale 1, by default the backbone's own (64 in ResNets and VGG, 160 in
        WRN-28-10, 24 in DenseNet-BC-40, 192 in DeiT-Tiny). mean, std: pixel statistics per channel, normalised inside
        the model. classes: their K names, for `predict`. cut: how a picture of any shape becomes one of the model's
        size, `middle-square` (the default) or ImageNet's `central-crop`. most_parameters: a larger model is refused
        before it is built.

    Raises `ValueError` that names the argument, the rule and the value.
    """
    entry = find_backbone(name)
    for argument, hint, value in (
        ("num_classes", Classes, num_classes), ("input_size", Side, input_size), ("in_channels", Channels, in_channels),
    ):  # fmt: skip
        typed(argument, hint, value)
    Within(entry.min_size, 4096).require("input_size", input_size)
    config = ModelConfig(
        name=name, kind=kind, scale=scale, num_experts=num_experts, router=router, route_per=route_per,
        router_norm=router_norm, experts=experts, experts_init=experts_init, width=width,
    )  # fmt: skip
    if route_per == "token" and not entry.tokens:
        able = ", ".join(each for each, backbone in BACKBONES.items() if backbone.tokens)
        rule = f"image for backbones without tokens (with: {able})"
        raise InputError(f"model.route_per must be {rule}, got {route_per!r}")
    if kind == "sparse" and entry.tokens:
        raise InputError(f"model.name must be a CNN when model.kind is sparse, got {name!r}")
    mean, std = _pixel_statistics(in_channels, mean, std)
    layers = LayerFactory(config, most_parameters)
    config.width = wide = config.width or entry.width
    build = partial(entry.build, width=wide, in_channels=in_channels, num_classes=num_classes, input_size=input_size)
    if wide > 256 or num_experts > 16:  # tried without memory first: it may be more than there is
        with torch.device("meta"), Undrawn():
            _build(build, config, LayerFactory(config, most_parameters))
    backbone = _build(build, config, layers)
    image_router = None
    if kind == "moe" and (build_router := ROUTERS[router].build) is not None:
        pool = getattr(backbone, "router_pool", 1)
        image_router = build_router(
            in_channels, wide, layers.num_moe_layers, num_experts, pool=pool, **layers.router_options
        )
    spec = {**config.backbone(), "num_classes": num_classes, "input_size": input_size, "in_channels": in_channels}
    spec |= {"mean": mean, "std": std, **labels(num_classes, classes, cut)}
    return Classifier(Normalize(mean, std), backbone, image_router, spec)


def _pixel_statistics(
    channels: int, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[list[float], list[float]]:
    try:
        mean = [0.5] * channels if mean is None else [float(each) for each in mean]
        std = [0.25] * channels if std is None else [float(each) for each in std]
    except (TypeError, ValueError):
        raise InputError(
            f"mean and std must be numbers, one for each channel, got {show(mean)} and {show(std)}"
        ) from None
    if len(mean) != channels or len(std) != channels:
        raise InputError(f"mean and std must have in_channels={channels} entries, got {mean!r} and {std!r}")
    if not all(map(math.isfinite, mean)):
        raise InputError(f"mean must be finite in every channel, got {show(mean)}")
    if not 0 < min(std) <= max(std) < math.inf:
        raise InputError(f"std must be > 0 in every channel, got {show(std)}")
    return mean, std


def _build(build: Callable[[LayerFactory], nn.Module], config: ModelConfig, layers: LayerFactory) -> nn.Module:
    """The backbone that `build` makes of `layers`. Raises `TooNarrow`, which names the layer."""
    try:
        backbone = build(layers)
        return SparseBackbone(backbone, config.scale) if config.kind == "sparse" else backbone
    except TooNarrow as error:
        with torch.device("meta"), Undrawn():
            dense = build(LayerFactory(replace(config, kind="dense")))
        raise TooNarrow(config.scale, error.channels, _layer_of(dense, error.channels)) from None


def labels(num_classes: int, classes: Sequence[str] | None, cut: str | None) -> dict[str, Any]:
    """What a model's description says of its classes and pictures, where it says anything. Raises `InputError`."""
    told = {name: value for name, value in (("classes", classes), ("cut", cut)) if value is not None}
    require_labels(told | {"num_classes": num_classes})
    return told | ({"classes": list(told["classes"])} if "classes" in told else {})


_MOST_DESCRIPTION = 4_000_000
"""Bytes of `model.json`."""


class _Misfit(InputError):
    """Weights of another model than the description's."""


def _require_described(spec: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise `ValueError` unless the model of `spec` has these `shapes`. It is built without memory for its weights, and
    no further than there are values.
    """
    try:
        with torch.device("meta"), Undrawn():
            model = create_model(**(spec | {"most_parameters": count(shapes)}))
    except TooLarge as error:
        raise _Misfit(f"{count(shapes):,} of more values") from error
    try:
        require_fitting(model.state_dict(), shapes)
    except ValueError as error:
        raise _Misfit(str(error)) from None


def _layer_of(network: nn.Module, channels: int) -> str | None:
    """The name of the first layer that makes as many channels."""
    layers = (
        (name, getattr(each, "out_channels", getattr(each, "out_features", 0)))
        for name, each in network.named_modules()
    )
    return next((name for name, number in layers if number == channels), None)


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(psi, phi): the parameters of the backbone (experts, norms, stem, classifier) and those of the routers.

    Together they are all of the model's, none twice; phi is empty where there are no routers. One optimiser for each is
    what AdvMoE's two levels need (Zhang et al., ICCV 2023, eq. 1: psi above, phi below).
    """
    phi = [parameter for router in routers_of(model) for parameter in router.parameters()]
    known = {id(parameter) for parameter in phi}
    return [parameter for parameter in model.parameters() if id(parameter) not in known], phi


def save_model(model: Classifier, folder: Path) -> None:
    """Write `model.safetensors` and `model.json`, which rebuild the model with no other file (but the code of a network
    of the user's own), each whole or not at all. The weights' header holds the digest of both.
    """
    weights, header = savable(model.state_dict()), {DIGEST: digest(model)}
    write_whole(folder / WEIGHTS, lambda path: write_tensors(path, weights, header))
    write_text(folder / MODEL, json.dumps(model.spec, indent=2) + "\n")


def load_model(folder: Path, module: nn.Module | None = None) -> Classifier:
    """The model that `save_model` wrote, in eval mode on the CPU. Runs no code from the files, and follows no link.

    `module` is the user's own network, new from its factory, where the model is one (`to_moe`); it is taken over.
    Raises `ValueError` naming the file that is missing or damaged, or where `module` is needed.
    """
    require_plain(folder)
    model = load_files(folder / MODEL, folder / WEIGHTS, module)
    assert model.origin is not None
    model.origin = replace(model.origin, run=folder)
    return model


@contextmanager
def _of_fp32() -> Iterator[None]:
    """Inside, what is made is of fp32, as files are, whatever the user's default is."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def load_files(description: Path, weights: Path, module: nn.Module | None = None) -> Classifier:
    """As `load_model`, of the two files themselves, wherever they lie."""
    folder = description.parent
    for path in (description, weights):
        if not path.is_file():
            raise InputError(f"a run directory must hold {path.name}, got {str(folder)!r}")
    rule = "an undamaged model description" if module is None else f"of a model made of this {type(module).__name__}"
    misfit = f"{weights} must hold the weights that {description.name} describes, got"
    spec = read_object(description, _MOST_DESCRIPTION, finite=True)
    own = "source" in spec
    try:
        shapes = read_shapes(weights)
    except SafetensorError as error:
        raise InputError(f"{misfit} {one_line(error)}") from error
    try:
        require_labels(spec)
        with torch.random.fork_rng(devices=[]):  # the weights drawn here are replaced below
            if own:
                model = None if module is None else rebuilt(spec, module, count(shapes))
            else:
                _require_described(spec, shapes)
                with Undrawn(), _of_fp32():
                    model = create_model(**spec)
    except _Misfit as error:
        raise InputError(f"{misfit} {error}") from None
    except (ValueError, TypeError, RuntimeError, LookupError) as error:
        raise InputError(f"{description} must be {rule}, got {one_line(error)}") from error
    if model is None:
        network = f"a network of somebody's own ({spec['source'] or spec.get('name')}), whose code is never run unasked"
        raise InputError(f"{folder} holds {network}: to open it name that, with --model FILE.py:FACTORY or source=...")
    if not own and module is not None:
        raise InputError(f"{folder} must be opened without --model or source=...: its model is not of your own code")
    try:
        model.load_state_dict(load_file(weights))
    except (SafetensorError, RuntimeError) as error:
        reason = one_line(error)
        raise InputError(f"{weights} must hold the weights that {description.name} describes, got {reason}") from error
    actual, stored = digest(model), stored_digest(weights)
    if stored not in (None, actual):
        rule = f"be as they were written together (SHA-256 {str(stored)[:64]})"
        raise InputError(f"{weights} and {description.name} must {rule}, got {actual}: one of them is damaged")
    model.origin = Origin(actual)
    return model.eval()


__all__ = [
    "BACKBONES",
    "Classifier",
    "create_model",
    "find_backbone",
    "load_files",
    "load_model",
    "save_model",
    "split_parameters",
]
