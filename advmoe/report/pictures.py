"""A picture as data: drawn, and put into words, whenever it is wanted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from advmoe.errors import InputError
from advmoe.report import alt_text
from advmoe.report.figures import (
    bars_figure,
    flow_figure,
    heatmap_figure,
    histogram_figure,
    lines_figure,
    stacked_figure,
    sweep_figure,
)  # fmt: skip


class PictureKind(NamedTuple):
    """How pictures of one kind are drawn, and how they are put into words; both take the data and the options."""

    draw: Callable[..., None]
    describe: Callable[..., str]


KINDS: Mapping[str, PictureKind] = {
    "lines": PictureKind(lines_figure, alt_text.of_lines),
    "bars": PictureKind(bars_figure, alt_text.of_bars),
    "stacked": PictureKind(stacked_figure, alt_text.of_shares),
    "histogram": PictureKind(histogram_figure, alt_text.of_histogram),
    "heatmap": PictureKind(heatmap_figure, alt_text.of_heatmap),
    "sweep": PictureKind(sweep_figure, alt_text.of_sweep),
    "flow": PictureKind(flow_figure, alt_text.of_flow),
}


@dataclass(frozen=True)
class Picture:
    """A picture as JSON can hold it. Raises `ValueError` for an unknown kind."""

    kind: str
    name: str
    """What its files are called, without a suffix."""
    title: str
    data: Any
    """What the function of `figures` that draws this kind takes first."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Axis labels, references, ...: the other arguments of that function."""
    caption: str = ""
    wide: bool = False
    """Whether it is lost in half a page."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")

    @property
    def alt(self) -> str:
        """What it shows, for those who cannot see it."""
        return KINDS[self.kind].describe(self.data, **self.options)

    def draw(self, path: Path, **title: str) -> None:
        """Draw it as .svg or .png, with `title=` under that title. Raises `ValueError` as `figures` does."""
        KINDS[self.kind].draw(self.data, path, **self.options, **title)
