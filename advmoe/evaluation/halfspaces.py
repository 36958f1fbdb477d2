"""A model's choices as half-spaces of pixels, for attacks and proofs, where its router chooses so.

Axes: `B` bits, `C` channels, `H W` size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from advmoe import ops
from advmoe.attacks.pgd import Predict
from advmoe.attacks.routed import Halfspaces
from advmoe.models import Classifier
from advmoe.models.convert.replacing import ConvertedClassifier
from advmoe.moe.halfspace import GRID, HalfspaceRouter


def halfspace_router(predict: Predict) -> HalfspaceRouter | None:
    """The router that alone decides the choices of `predict`, by half-spaces; None for other routers, and for callables
    that hide theirs or may do something else: of other classes, with hooks, with another `forward`.
    """
    if not isinstance(predict, Classifier) or type(predict) not in (Classifier, ConvertedClassifier):
        return None
    router = predict.router
    if type(router) is not HalfspaceRouter or ops.listened(predict) or ops.hooked(router):
        return None
    return router


def halfspaces_of(predict: Predict, x: Tensor) -> Halfspaces | None:
    """The half-spaces by which `predict` chooses for images of the size of `x` (N, C, H, W), if it does
    (`halfspace_router`).
    """
    if (router := halfspace_router(predict)) is None:
        return None
    _, channels, height, width = x.shape
    weights, thresholds = router.pixel_weights(channels, height, width), router.thresholds.detach().double()
    # In fp32 a sum of n terms is off by at most n 2^-24 of the sum of their sizes: of a cell, then of all cells.
    terms = (height // GRID + 2) * (width // GRID + 2) + channels * GRID**2 + 8
    size = weights.flatten(1).abs().sum(1) + thresholds.abs()
    layers = torch.tensor(router.layers, device=weights.device)
    return Halfspaces(weights, thresholds, layers, terms * 2**-24 * size)
