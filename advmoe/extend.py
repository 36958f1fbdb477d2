"""Extension without forking: what a plugin registers becomes a choice by name everywhere, as the package's own are.

A plugin is a file that `--plugin FILE.py` (or `ADVMOE_PLUGINS`) names, or a package with an entry point in the group
`advmoe.plugins`; see `tables.plugins`. Names that are taken are refused with `InputError`.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from advmoe.errors import InputError, of_machine
from advmoe.tables import BACKBONES, DATASETS, METHODS, ROUTERS, Backbone, DataSet, Level, Method, Router
from advmoe.tables.plugins import add_plugin
from advmoe.text import in_file

_PACKAGE = Path(__file__).parent
Made = TypeVar("Made", bound=Callable[..., Any])


def register_backbone(
    name: str, *, width: int, label: str | None = None, tokens: bool = False, min_size: int = 8
) -> Callable[[Made], Made]:
    """Add what is decorated as the backbone `name`: a function or class
    `(layers, *, width, in_channels, num_classes, input_size) -> module` of normalised images.

    Args: width: channels of its first stage. label: in tables, by default the name. tokens: whether its MoE layers see
    tokens. min_size: side in pixels of the smallest images that it takes.
    """

    def add(build: Made) -> Made:
        made = _watched(f"the backbone {name}", build, _module)
        BACKBONES.add(name, Backbone(made, width, label or name, tokens=tokens, min_size=min_size))
        return build

    return add


def register_router(name: str, *, in_layers: bool = False, apart: bool = True) -> Callable[[Made], Made]:
    """Add what is decorated as the router `name`.

    It is `(in_channels, width, num_layers, num_experts, *, pool) -> module`, which scores normalised images for all MoE
    layers ((N, E) for each); or, `in_layers`, `(channels, num_experts, *, per_token=False) -> module`, which scores a
    layer's input. `apart` is false where one choice holds for all layers.
    """

    def add(build: Made) -> Made:
        made = _watched(f"the router {name}", build, _module)
        ROUTERS.add(name, Router(layer=made) if in_layers else Router(made, apart=apart))
        return build

    return add


def register_dataset(name: str, *, label: str | None = None, **about: Any) -> Callable[[Made], Made]:
    """Add the decorated reader `(data.types.Request) -> data.types.Source` as the data set `name`.

    `about`: other fields of `tables.DataSet`, as `licence`.
    """

    def add(reader: Made) -> Made:
        DATASETS.add(name, DataSet(_watched(f"the data set {name}", reader, _source), label or name, **about))
        return reader

    return add


def register_loss(name: str, *, from_labels: bool = True, least_classes: int = 2) -> Callable[[Made], Made]:
    """Add the decorated loss `(logits (N, K), classes (N,)) -> (N,)` as `name`, which attacks ascend: `pgd-50-NAME`.

    `from_labels`: whether it leads away from the true class, so that `routed` may search with it.
    """
    from advmoe.attacks.pgd import LOSSES, Loss

    def add(loss: Made) -> Made:
        if isinstance(name, str) and re.search("(^|-)soft$", name):
            raise InputError(f"loss must get a name that does not end in soft, which says how PGD routes, got {name!r}")
        LOSSES.add(name, Loss.of(loss, from_labels=from_labels, least_classes=least_classes))
        return loss

    return add


def register_attack(name: str, *, for_routed: bool = False, least_classes: int = 2) -> Callable[[Made], Made]:
    """Add the decorated attack `(predict, x, y, *, threat, seed) -> (N, C, H, W)` as `name`.

    `predict` maps pixels (N, C, H, W) to logits, `x` are clean pixels and `y` their classes, `threat` is the
    `ThreatModel`. What it returns is projected into the ball and scored again by the deployed model, so that it cannot
    overstate itself. `for_routed`: whether it is of use for models with MoE layers alone.
    """
    from advmoe.evaluation.suite import ATTACKS, FunctionAttack

    def add(attack: Made) -> Made:
        made = _watched(f"the attack {name}", attack)
        ATTACKS.add(name, FunctionAttack(name, made, for_routed=for_routed, least_classes=least_classes))
        return attack

    return add


def register_method(name: str, levels: tuple[Level, ...], *, label: str | None = None, sentence: str = "") -> None:
    """Add the training method `name`: the `levels` of an iteration, in their order (`tables.Level`).

    `label` and `sentence` are what tables and model cards say of it.
    """
    METHODS.add(name, Method(levels, label or name, sentence or name))


def _watched(what: str, made: Callable[..., Any], kind: Callable[[], type] | None = None) -> Callable[..., Any]:
    """`made`, a plugin's, whose mistakes are `InputError`s of one line: what it raises, and anything but a `kind`."""

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            result = made(*args, **kwargs)
        except (Exception, SystemExit) as error:
            frames = traceback.extract_tb(error.__traceback__)[1:]  # from the plugin's on
            ours = bool(frames) and Path(frames[-1].filename).is_relative_to(_PACKAGE)
            if isinstance(error, InputError) or of_machine(error) or ours:  # a bug of ours keeps its traceback
                raise
            file = frames[0].filename if frames else ""
            raise InputError(f"{what} must run without an error, got {in_file(error, file)}") from error
        if kind is not None and not isinstance(result, kind()):
            raise InputError(f"{what} must return a {kind().__name__}, got an object of type {type(result).__name__}")
        return result

    return call


def _module() -> type:
    from torch.nn import Module

    return Module


def _source() -> type:
    from advmoe.data.types import Source

    return Source


__all__ = [
    "Level", "add_plugin", "register_attack", "register_backbone", "register_dataset", "register_loss",
    "register_method", "register_router",
]  # fmt: skip
