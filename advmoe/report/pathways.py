"""Placeholder until pathways.json's schema is there."""

from __future__ import annotations

from advmoe.report.album import Album
from advmoe.report.html import Content
from advmoe.report.results import Run


def pathways(run: Run, album: Album) -> Content:
    """Pictures of pathways.json."""
    return None
