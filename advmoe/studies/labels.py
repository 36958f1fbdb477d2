"""What data, backbones and sizes are called: made from the settings of runs. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import PurePath
from typing import Any

from advmoe.config import Pixels
from advmoe.studies.plan import PlannedRow
from advmoe.studies.spec import Settings
from advmoe.text import printable


def of_backbone(name: str, settings: Settings) -> str:
    """A backbone by its name and, where one is set, its width."""
    width = _field(settings, "model", "width")
    return name if width is None else f"{name} of width {width}"


def of_data(name: str, settings: Settings) -> str:
    """A data set by its name and, where one is set, the images' size."""
    size = _field(settings, "data", "image_size")
    return name if size is None else f"{name} at {size} pixels"


def other_folder(usual: Settings, settings: Settings) -> str | None:
    """The name of the folder that images are read from, where it is not called as usual: they may be any."""
    name, expected = (PurePath(_field(each, "data", "root") or "").name for each in (settings, usual))
    return printable(name) if _field(settings, "data", "name") == "folder" and name != expected else None


def same_threat(usual: Settings, settings: Settings) -> bool:
    """Whether two settings are of one threat model."""
    radii = (float(Pixels(_field(each, "threat", "eps"))) for each in (usual, settings))
    return len(set(radii)) == 1 and _field(usual, "threat", "norm") == _field(settings, "threat", "norm")


def shared(several: Sequence[Settings]) -> dict[str, dict[str, Any]]:
    """The fields, by group, that all of several settings give one value."""
    first = several[0] if several else {}
    found = {
        group: {name: v for name, v in fields.items() if all(_field(each, group, name) == v for each in several)}
        for group, fields in first.items()
    }
    return {group: fields for group, fields in found.items() if fields}


def of_size(rows: Iterable[PlannedRow]) -> str:
    """The size of a study in a sentence: what its runs and measurements share of what no label tells."""
    rows = list(rows)
    configs = [run.config for row in rows for run in row.runs.values()]
    attacked = [each for each in configs if each["training"]["method"] != "standard"]
    partial = [each for each in configs if each["model"]["kind"] != "dense"]
    routed = [each for each in configs if each["model"]["kind"] == "moe"]
    trained = [
        *_told(configs, "training", "epochs", "{} epochs"),
        *_told(configs, "data", "train_examples", "{:,} training images", "all training images"),
        *_told(configs, "threat", "norm", "{}"),
        *_told(configs, "threat", "eps", "eps {}"),
        *_told(attacked, "training", "attack_steps", "K = {}"),
        *_told(partial, "model", "scale", "r = {}"),
        *_told(routed, "model", "num_experts", "N = {}"),
    ]
    measured = _told(configs, "attack", "steps", "PGD of {} steps")
    numbers = {
        name: measure.options["num_examples"]
        for row in rows
        for measures in row.measures.values()
        for name, measure in measures.items()
        if "num_examples" in measure.options
    }
    by_number: dict[int | None, list[str]] = {}
    for name, number in numbers.items():
        by_number.setdefault(number, []).append(name)
    for number, names in by_number.items():
        images = "all test images" if number is None else f"{number:,} test images"
        measured.append(images if len(by_number) == 1 else f"{images} ({', '.join(names)})")
    return "; ".join(", ".join(part) for part in (trained, measured) if part)


def _told(configs: Iterable[Settings], group: str, name: str, words: str, none: str = "") -> list[str]:
    """A field in words, where all have the same; `none` where that is None."""
    values = {_field(each, group, name) for each in configs}
    if len(values) != 1:
        return []
    (value,) = values
    if value is None:
        return [none]
    told = words.format(value)
    return [told.removesuffix("s") if value == 1 else told]


def _field(settings: Settings, group: str, name: str) -> Any:
    return settings.get(group, {}).get(name)
