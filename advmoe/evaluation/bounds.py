"""Bounds of routers' scores within a radius of an image: choices that no perturbation changes, whatever attacks find.

Axes: `N` batch, `C` channels, `H W` size, `E` experts, `H` hidden units, `L` MoE layers. Pixels and `eps` are in
[0, 1].

Boxes (`boxes`) go through the network in fp64, from [x - eps, x + eps] cut to [0, 1] on. Behind an MoE layer of which
the bounds leave several experts the box holds what any of them makes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import reduce
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advmoe import ops
from advmoe.errors import of_machine
from advmoe.evaluation.boxes import Box, Unbounded, through
from advmoe.models import Classifier
from advmoe.models.modes import evaluating
from advmoe.moe.conv import MoEConv2d
from advmoe.moe.layer import MoELayer
from advmoe.moe.linear import MoELinear
from advmoe.moe.mlp import MoEMLP
from advmoe.moe.routers import ImageRouter, LayerRouter
from advmoe.moe.routing import route
from advmoe.moe.wrapped import MoEWrapped
from advmoe.text import one_line

_ROUNDING = 1e-4
"""Of the scores' size: by how much fp32 may compute other scores than fp64 does."""
_IMAGES = 50
"""Bounded at once: boxes in fp64 are several times as large as activations."""


class Bounds(NamedTuple):
    """Of one layer's scores."""

    scores: Box
    """(N, E)."""
    possible: Tensor
    """Which experts may be chosen, (N, E) booleans."""

    @property
    def proved(self) -> Tensor:
        """Whether the choice cannot change, (N,) booleans."""
        return self.possible.sum(1) == 1


class ChoiceBounds:
    """Bounds of the choices of a routed model, as it is now, within radii in linf (whose ball holds that of l2).

    Raises `Unbounded`, with the reason, for a model of which none can be computed; some show when it is used.
    """

    def __init__(self, model: object) -> None:
        if not isinstance(model, Classifier):
            raise Unbounded(f"a {type(model).__name__}")
        self._original = model
        if ops.hooked(model):
            raise Unbounded("modules with hooks")
        with _or_unbounded():
            self._model = copy.deepcopy(model).double().eval().requires_grad_(False)
        self._found: dict[int, Bounds] = {}
        if self._model.router is None:
            _replace_layers(self._model, self._found)
        elif type(self._model.router) is not ImageRouter:
            raise Unbounded(f"a {type(self._model.router).__name__}")

    @torch.no_grad()
    def __call__(self, x: Tensor, eps: float) -> list[Bounds]:
        """Of each MoE layer's scores within `eps` of images `x` (N, C, H, W)."""
        self._found.clear()
        with _or_unbounded():
            pixels = Box(*((x.double() + side * eps).clamp(0, 1) for side in (-1, 1)))
            images = self._model.normalize(pixels)
            if isinstance(self._model.router, ImageRouter):
                return _of_image(self._model.router, images)
            self._model.backbone(images)
            return [self._found[layer] for layer in sorted(self._found)]

    def proved(self, x: Tensor, eps: float) -> Tensor:
        """Whether each layer's choice provably stays within `eps` of images `x` (N, C, H, W), (N, L) booleans. False
        says nothing.
        """
        parts = (self(part, eps) for part in x.split(_IMAGES))
        return torch.cat([torch.stack([layer.proved for layer in part], 1) for part in parts])

    @torch.no_grad()
    def check(self, x: Tensor) -> None:
        """Raise `Unbounded` where the model's own scores of images `x` (N, C, H, W) are not within their bounds: a
        network's code may do something else with a box than with a tensor.
        """
        bounds = self(x, 0.0)
        with evaluating(self._original), route() as routing:
            self._original(x)
        scores = [routing.scores[layer].double() for layer in sorted(routing.scores)]
        if len(scores) != len(bounds) or not all(map(_within, scores, bounds)):
            raise Unbounded("a network that computes otherwise on bounds")


@contextmanager
def _or_unbounded() -> Iterator[None]:
    """What a network's code raises inside, on boxes, is a reason for no bounds; lack of memory stays itself."""
    try:
        yield
    except Unbounded:
        raise
    except Exception as error:
        if of_machine(error):
            raise
        raise Unbounded(f"this network ({one_line(error)})") from error


def _within(scores: Tensor, bounds: Bounds) -> bool:
    room = _ROUNDING * (1 + scores.abs())
    return bool(((scores >= bounds.scores.low - room) & (scores <= bounds.scores.high + room)).all())


def _scored(features: Box, weight: Tensor, bias: Tensor) -> Bounds:
    """The scores weight @ features + bias for `features` (N, H), `weight` (E, H), `bias` (E,), and who may be chosen.

    An expert cannot be where another one leads it everywhere: each lead is one linear map, bounded tighter than two
    scores.
    """
    scores = through(F.linear, features, weight, bias)
    lead, ahead = weight[:, None] - weight, bias[:, None] - bias
    centre, radius = (features.low + features.high) / 2, (features.high - features.low) / 2
    least = torch.einsum("nh,abh->nab", centre, lead) + ahead - torch.einsum("nh,abh->nab", radius, lead.abs())
    room = _ROUNDING * (1 + torch.maximum(scores.low.abs(), scores.high.abs()).amax(1))
    return Bounds(scores, ~(least > room[:, None, None]).any(1))


def _of_image(router: ImageRouter, x: Box) -> list[Bounds]:
    """Of each of the L layers' scores by a router that sees normalised images."""
    if router.pool > 1:
        x = through(F.avg_pool2d, x, router.pool)
    features = router.norm(router.embedding(x).mean((2, 3)))
    layers = 1 if router.shared else router.num_layers
    heads = (each.unflatten(0, (layers, router.num_experts)) for each in (router.heads.weight, router.heads.bias))
    each = [_scored(features, *head) for head in zip(*heads, strict=True)]
    return each * router.num_layers if router.shared else each


def _replace_layers(network: nn.Module, found: dict[int, Bounds]) -> None:
    """Put a `_BoxedLayer` in the place of every MoE layer. Raises `Unbounded` for one of which no bounds are known."""
    boxed: dict[nn.Module, nn.Module] = {}
    for parent in list(network.modules()):
        for name, layer in parent._modules.items():
            if isinstance(layer, MoELayer):
                if layer not in boxed:
                    boxed[layer] = _BoxedLayer(layer, found)
                parent._modules[name] = boxed[layer]


class _BoxedLayer(nn.Module):
    """An MoE layer on boxes: bounds of its router's scores, which it leaves in `found`, and of its output."""

    def __init__(self, layer: MoELayer, found: dict[int, Bounds]) -> None:
        super().__init__()
        if type(layer) not in (MoEConv2d, MoELinear, MoEMLP, MoEWrapped):
            raise Unbounded(f"a {type(layer).__name__}")
        if type(layer.router) is not LayerRouter:
            raise Unbounded(f"a {type(layer.router).__name__}")
        if layer.router.per_token:
            raise Unbounded("choices of tokens")
        self.layer, self.found = layer, found

    def forward(self, x: Box) -> Box:
        """(N, ...) -> (N, ...), whichever expert is chosen of those that may be."""
        layer, compute = self.layer, cast(Callable[..., Box], self.layer.compute)
        if type(layer) is MoELinear and x.dim() > 3:
            raise Unbounded("tokens in several axes")
        if layer.layer not in self.found:  # a layer that runs again in a pass keeps its first choice
            self.found[layer.layer] = self._chosen(x)
        possible, ends = self.found[layer.layer].possible, list[tuple[Tensor, Tensor]]()
        for expert in possible.any(0).nonzero()[:, 0].tolist():
            y = compute(x, *(layer.of_expert(expert, bank) for bank in layer.banks()))
            out = ~possible[:, expert].view(-1, *[1] * (y.dim() - 1))
            ends.append((y.low.masked_fill(out, torch.inf), y.high.masked_fill(out, -torch.inf)))
        lows, highs = zip(*ends, strict=True)
        return Box(reduce(torch.minimum, lows), reduce(torch.maximum, highs))

    def _chosen(self, x: Box) -> Bounds:
        router = self.layer.router
        assert isinstance(router, LayerRouter)
        pooled = x if x.dim() == 2 else x.mean((2, 3) if x.dim() == 4 else 1)
        features = router.hidden(router.norm(pooled)).relu()
        return _scored(features, router.scores.weight, router.scores.bias)
