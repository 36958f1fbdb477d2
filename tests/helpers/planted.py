"""Routed models whose every answer is known by hand, some planted to hide their gradients."""

import torch
from torch import nn

from advmoe.attacks.routed import Budget, Pass, RoutedTarget
from advmoe.evaluation.scoring import OpenRouting
from advmoe.moe.conv import MoEConv2d
from advmoe.moe.routing import forward_scope
from advmoe.threat import ThreatModel

LINF, L2 = ThreatModel("linf", 8 / 255), ThreatModel("l2", 0.3)
WIDE = ThreatModel("linf", 0.1)
SMALL = Budget(steps=4, search_steps=4, pathway_steps=4, queries=0, temperatures=(0.3, 3.0), weights=(0.1, 10.0))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pixels(*columns):
    """One image of a single pixel for each entry, a channel for each column."""
    return torch.stack([torch.tensor(column) for column in columns], 1)[:, :, None, None]


class Toy:
    """A routed model of two functions of the pixels, (N, K) logits and (N, L, E) scores, that notes what was forced."""

    def __init__(self, logits, scores):
        self.logits, self.scores, self.forced = logits, scores, []

    def __call__(self, x, *, temperature=None, forced=None):
        scores = tuple(self.scores(x).unbind(1))
        if forced is not None:
            self.forced.append(forced.tolist())
        chosen = torch.stack([each.argmax(1) for each in scores], 1)
        return Pass(self.logits(x), scores, chosen if forced is None else forced)


def against_zero(margin):
    """The logits (0, margin), or for scores the same of one layer."""
    return torch.stack([torch.zeros_like(margin), margin], -1)


class Planted(nn.Module):
    """One MoE layer of two experts; logits are `scale` x the mean of its output.

    The router's score for expert 1 is `steepness` x (mean of channel `looks_at` - `threshold`), and 0 for expert 0.
    """

    def __init__(self, *, looks_at=0, threshold=0.5, steepness=1.0, scale=1.0):
        super().__init__()
        self.scale = scale
        self.layer = MoEConv2d(3, 2, 1, bank_rows=4, num_experts=2, layer=0)
        # Expert 0 says class 1 where channel 1 exceeds channel 2 (1/2 throughout), expert 1 the opposite.
        rows = [[0, -1, 1], [0, 1, -1], [0, 1, -1], [0, -1, 1]]
        router = self.layer.router
        with torch.no_grad():
            self.layer.bank.copy_(torch.tensor(rows).float().view(4, 3, 1, 1))
            for parameter in router.parameters():
                parameter.zero_()
            router.norm.weight.fill_(1)
            router.hidden.weight[0, looks_at] = 1
            router.scores.weight[1, 0] = steepness
            router.scores.bias[1] = -steepness * threshold
        self.eval()

    def forward(self, x):
        with forward_scope():
            return self.scale * self.layer(x).mean((2, 3))


def planted_images(n=12):
    """Channel 0 a little below 1/2, channel 1 far above it for class 1 and far below for class 0, channel 2 at 1/2."""
    x, y = torch.full((n, 3, 8, 8), 0.5), torch.arange(n) % 2
    x[:, 0], x[:, 1] = 0.48, torch.where(y == 1, 0.8, 0.2)[:, None, None]
    x += 0.02 * torch.rand(x.shape, generator=seeded(1)) - 0.01
    return x.contiguous(memory_format=torch.channels_last), y


def opened(model, threat=LINF):
    """The model as its attacker sees it."""
    return RoutedTarget(OpenRouting(model), model, threat)
