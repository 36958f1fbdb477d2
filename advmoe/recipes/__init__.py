"""Recipes: configurations ready to run, each a setting (what is trained on) with a method (how) laid over it.

`digits-advmoe` is `settings/digits.yaml` under `methods/advmoe.yaml`. The first line of each file, a comment, says what
it is.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from advmoe.config import merged, parse_yaml

SETTINGS = ("digits", "cifar10-resnet18")
METHODS = ("advmoe", "at-moe", "at-s-dense", "at-dense", "standard", "advmoe-image-mod", "advmoe-embedding-random")

_PARTS = {f"{setting}-{method}": (setting, method) for setting in SETTINGS for method in METHODS}


def recipe_names() -> list[str]:
    """Every recipe, setting by setting."""
    return list(_PARTS)


def recipe(name: str) -> dict[str, Any]:
    """The groups of fields that the recipe sets; `Config.from_dict` makes a configuration of them."""
    return merged(*(parse_yaml(text, name) for text in _texts(name)))


def describe(name: str) -> str:
    """One line on the recipe: its method, then its setting."""
    setting, method = (text.splitlines()[0].lstrip("# ") for text in _texts(name))
    return f"{method} | {setting}"


def _texts(name: str) -> tuple[str, str]:
    if name not in _PARTS:
        raise ValueError(f"a recipe must be one of {', '.join(_PARTS)}, got {name!r}")
    setting, method = _PARTS[name]
    return _read("settings", setting), _read("methods", method)


def _read(folder: str, stem: str) -> str:
    return (files(__name__) / folder / f"{stem}.yaml").read_text(encoding="utf-8")
