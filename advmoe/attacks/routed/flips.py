"""An attack on the choices alone: it counts once any layer chooses another expert, whatever the classifier says.

Axes: `N` batch, `C` channels, `H W` size, `E` experts, `L` MoE layers. Pixels and `eps` are in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from advmoe.attacks.pgd import ascend
from advmoe.attacks.routed.target import RoutedModel, hard_choice, router_margins
from advmoe.threat import ThreatModel


def changed_choices(
    model: RoutedModel,
    x: Tensor,
    *,
    threat: ThreatModel,
    sizes: Sequence[float],
    generator: torch.Generator | None = None,
) -> Tensor:
    """Whether an attack by steps of these `sizes` changes any choice of images `x` (N, C, H, W), (N,) booleans.

    It ascends against the layer that is nearest to another choice, from a random start. What counts is a pass without
    gradients.
    """
    with torch.no_grad():
        output = model(x)
    clean, several = output.pathway, [scores.shape[-1] > 1 for scores in output.scores]
    changed = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    if not any(several):
        return changed
    wanted = [column for column, free in zip(clean.unbind(1), several, strict=True) if free]

    def look(x_adv: Tensor) -> None:
        with torch.no_grad():
            changed.logical_or_((model(x_adv).pathway != clean).flatten(1).any(1))

    promising = changed

    def objective(x_adv: Tensor) -> Tensor:
        nonlocal promising
        scores = model(x_adv).scores
        promising = (hard_choice(scores) != clean).flatten(1).any(1)
        chosen = tuple(each for each, free in zip(scores, several, strict=True) if free)
        return -router_margins(chosen, torch.stack(wanted, 1)).flatten(1).amin(1).sum()

    def visit(step: int, x_adv: Tensor) -> None:
        if bool((promising & ~changed).any()):
            look(x_adv)

    start = threat.random_start(x, generator)
    look(ascend(objective, x, start, threat=threat, step_sizes=sizes, visit=visit))
    return changed
