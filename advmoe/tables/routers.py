"""Routers by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from advmoe.tables.table import Table, lazily


@dataclass(frozen=True)
class Router:
    """Where choices of experts are made: ahead of all MoE layers, or in each of them."""

    build: Callable[..., Any] | None = None
    """`(in_channels, width, num_layers, num_experts, *, pool) -> module`, which scores normalised images for all MoE
    layers; None where each layer has a router of its own.
    """
    layer: Callable[..., Any] | None = None
    """`(channels, num_experts, *, per_token=False) -> module`, which scores a layer's input; None where scores are made
    ahead.
    """
    apart: bool = True
    """Whether layers are chosen for apart; else one choice holds for all."""

    norms: bool = False
    """Whether it takes `norm`, the kind of its norms (`model.router_norm`)."""

    @property
    def in_layers(self) -> bool:
        """Whether each MoE layer has a router of its own."""
        return self.layer is not None


_LAYER, _IMAGE = "advmoe.moe.routers:LayerRouter", "advmoe.moe.routers:ImageRouter"

ROUTERS: Table[Router] = Table(
    "model.router",
    {
        "layer": Router(layer=lazily(_LAYER), norms=True),
        "embedding": Router(lazily(_IMAGE, shared=False), norms=True),
        "image": Router(lazily(_IMAGE, shared=True), apart=False, norms=True),
    },
)
