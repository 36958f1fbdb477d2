"""Mixture-of-experts layers, routers, and the routing of a forward pass as a value."""

from advmoe.moe.conv import MoEConv2d
from advmoe.moe.layer import MoELayer, moe_layers
from advmoe.moe.linear import MoELinear
from advmoe.moe.mlp import MoEMLP
from advmoe.moe.routers import ImageRouter, LayerRouter, routers_of
from advmoe.moe.routing import Routing, pathway, route, soft_routing

__all__ = [
    "ImageRouter",
    "LayerRouter",
    "MoEConv2d",
    "MoELayer",
    "MoELinear",
    "MoEMLP",
    "Routing",
    "moe_layers",
    "pathway",
    "route",
    "routers_of",
    "soft_routing",
]
