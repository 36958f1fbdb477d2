"""What was attacked with, and values of files, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from advmoe.report.tables import DASH, number
from advmoe.text import radius

CATEGORIES = {
    "both_survive": "1 both survive",
    "only_routing_fails": "2 only routing fails",
    "only_prediction_fails": "3 only prediction fails",
    "both_fail": "4 both fail",
}
"""Titles of a dissection's categories."""


def of_threat(threat: Mapping[str, Any]) -> str:
    """Norm and radius of what was attacked with."""
    eps, norm = threat.get("eps"), str(threat.get("norm"))
    return "eps unknown" if eps is None else f"{norm} eps {radius(eps, norm)}"


def flat(value: Any) -> str:
    """A value of a JSON file on one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{str(name).replace('_', ' ')} {flat(each)}" for name, each in value.items())
    if isinstance(value, list):
        return ", ".join(map(flat, value))
    if isinstance(value, int | float) and not isinstance(value, bool):
        return number(value)
    return DASH if value is None else str(value)


MOST_CLASSES = 20
"""Classes that a table shows."""


def class_shares(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Per class its `name`, `num_examples`, and the shares of it where the `model` and where the `routers` withstood
    the attack; of more than `MOST_CLASSES` those where the model did least.
    """
    found = []
    for each in result["per_class"]:
        shares = each["categories"]
        found.append({
            "name": str(result["classes"][each["class"]]) if "classes" in result else str(each["class"]),
            "num_examples": each["num_examples"],
            "model": shares["both_survive"] + shares["only_routing_fails"],
            "routers": shares["both_survive"] + shares["only_prediction_fails"],
        })  # fmt: skip
    return found if len(found) <= MOST_CLASSES else sorted(found, key=lambda each: each["model"])[:MOST_CLASSES]
