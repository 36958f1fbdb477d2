"""What a search varies: fields of the configuration by their dotted names, each within a range or among choices.

Imports neither torch nor Optuna.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from advmoe.config import Config, Pixels, field_names, require, typed
from advmoe.config.config import unknown_field
from advmoe.documents import MOST_YAML, parse_yaml, read_text
from advmoe.errors import InputError
from advmoe.text import show

FIXED = {
    "data": "decides which images trials are compared on",
    "threat": "decides what a robust accuracy means",
    "attack": "decides how trials are attacked",
    "model.source": "names the user's own network",
    "model.to_moe": "belongs to the user's own network",
    "training.seed": "decides which images trials are compared on",
    "training.init_from": "names what every trial starts from",
    "training.teacher": "names what every trial learns from",
    "training.teacher_weights": "names what every trial learns from",
    "training.val_attack_steps": "decides how trials are compared while they train",
}
"""Fields, and groups of them, that no search varies, and why: trials would no longer be measured alike."""
FREE = ("data.augment",)
"""Fields of these groups that change training alone."""
_RANGE, _CHOICES = {"low", "high", "log", "step"}, {"choices"}
_MOST_CHOICES = 100

Choice = bool | int | float | str | None


@dataclass(frozen=True)
class Dimension:
    """One field that is varied: from `low` to `high`, both included, or among `choices`."""

    name: str
    """Dotted, as in `training.lr`."""
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    """Whether factors, not differences, are equally likely."""
    step: float | None = None
    """Between neighbouring values; None: any value, and of whole numbers every one."""
    whole: bool = False
    """Whether values are whole numbers."""
    choices: tuple[Choice, ...] = ()

    def described(self) -> dict[str, Any]:
        """As a space's YAML has it."""
        if self.choices:
            return {"choices": list(self.choices)}
        ends = {"low": self.low, "high": self.high, "log": self.log}
        return ends if self.step is None else {**ends, "step": self.step}


def read_space(path: str | os.PathLike[str]) -> tuple[Dimension, ...]:
    """The space in a YAML file. Raises `InputError`, which names the file, the field, the rule and the value."""
    values = parse_yaml(read_text(Path(path), MOST_YAML, "YAML"), str(path))
    try:
        return space(values)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def space(values: Any) -> tuple[Dimension, ...]:
    """The dimensions that a mapping of dotted fields describes. Raises `InputError`."""
    rule = "dotted fields with low and high, or choices, each (training.lr: {low: 0.01, high: 0.3, log: true})"
    require(isinstance(values, Mapping) and bool(values), "a space", rule, values)
    return tuple(_dimension(name, described) for name, described in values.items())


def overrides(parameters: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Values by dotted names as groups of fields."""
    groups: dict[str, dict[str, Any]] = {}
    for name, value in parameters.items():
        group, _, field = name.partition(".")
        groups.setdefault(group, {})[field] = value
    return groups


def _dimension(name: Any, described: Any) -> Dimension:
    if name not in field_names():
        raise unknown_field(str(name))
    for fixed in (name, name.partition(".")[0]):
        if fixed in FIXED and name not in FREE:
            raise InputError(f"{name} must be left to --config, got {show(described)} in the space: it {FIXED[fixed]}")
    rule = "low and high (and log or step), or choices"
    keys = set(described) if isinstance(described, Mapping) else set()
    require({"low", "high"} <= keys <= _RANGE or keys == _CHOICES, name, rule, described)
    return _choices(name, described["choices"]) if keys == _CHOICES else _range(name, described)


def _hint(name: str) -> Any:
    group, _, field = name.partition(".")
    return get_type_hints(get_type_hints(Config)[group], include_extras=True)[field]


def _choices(name: str, choices: Any) -> Dimension:
    require(isinstance(choices, list) and 2 <= len(choices) <= _MOST_CHOICES, f"{name}: choices",
            f"a list of 2 to {_MOST_CHOICES} values", choices)  # fmt: skip
    for each in choices:
        require(each is None or isinstance(each, bool | int | float | str), f"{name}: choices", "plain values", each)
        typed(name, _hint(name), each)
    require(len({repr(each) for each in choices}) == len(choices), f"{name}: choices", "values given once", choices)
    return Dimension(name, choices=tuple(choices))


def _range(name: str, described: Mapping[str, Any]) -> Dimension:
    base = _base(_hint(name))
    require(base in (int, float, Pixels), name, "choices, as it is no number", dict(described))
    low, high = (typed(name, _hint(name), described[end]) for end in ("low", "high"))
    require(low is not None and high is not None, name, "numbers from low to high", dict(described))
    require(low < high, f"{name}: high", f"> low ({low})", described["high"])
    log, step = described.get("log", False), described.get("step")
    require(isinstance(log, bool), f"{name}: log", "true or false", log)
    require(not log or low > 0, f"{name}: low", "> 0 with log", described["low"])
    require(not log or step is None, f"{name}: step", "left out with log", step)
    if step is not None:
        step = typed(f"{name}: step", base, step)
        require(0 < step <= high - low, f"{name}: step", f"> 0 and <= {high - low:.10g}, the range", described["step"])
        step = step if base is int else float(step)
    low, high = (each if base is int else float(each) for each in (low, high))
    return Dimension(name, low, high, log, step, base is int)


def _base(hint: Any) -> Any:
    """The type of a field, of `Annotated` and `T | None` the T."""
    while get_args(hint) and get_origin(hint) is not Literal:
        hint = get_args(hint)[0]
    return hint
