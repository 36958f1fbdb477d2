"""The model that a run trains: as its settings describe it, or the user's own network.

Axes: `N` batch, `K` classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from advmoe.config import Config
from advmoe.data import Dataset
from advmoe.errors import InputError
from advmoe.models import Classifier, create_model, labels
from advmoe.models.convert import own_classifier
from advmoe.models.runs import load_run
from advmoe.models.sources import load_module
from advmoe.models.upcycle import upcycle
from advmoe.moe import moe_layers
from advmoe.moe.halfspace import HalfspaceRouter
from advmoe.pruning import adopt, deployed, slimmed
from advmoe.seeding import generator_for
from advmoe.tables import METHODS, ROUTERS
from advmoe.text import few, one_line
from advmoe.training.methods import learning


def build_model(config: Config, dataset: Dataset, *, resumed: bool = False) -> Classifier:
    """The model that a configuration describes for a data set, on the CPU, in train mode.

    Args:
        config: `model` says which one. Its weights are drawn from `training.seed`, or taken from `training.init_from`.
            The file of `model.source`, if there is one, is executed.
        dataset: gives the number of classes, the images' shape, and the pixel statistics that it normalises by.
        resumed: do not read `training.init_from`: a checkpoint has all weights.

    Raises `ValueError`, which names the field, for a model that cannot be built, or does not fit the data.
    """
    init_from = None if resumed else config.training.init_from
    start = None if init_from is None else _start(config, dataset, init_from)
    # A plain network of the user's own, trained already, is converted with the weights that it has.
    upcycled = start.backbone if start is not None and config.model.to_moe and not start.routed else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.training.seed)
        if config.model.source is not None:
            model = _own_model(config, dataset, upcycled or load_module(config.model.source))
        else:
            model = _described(config, dataset)
    model.spec |= labels(dataset.num_classes, dataset.classes, dataset.cut)
    if isinstance(model.router, HalfspaceRouter) and not resumed:
        _fit(model.router, dataset, config.training.seed)
    if start is not None and upcycled is None:
        try:
            if config.model.kind == "sparse":
                adopt(model, start)
            elif config.model.kind == "moe" and start.spec["kind"] in ("s-dense", "sparse"):
                upcycle(model, deployed(start))
            elif config.model.kind == "moe" and start.spec["kind"] == "dense" and config.model.source is None:
                upcycle(model, slimmed(start, config.model.scale))
            else:
                model.load_state_dict(start.state_dict())
        except RuntimeError as error:
            reason = f"{init_from!r}, a {start.spec['kind']} {start.spec['name']} of other shape"
            raise InputError(f"training.init_from must hold a model of the shape in model.*, got {reason}") from error
    return model


def _described(config: Config, dataset: Dataset) -> Classifier:
    """The network of our own that the configuration describes, for images of the data's shape."""
    try:
        return create_model(
            **config.model.backbone(), num_classes=dataset.num_classes, input_size=dataset.image_size,
            in_channels=dataset.in_channels, mean=dataset.mean, std=dataset.std,
        )  # fmt: skip
    except InputError as error:
        raise InputError(str(error).replace("input_size must", "data.image_size must", 1)) from error


def _start(config: Config, dataset: Dataset, init_from: str) -> Classifier:
    """The model of `training.init_from`. Raises `ValueError` where a part that training leaves fixed is not what
    configuration and data say.
    """
    try:
        start = load_run(init_from, config.model.source)
    except ValueError as error:
        raise InputError(f"training.init_from: {error}") from error
    router, theirs = config.model.router, start.spec.get("router")
    if config.model.kind == "moe" and not ROUTERS[router].learnt and start.router is not None and theirs != router:
        rule = f"of a model with router {router}, as model.router has it (nothing is learnt there)"
        raise InputError(f"training.init_from must be {rule}, got {theirs} in {init_from!r}")
    classes = tuple(start.spec.get("classes") or dataset.classes)
    fixed = not METHODS[config.training.method].trains_experts
    if fixed and len(classes) == dataset.num_classes and classes != dataset.classes:
        rule = f"of the data's classes in their order when training.method is {config.training.method}"
        raise InputError(f"training.init_from must be {rule}, got {few(classes)} for {few(dataset.classes)}")
    return start


_FITTED = 5_000
"""Training images, drawn by seed, whose median a threshold is."""


def _fit(router: HalfspaceRouter, dataset: Dataset, seed: int) -> None:
    """Put the router's thresholds at the training median."""
    images = dataset.train
    index = torch.randperm(len(images), generator=generator_for(seed, "thresholds"))[:_FITTED].sort().values
    router.fit(images.pixels(each).cpu() for each in index.split(500))


def _own_model(config: Config, dataset: Dataset, module: nn.Module) -> Classifier:
    """The user's network as the model to train, tried on images of the data's shape."""
    method, size, source = config.training.method, dataset.image_size, config.model.source
    # Three, as few axes of something else are 3 long.
    example = torch.rand(3, dataset.in_channels, size, size, generator=generator_for(config.training.seed, "example"))
    try:
        model = own_classifier(module, config.model, example)
    except ValueError as error:
        raise InputError(f"model.source {source}: {error}") from error
    if (classes := model.spec["num_classes"]) != dataset.num_classes:
        raise InputError(f"model.source must make logits of the data's {dataset.num_classes} classes, got {classes}")
    _require_train_mode(model, example, source)
    t = config.training
    reasons = [f"training.{name} is > 0" for name in ("balance", "margin", "runner_up") if getattr(t, name) > 0]
    if METHODS[method].apart:
        reasons.append(f"training.method is {method}")
    if t.runner_up > 0 and any(layer.num_experts < 2 for layer in moe_layers(model)):
        rule = "of two experts or more in each MoE layer when training.runner_up is > 0"
        raise InputError(f"model.source must be {rule}, got a layer of one")
    if reasons and not model.routed:
        rule = f"converted (--to-moe), or have MoE layers of its own, when {' and '.join(reasons)}"
        raise InputError(f"model.source must be {rule}, got {source!r} without")
    return model


def _require_train_mode(model: Classifier, example: Tensor, source: str | None) -> None:
    """Some networks make more than logits in train mode, or fail in it. Raises `ValueError` for these."""
    rule = f"model.source {source}: module must make logits (N, K) in train mode too"
    try:
        with torch.no_grad(), learning(model, "all", record=False):
            logits = model(example)
    except Exception as error:
        raise InputError(f"{rule}, got {one_line(error)}") from error
    if not isinstance(logits, Tensor) or logits.shape != (len(example), model.spec["num_classes"]):
        raise InputError(f"{rule}, got {tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__}")
