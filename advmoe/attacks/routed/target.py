"""A routed model as its attacker sees it: the routers' scores and the pathway beside the logits.

Axes: `N` batch, `C` channels, `H W` size, `K` classes, `E` experts, `L` MoE layers, `T` tokens. Pixels and `eps` are in
[0, 1]. Where a model routes tokens one by one, scores are (N, T, E) and pathways (N, L, T).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from advmoe.attacks.pgd import Predict, margins
from advmoe.threat import ThreatModel


class Pass(NamedTuple):
    """One forward pass of a routed model."""

    logits: Tensor
    """(N, K)."""
    scores: tuple[Tensor, ...]
    """The routers' scores, (N, E) for each of the L layers."""
    pathway: Tensor
    """The expert that the scores choose, or that was forced, (N, L)."""


class RoutedModel(Protocol):
    """A routed model as its attacker sees it."""

    def __call__(self, x: Tensor, *, temperature: float | None = None, forced: Tensor | None = None) -> Pass:
        """Run images `x` (N, C, H, W): hard, or mixed by softmax(scores / temperature), or along `forced` (N, L)."""
        ...


class Halfspaces(NamedTuple):
    """Choices of experts that are the sides of hyperplanes in pixel space: bit b of image x is w_b . x > t_b."""

    weights: Tensor
    """w of each bit, (B, C, H, W) in fp64."""
    thresholds: Tensor
    """t of each bit, (B,) in fp64."""
    layers: Tensor
    """The bit that each layer's choice is, (L,)."""
    slack: Tensor
    """By how much rounding can move a score w . x - t that the model computes, (B,)."""


@dataclass(frozen=True)
class RoutedTarget:
    """What is attacked, and within which threat model."""

    model: RoutedModel
    """Where gradients come from."""
    predict: Predict
    """The same model as deployed: it alone decides what fools."""
    threat: ThreatModel
    halfspaces: Halfspaces | None = None
    """Of a model whose pathway is known from the pixels: then the attack is complete in the routing."""


def hard_choice(scores: tuple[Tensor, ...]) -> Tensor:
    """The experts that the scores choose, (N, L)."""
    return torch.stack([each.argmax(-1) for each in scores], 1)


def router_margins(scores: tuple[Tensor, ...], pathway: Tensor) -> Tensor:
    """By how much each layer's score of the expert in `pathway` (N, L) exceeds its best other's, (N, L) or (N, L, T); 0
    where there is one expert.
    """
    each = [
        -margins(s.flatten(0, -2), c.flatten()).view(c.shape) if s.shape[-1] > 1 else torch.zeros_like(s[..., 0])
        for s, c in zip(scores, pathway.unbind(1), strict=True)
    ]
    return torch.stack(each, 1)
