"""What is minimised: named terms, so that a log or an error can say which one went wrong.

Axes: `N` batch, `C` channels, `H W` size, `K` classes, `E` experts, `L` MoE layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from advmoe.config import Codes, TrainingConfig
from advmoe.errors import InputError
from advmoe.moe.halfspace import HalfspaceRouter
from advmoe.moe.routing import Routing, route
from advmoe.seeding import generator_for
from advmoe.threat import ThreatModel

Terms = dict[str, Tensor]
"""Scalar terms by name; what is minimised is their sum."""


def cross_entropy(
    model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, smoothing: float = 0.0
) -> tuple[Terms, Routing, Tensor]:
    """Cross-entropy: standard training's loss on clean images, PGD-AT's (Madry et al., ICLR 2018, eq. 2.1) on attacked
    ones.

    Args:
        model: (N, C, H, W) -> logits (N, K). x: pixels in [0, 1], (N, C, H, W). y: classes, (N,).
        smoothing: share of the label that all classes have evenly (Szegedy et al., CVPR 2016).

    Returns the term by name, `{"ce": scalar}`, the routing of the pass, and the logits (N, K) in fp32.
    """
    with route() as routing:
        logits = model(x).float()
    return {"ce": F.cross_entropy(logits, y, label_smoothing=smoothing)}, routing, logits


def kl_divergence(clean_logits: Tensor, adversarial_logits: Tensor) -> Tensor:
    """KL(f(x) || f(x + delta)), mean over the batch, both sides as log-probabilities: finite gradients at any
    confidence.
    """
    clean, adversarial = F.log_softmax(clean_logits.float(), 1), F.log_softmax(adversarial_logits.float(), 1)
    return F.kl_div(adversarial, clean, reduction="batchmean", log_target=True)


def trades(
    model: Callable[[Tensor], Tensor], x: Tensor, x_adv: Tensor, y: Tensor, beta: float, smoothing: float = 0.0
) -> tuple[Terms, Routing, Routing, Tensor]:
    """CE(f(x), y) + beta * KL(f(x) || f(x_adv)): the loss of TRADES on images and attacked ones.

    Args:
        model: (N, C, H, W) -> logits (N, K); in train mode (`learning`).
        x, x_adv: clean and adversarial pixels in [0, 1], (N, C, H, W). y: classes, (N,).
        beta: weight of the KL term, 6 in both papers.
        smoothing: of the labels in CE, as of `cross_entropy`.

    Returns the terms by name, `{"ce": scalar, "kl": scalar}`, means over the batch, whose sum is minimised; the routing
    of the clean and of the adversarial pass; the clean logits (N, K) in fp32. Gradient flows through both arguments of
    the KL term, and both are log-probabilities: finite gradients at any confidence.

    Source: Zhang et al., ICML 2019, eq. 5; the AdvMoE paper's eq. (AT), beta = 1/lambda.
    """
    terms, clean_routing, logits = cross_entropy(model, x, y, smoothing)
    with route() as adversarial_routing:
        terms["kl"] = beta * kl_divergence(logits, model(x_adv))
    return terms, clean_routing, adversarial_routing, logits


def distillation(
    model: Callable[[Tensor], Tensor], x: Tensor, x_adv: Tensor, taught: Tensor, weight: float
) -> tuple[Terms, Routing, Routing, Tensor]:
    """(1 - weight) * KL(T(x) || f(x)) + weight * KL(T(x) || f(x_adv)): a teacher's soft labels in the place of classes.

    Args:
        model: the student f, (N, C, H, W) -> logits (N, K); in train mode (`learning`).
        x, x_adv: clean and adversarial pixels in [0, 1], (N, C, H, W). taught: the teacher's logits of `x`, (N, K).
        weight: of the term on attacked images, in [0, 1]; 5/6 in the authors' code.

    Returns what `trades` does, the terms as `{"clean_kl": scalar, "adv_kl": scalar}`; no gradient reaches the teacher.

    Source: RSLAD, Zi et al., ICCV 2021, at temperature 1. The authors' code averages over classes too: a K-th of this.
    """
    with route() as clean_routing:
        logits = model(x).float()
    terms = {"clean_kl": (1 - weight) * kl_divergence(taught, logits)}
    with route() as adversarial_routing:
        terms["adv_kl"] = weight * kl_divergence(taught, model(x_adv))
    return terms, clean_routing, adversarial_routing, logits


def robust(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    x_adv: Tensor,
    y: Tensor,
    training: TrainingConfig,
    taught: Tensor | None,
) -> tuple[Terms, Routing, Routing, Tensor]:
    """`trades` or, with what a teacher has `taught` of `x`, logits (N, K), `distillation`; weights are `training`'s."""
    if taught is None:
        return trades(model, x, x_adv, y, training.beta, training.label_smoothing)
    return distillation(model, x, x_adv, taught, training.distill_weight)


def balance_loss(routings: Sequence[Routing], weight: float) -> Tensor:
    """weight * E * sum_i f_i P_i, mean over MoE layers and `routings`: f_i the share of samples whose choice is expert
    i, P_i the mean of its gate probability (Fedus et al., JMLR 2022, eq. 4 to 6). It is `weight` where both are even,
    and E times that where one expert has all. Gradient flows through P alone.

    Samples are those of the batch on this process (tokens, where they are routed one by one).
    """
    losses = []
    for routing in routings:
        scores, experts = stacked_scores(routing)
        shares = F.one_hot(stacked_choices(routing), scores.shape[2]).float().mean(1)
        together = (shares * scores.softmax(2).mean(1)).sum(1)
        number = experts[0] if len(set(experts)) == 1 else together.new_tensor(experts)
        losses.append((number * together).mean())
    return weight * torch.stack(losses).mean()


def stacked_scores(routing: Routing) -> tuple[Tensor, list[int]]:
    """The scores of all MoE layers (L, N, E), in order, and each layer's number of experts.

    E is the most that a layer has, and at least 2. An expert that a layer does not have scores -inf.
    """
    scores = [routing.scores[layer].flatten(0, -2).float() for layer in sorted(routing.scores)]
    experts = [each.shape[1] for each in scores]
    most = max(2, *experts)
    wide = [F.pad(s, (0, most - e), value=-math.inf) if e < most else s for s, e in zip(scores, experts, strict=True)]
    return torch.stack(wide), experts


def stacked_choices(routing: Routing) -> Tensor:
    """The choices of all MoE layers, (L, N), in order."""
    return torch.stack([routing.choices[layer].flatten() for layer in sorted(routing.choices)])


def choice_margin_loss(routing: Routing, weight: float) -> Tensor:
    """weight * max(0, 1 - (chosen expert's score - runner-up's)), mean over samples and MoE layers: zero where every
    choice is clear by 1, so that an attack must move scores far to change it. The hinge of support vector machines
    (Crammer & Singer, JMLR 2001), with the choice itself as the class.
    """
    first, second = stacked_scores(routing)[0].topk(2, 2).values.unbind(2)
    return weight * (1 - (first - second)).relu().mean()


def routing_terms(passes: Sequence[Routing], balance: float, margin: float) -> Terms:
    """`balance_loss` of the `passes` and `choice_margin_loss` of the last, by name, each where its weight is not 0."""
    terms = {}
    if balance > 0:
        terms["balance"] = balance_loss(passes, balance)
    if margin > 0:
        terms["margin"] = choice_margin_loss(passes[-1], margin)
    return terms


def radius_loss(router: HalfspaceRouter, x: Tensor, threat: ThreatModel, weight: float) -> Tensor:
    """weight * max(0, 1 - radius / eps), mean over bits and images `x` (N, C, H, W): zero where every choice is proved
    at `threat.eps`, as if pixels could leave [0, 1] (`HalfspaceRouter.radii`).
    """
    return weight * (1 - router.radii(x, threat.norm) / threat.eps).relu().mean()


def codewords(codes: Codes, num_classes: int, num_experts: Sequence[int], seed: int) -> Tensor:
    """The table (K, L) of each class's codeword: one of the `num_experts` of each MoE layer.

    `mod`: class modulo N in every layer of N experts. `random`: every column a balanced random assignment, so that the
    pathway is an error-correcting code of the class.
    """
    if (most := max(num_experts)) > num_classes:
        raise InputError(f"model.num_experts must be <= the {num_classes} classes with codewords, got {most!r}")
    generator = generator_for(seed, "codewords")
    words = [torch.arange(num_classes)] * len(num_experts)
    if codes == "random":
        words = [torch.randperm(num_classes, generator=generator) for _ in num_experts]
    return torch.stack([word % experts for word, experts in zip(words, num_experts, strict=True)], 1)


def code_loss(routing: Routing, y: Tensor, table: Tensor, alpha: float) -> Tensor:
    """alpha times the cross-entropy of each layer's scores with the class's codeword, mean over layers and samples (and
    over tokens, where those are routed one by one: all of an image's have its codeword).
    """
    losses = []
    for layer, scores in sorted(routing.scores.items()):
        word = table[y, layer].view(-1, *[1] * (scores.dim() - 2)).expand(scores.shape[:-1])
        losses.append(F.cross_entropy(scores.flatten(0, -2), word.flatten()))
    return alpha * torch.stack(losses).mean()
