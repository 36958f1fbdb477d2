"""Recipes: configurations ready to run, each a setting (what is trained, on what) with a method (how) laid over it.

A setting of the paper is a data set with a backbone: `cifar10-vgg16-at-moe` is `settings/paper.yaml`, the backbone's
name, `settings/cifar10.yaml` and `methods/at-moe.yaml` over one another; `digits-advmoe` is `settings/digits.yaml` and
`methods/advmoe.yaml`. The first line of each file, a comment, says what it is.

Every data set, backbone and method of the paper's tables 1 to 3 is here. A transformer has no Sparse-CNN, in the paper
neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from advmoe.config import Config, merged, overlaid
from advmoe.documents import parse_yaml
from advmoe.errors import InputError
from advmoe.tables import BACKBONES

_PAPER = {
    "cifar10": ("resnet18", "wrn-28-10", "vgg16", "densenet40"),
    "cifar100": ("resnet18", "wrn-28-10", "vgg16", "densenet40"),
    "tiny-imagenet": ("resnet18", "wrn-28-10"),
    "imagenet": ("resnet18", "wrn-28-10", "deit-tiny"),
}

SETTINGS = {"digits": ("digits", ""), "folder": ("folder", "")} | {
    f"{data}-{backbone}": (data, backbone) for data, backbones in _PAPER.items() for backbone in backbones
}
"""Data set and backbone of each setting; no backbone where the data set's file says all."""
METHODS = (
    "advmoe", "at-moe", "at-sparse", "at-s-dense", "at-dense", "standard", "advmoe-image-mod",
    "advmoe-embedding-random",
)  # fmt: skip

_PARTS = {
    f"{setting}-{method}": (setting, method)
    for setting, (_, backbone) in SETTINGS.items()
    for method in METHODS
    if not (method == "at-sparse" and backbone and BACKBONES.find(backbone).tokens)
}


def recipe_names() -> list[str]:
    """Every recipe, setting by setting."""
    return list(_PARTS)


def recipe(name: str) -> dict[str, Any]:
    """The groups of fields that the recipe sets; `Config.from_dict` makes a configuration of them. Raises `ValueError`
    for an unknown name.
    """
    if not isinstance(name, str) or name not in _PARTS:
        raise InputError(f"a recipe must be a setting and a method (see `advmoe recipes`), got {name!r}")
    setting, method = _PARTS[name]
    data, backbone = SETTINGS[setting]
    layers = [_read("settings", data), _read("methods", method)]
    if backbone:
        layers = [_read("settings", "paper"), {"model": {"name": backbone}}, *layers]
    return merged(*layers)


def configuration(name: str, **overrides: Any) -> Config:
    """The recipe `name` with fields laid over it: groups, `training={"epochs": 3}`, or dotted names,
    `**{"training.epochs": 3}`. Raises `ValueError` for an unknown recipe or field, or a value out of range.
    """
    groups: dict[str, dict[str, Any]] = {}
    for key, value in overrides.items():
        group, dot, field = key.partition(".")
        if not dot and not isinstance(value, Mapping):
            Config.from_dict({key: value})  # says what is wrong; None is an empty group
            value = {}
        groups.setdefault(group, {}).update({field: value} if dot else value)
    return Config.from_dict(overlaid(recipe(name), groups))


def describe(name: str) -> str:
    """One line on the recipe `name`. Raises `ValueError` for an unknown one."""
    if name not in _PARTS:
        raise InputError(f"a recipe must be a setting and a method (see `advmoe recipes`), got {name!r}")
    setting, method = _PARTS[name]
    return f"{name}: {describe_method(method)}; {describe_setting(setting)}"


def describe_setting(setting: str) -> str:
    """One line on a setting of `SETTINGS`."""
    data, backbone = SETTINGS[setting]
    line = _first_line("settings", data)
    return f"{BACKBONES.find(backbone).label} on {line}" if backbone else line


def describe_method(method: str) -> str:
    """One line on a method of `METHODS`."""
    return _first_line("methods", method)


def _first_line(folder: str, stem: str) -> str:
    return _text(folder, stem).splitlines()[0].lstrip("# ")


def _read(folder: str, stem: str) -> Any:
    return parse_yaml(_text(folder, stem), f"{folder}/{stem}.yaml")


def _text(folder: str, stem: str) -> str:
    return (files(__name__) / folder / f"{stem}.yaml").read_text(encoding="utf-8")
