"""A plain model's counterpart of `routed`: as many gradient steps and queries, on what a plain model offers.

Source: Madry et al., ICLR 2018 (restarts); Carlini & Wagner, S&P 2017 (the margin).
"""

from __future__ import annotations

import torch
from torch import Tensor

from advmoe.attacks.autoattack import square_part
from advmoe.attacks.base import Attack, AttackPart, Proposals
from advmoe.attacks.pgd import Predict, pgd
from advmoe.attacks.routed.ascent import stride
from advmoe.threat import ThreatModel


def restarts_attack(
    predict: Predict, *, threat: ThreatModel, restarts: int, steps: int, step_size: float, queries: int = 0
) -> Attack:
    """PGD on `predict` from so many random starts, half on the margin and half on cross-entropy; then Square.

    Each start takes `steps` gradient steps of `step_size`, in pixels of [0, 1], or longer ones where these could not
    cross the ball (`stride`). 0 `queries` leave Square out. The attack's name says how many gradient steps an image
    takes that withstands it.
    """
    size = stride(step_size, steps, threat.eps)

    def climbing(loss: str, restarts: int) -> AttackPart:
        def run(x: Tensor, y: Tensor, seed: int) -> Proposals:
            generator = torch.Generator().manual_seed(seed)
            return Proposals(
                pgd(predict, x, y, threat=threat, steps=steps, step_size=size, restarts=restarts, loss=loss,
                    generator=generator)
            )  # fmt: skip

        return AttackPart(loss, run)

    shares = {"margin": -(-restarts // 2), "ce": restarts // 2}
    parts = [climbing(loss, share) for loss, share in shares.items() if share]
    if queries:
        parts.append(square_part(predict, threat=threat, queries=queries))
    settings = {"steps": steps, "step_size": size, "restarts": shares, "queries": queries}
    return Attack(f"restarts-{restarts * steps}", tuple(parts), settings)
