"""Model cards taken apart."""

from typing import Any

import yaml


def front_matter(card: str) -> dict[str, Any]:
    """What the Hub reads of a card."""
    _, front, _ = card.split("---\n", 2)
    return yaml.safe_load(front)


def rows(card: str) -> dict[str, list[str]]:
    """The cells of every table row, by the first one."""
    lines = [line.strip("|").split("|") for line in card.splitlines() if line.startswith("| ")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}
