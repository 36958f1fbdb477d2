"""Routers by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from advmoe.tables.table import Table, lazily


@dataclass(frozen=True)
class Router:
    """Where choices of experts are made."""

    build: Callable[..., Any] | None = None
    """`(in_channels, width, num_layers, num_experts, *, pool) -> module`, which scores normalised images for all MoE
    layers; None where each layer has a router of its own, which sees the layer's input.
    """
    apart: bool = True
    """Whether layers are chosen for apart; else one choice holds for all."""

    @property
    def in_layers(self) -> bool:
        """Whether each MoE layer has a router of its own."""
        return self.build is None


_IMAGE = "advmoe.moe.routers:ImageRouter"

ROUTERS: Table[Router] = Table(
    "model.router",
    {
        "layer": Router(),
        "embedding": Router(lazily(_IMAGE, shared=False)),
        "image": Router(lazily(_IMAGE, shared=True), apart=False),
    },
)
