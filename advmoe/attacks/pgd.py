"""Projected gradient ascent: the one loop behind evaluation, training and attacks on routing; the loss plugs in.

Axes: `N` batch, `C` channels, `H W` size, `K` classes. Pixels, `eps` and `step_size` are in [0, 1].
Source: Madry et al., ICLR 2018 (the loop); Zhang et al., ICML 2019 (the KL ascent of TRADES).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from advmoe.threat import ThreatModel, randn_like

Predict = Callable[[Tensor], Tensor]
"""(N, C, H, W) pixels -> (N, K) logits."""
AttackLoss = Callable[[Tensor], Tensor]
"""(N, K) logits of the current iterate -> scalar to ascend, a sum over samples."""


def ascend(
    predict: Predict,
    x: Tensor,
    start: Tensor,
    loss: AttackLoss,
    *,
    threat: ThreatModel,
    steps: int,
    step_size: float,
) -> Tensor:
    """`steps` steepest-ascent steps of `loss(predict(.))` from `start`, each projected to the ball around `x`.

    Returns (N, C, H, W), detached. Gradients of parameters are neither computed nor touched.
    """
    x_adv = start.detach()
    for _ in range(steps):
        x_adv.requires_grad_(True)
        with torch.enable_grad():
            objective = loss(predict(x_adv))
        (gradient,) = torch.autograd.grad(objective, x_adv)
        x_adv = threat.project(x_adv.detach() + step_size * threat.steepest_step(gradient), x)
    return x_adv


def cross_entropy_loss(labels: Tensor) -> AttackLoss:
    """The untargeted attack's loss: cross-entropy with the true `labels`, (N,)."""
    return lambda logits: F.cross_entropy(logits.float(), labels, reduction="sum")


def margin_loss(labels: Tensor) -> AttackLoss:
    """Largest wrong logit less the true one (Carlini & Wagner, 2017), for `labels` (N,)."""

    def loss(logits: Tensor) -> Tensor:
        logits = logits.float()
        true = F.one_hot(labels, logits.shape[1]).bool()
        return (logits.masked_fill(true, -torch.inf).amax(1) - logits[true]).sum()

    return loss


def kl_loss(clean_logits: Tensor) -> AttackLoss:
    """TRADES' inner objective: KL(clean || adversarial), from log-probabilities on both sides.

    With `softmax` as the target an underflowing probability would have gradient 0 * log 0 = NaN.
    """
    target = F.log_softmax(clean_logits.detach().float(), 1)
    return lambda logits: F.kl_div(F.log_softmax(logits.float(), 1), target, reduction="sum", log_target=True)


def pgd(
    predict: Predict,
    x: Tensor,
    y: Tensor,
    *,
    threat: ThreatModel,
    steps: int = 50,
    step_size: float = 2 / 255,
    restarts: int = 1,
    loss: Literal["ce", "margin"] = "ce",
    surrogate: Predict | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Adversarial examples for `predict` by PGD with uniform random starts.

    Args:
        predict: the classifier as deployed, (N, C, H, W) pixels -> (N, K) logits; it decides what counts as a success.
        x: clean images, (N, C, H, W) in [0, 1]. y: true classes, (N,).
        surrogate: takes `predict`'s place where gradients are needed (a routed model under soft routing, say).
        restarts: only examples that every earlier start failed on are attacked again.
        generator: source of the random starts.

    Returns (N, C, H, W): the last iterate of the first start that fools `predict`, or of the last start.
    Raises `ValueError` for pixels outside [0, 1], empty input, mismatched labels, or fewer than one step or restart.
    """
    for name, number in (("steps", steps), ("restarts", restarts)):
        if number < 1:
            raise ValueError(f"{name} must be >= 1, got {number!r}")
    if len(x) == 0 or len(x) != len(y):
        raise ValueError(f"x and y must hold the same, non-zero number of examples, got {len(x)} and {len(y)}")
    if not bool(((x >= 0) & (x <= 1)).all()):
        raise ValueError(f"x must be pixels in [0, 1], got values from {x.min().item():g} to {x.max().item():g}")
    losses = {"ce": cross_entropy_loss, "margin": margin_loss}
    if loss not in losses:
        raise ValueError(f"loss must be one of {', '.join(losses)}, got {loss!r}")
    result = x.clone()
    unbroken = torch.arange(len(x), device=x.device)
    for _ in range(restarts):
        clean, labels = x[unbroken], y[unbroken]
        start = threat.random_start(clean, generator)
        x_adv = ascend(
            surrogate or predict, clean, start, losses[loss](labels), threat=threat, steps=steps, step_size=step_size
        )
        result[unbroken] = x_adv
        if restarts > 1:
            with torch.no_grad():
                unbroken = unbroken[predict(x_adv).argmax(1) == labels]
            if len(unbroken) == 0:
                break
    return result


def trades_attack(
    predict: Predict,
    x: Tensor,
    *,
    threat: ThreatModel,
    steps: int,
    step_size: float,
    generator: torch.Generator | None = None,
) -> Tensor:
    """TRADES' inner maximisation: KL ascent from x + 0.001 * N(0, 1) (Zhang et al., 2019, Algorithm 1).

    `predict` should be in eval mode. Returns (N, C, H, W), detached.
    """
    with torch.no_grad():
        clean_logits = predict(x)
    start = threat.project(x + 0.001 * randn_like(x, generator), x)
    return ascend(predict, x, start, kl_loss(clean_logits), threat=threat, steps=steps, step_size=step_size)
