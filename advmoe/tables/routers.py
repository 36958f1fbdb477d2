"""Routers by name."""

from __future__ import annotations

from dataclasses import dataclass

from advmoe.tables.table import Table


@dataclass(frozen=True)
class Router:
    """Where choices of experts are made."""

    in_layers: bool
    """Whether each MoE layer has a router of its own, which sees the layer's input; else one sees the image."""
    apart: bool = True
    """Whether layers are chosen for apart; else one choice holds for all."""


ROUTERS: Table[Router] = Table(
    "model.router",
    {
        "layer": Router(in_layers=True),
        "embedding": Router(in_layers=False),
        "image": Router(in_layers=False, apart=False),
    },
)
