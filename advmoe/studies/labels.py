"""Labels of runs: their titles, and the names of data, backbones and sizes, from settings. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from advmoe.config import Pixels
from advmoe.studies.rows import Settings
from advmoe.text import printable

_TITLES = {
    "dataset": "Data", "backbone": "Backbone", "method": "Method", "scale": "r", "experts": "N", "variant": "Variant",
}  # fmt: skip


def title_of(label: str) -> str:
    """What a table calls a label: the paper's symbol or a word; a label of a study's own by its name."""
    return _TITLES.get(label, label)


def in_name(label: str, value: Any) -> str:
    """A label and its value as part of a run's name; a variant is its value alone."""
    return str(value) if label == "variant" else f"{title_of(label)} = {value}"


def of_backbone(name: str, settings: Settings) -> str:
    """A backbone by its name and, where one is set, its width."""
    width = field_of(settings, "model", "width")
    return name if width is None else f"{name} of width {width}"


def of_data(name: str, settings: Settings) -> str:
    """A data set by its name and, where one is set, the images' size."""
    size = field_of(settings, "data", "image_size")
    return name if size is None else f"{name} at {size} pixels"


def other_folder(usual: Settings, settings: Settings) -> str | None:
    """The name of the image folder where the user set another than usual: its images may be any. Else None."""
    name, expected = (PurePath(field_of(each, "data", "root") or "").name for each in (settings, usual))
    return printable(name) if field_of(settings, "data", "name") == "folder" and name != expected else None


def same_threat(usual: Settings, settings: Settings) -> bool:
    """Whether two settings are of one threat model."""
    radii = (float(Pixels(field_of(each, "threat", "eps"))) for each in (usual, settings))
    return len(set(radii)) == 1 and field_of(usual, "threat", "norm") == field_of(settings, "threat", "norm")


def shared(several: Sequence[Settings]) -> dict[str, dict[str, Any]]:
    """The fields, by group, that all of several settings give one value."""
    first = several[0] if several else {}
    common = {
        group: {name: v for name, v in fields.items() if all(field_of(each, group, name) == v for each in several)}
        for group, fields in first.items()
    }
    return {group: fields for group, fields in common.items() if fields}


def field_of(settings: Settings, group: str, name: str) -> Any:
    """A field of settings; None where it is not set."""
    return settings.get(group, {}).get(name)
