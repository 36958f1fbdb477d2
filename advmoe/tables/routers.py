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
    """Whether layers are chosen for apart; else one choice, or one for each half of the layers, holds for all."""
    learnt: bool = True
    """Whether it has parameters."""
    pixels: bool = False
    """Whether its choices are the sides of hyperplanes in pixel space, which can be proved (`moe.halfspace`)."""
    experts: int | None = None
    """The one number of experts that it chooses among, where it knows no other."""

    norms: bool = False
    """Whether it takes `norm`, the kind of its norms (`model.router_norm`)."""

    @property
    def in_layers(self) -> bool:
        """Whether each MoE layer has a router of its own."""
        return self.layer is not None


_LAYER, _IMAGE = "advmoe.moe.routers:LayerRouter", "advmoe.moe.routers:ImageRouter"


def _fixed(form: str) -> Router:
    build = lazily("advmoe.moe.halfspace:fixed_router", form=form)
    return Router(build, apart=False, learnt=False, pixels=True, experts=2)


def _linear(bits: int) -> Router:
    return Router(lazily("advmoe.moe.halfspace:linear_router", bits=bits), apart=False, pixels=True, experts=2)


ROUTERS: Table[Router] = Table(
    "model.router",
    {
        "layer": Router(layer=lazily(_LAYER), norms=True),
        "embedding": Router(lazily(_IMAGE, shared=False), norms=True),
        "image": Router(lazily(_IMAGE, shared=True), apart=False, norms=True),
        "fixed-top": _fixed("top"),
        "fixed-top-bottom": _fixed("top-bottom"),
        "fixed-mean": _fixed("mean"),
        "fixed-late": _fixed("late"),
        "linear": _linear(1),
        "linear-2": _linear(2),
    },
)
