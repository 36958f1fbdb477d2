"""How the inner attack sees the routing (`training.attack_routing`).

Axes: `N` batch, `C H W` image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from advmoe.config.fields import AttackRouting
from advmoe.moe.routing import soft_routing


def through(
    routing: AttackRouting,
    search: Callable[..., Tensor],
    predict: Callable[[Tensor], Tensor],
    x: Tensor,
    generator: torch.Generator,
    each: Mapping[str, Tensor | None],
) -> Tensor:
    """`search(predict, x, **each)`, adversarial pixels (N, C, H, W), on a network that is routed in training's way.

    Args:
        routing: `straight-through` asks `predict` as it is, `soft` mixes its experts, `mixed` draws one of the two for
            each image.
        each: what the search takes by name besides, a row for each image, or None.
    """
    if routing == "straight-through":
        return search(predict, x, **each)
    soft = soft_routing(predict)
    if routing == "soft":
        return search(soft, x, **each)
    x_adv = torch.empty_like(x)
    softly = torch.rand(len(x), generator=generator, device=generator.device).to(x.device) < 0.5
    for model, chosen in ((predict, ~softly), (soft, softly)):
        if len(index := chosen.nonzero()[:, 0]):
            part = x[index].contiguous(memory_format=torch.channels_last)
            x_adv[index] = search(model, part, **{k: None if v is None else v[index] for k, v in each.items()})
    return x_adv
