"""Interval bounds of a router that sees the image: choices that no perturbation changes, whatever an attack finds.

Axes: `N` batch, `C` channels, `H W` size, `E` experts, `L` MoE layers. Pixels and `eps` are in [0, 1].
Source: Gowal et al., ICCV 2019 (interval bound propagation), here of centre and radius.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advmoe.models import Classifier
from advmoe.moe.routers import ImageRouter

_ROUNDING = 1e-4
"""Of the scores' size: by how much fp32 may compute other scores than fp64 does."""


def bounded(model: object) -> bool:
    """Whether bounds of the model's choices can be computed."""
    if not isinstance(model, Classifier) or type(model.router) is not ImageRouter:
        return False
    known = nn.Conv2d, nn.modules.batchnorm._BatchNorm, nn.ReLU
    return all(isinstance(each, known) for each in (*model.router.embedding.children(), model.router.norm))


@torch.no_grad()
def proved_choices(model: Classifier, x: Tensor, eps: float) -> Tensor:
    """Whether every layer's choice provably stays within `eps` in linf (hence in l2 too) of images `x` (N, C, H, W),
    (N,) booleans. False says nothing.
    """
    assert isinstance(model.router, ImageRouter)
    router, normalize = copy.deepcopy(model.router).double().eval(), copy.deepcopy(model.normalize).double()
    low, high = (normalize((x.double() + side * eps).clamp(0, 1)) for side in (-1, 1))
    if router.pool > 1:
        low, high = F.avg_pool2d(low, router.pool), F.avg_pool2d(high, router.pool)
    middle, half = (low + high) / 2, (high - low) / 2
    for layer in router.embedding.children():
        middle, half = _through(layer, middle, half)
    middle, half = _through(router.norm, middle.mean((2, 3)), half.mean((2, 3)))
    layers = 1 if router.shared else router.num_layers
    scores = router.heads(router.norm(router.embedding(_pooled(router, normalize(x.double()))).mean((2, 3))))
    scores = scores.unflatten(1, (layers, router.num_experts))
    chosen = scores.argmax(2)
    weight = router.heads.weight.unflatten(0, (layers, router.num_experts))
    bias = router.heads.bias.unflatten(0, (layers, router.num_experts))
    rows = torch.arange(layers, device=x.device)
    # The chosen expert's lead on each, as one linear map: tighter than the bounds of both scores.
    lead = weight[rows, chosen][:, :, None] - weight
    margin = (lead * middle[:, None, None]).sum(3) + bias[rows, chosen][..., None] - bias
    margin = margin - (lead.abs() * half[:, None, None]).sum(3)
    sure = margin > _ROUNDING * (1 + scores.abs().amax(2, keepdim=True))
    kept: Tensor = (sure | F.one_hot(chosen, router.num_experts).bool()).flatten(1).all(1)
    return kept


def _pooled(router: ImageRouter, x: Tensor) -> Tensor:
    return F.avg_pool2d(x, router.pool) if router.pool > 1 else x


def _through(layer: nn.Module, middle: Tensor, half: Tensor) -> tuple[Tensor, Tensor]:
    """The interval middle +- half behind a convolution, a batch norm in eval mode or a ReLU."""
    if isinstance(layer, nn.Conv2d):
        return layer(middle), F.conv2d(half, layer.weight.abs(), None, layer.stride, layer.padding)
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
        return layer(middle), (layer(middle + half) - layer(middle)).abs()
    assert isinstance(layer, nn.ReLU)
    low, high = (middle - half).relu(), (middle + half).relu()
    return (low + high) / 2, (high - low) / 2
