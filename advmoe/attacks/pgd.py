"""Projected gradient ascent: the one loop behind evaluation, training and attacks on routing; the loss plugs in.

Axes: `N` batch, `C` channels, `H W` size, `K` classes. Pixels, `eps` and `step_size` are in [0, 1].
Source: Madry et al., ICLR 2018 (the loop); Zhang et al., ICML 2019 (the KL ascent of TRADES).
"""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from advmoe.errors import InputError, require_whole
from advmoe.faults import label_fault, pixel_fault, require_attackable
from advmoe.progress import BRIEF, tracked
from advmoe.tables import Table
from advmoe.text import show
from advmoe.threat import ThreatModel, randn_like

Predict = Callable[[Tensor], Tensor]
"""(N, C, H, W) pixels -> (N, K) logits."""
AttackLoss = Callable[[Tensor], Tensor]
"""(N, K) logits of the current iterate -> scalar to ascend, a sum over samples."""


def ascend(
    objective: Callable[[Tensor], Tensor],
    x: Tensor,
    start: Tensor,
    *,
    threat: ThreatModel,
    step_sizes: Sequence[float],
    visit: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Steepest-ascent steps of `objective` from `start`, each projected to the ball around the clean images `x`.

    Args:
        objective: the iterate (N, C, H, W) -> the scalar to ascend, a sum over samples. Where it does not depend on the
            iterate at all, the gradient is zero and the iterate stays.
        x, start: (N, C, H, W) in [0, 1].
        step_sizes: of each step, in the unit of pixels.
        visit: `(step, iterate)`, called for every iterate that has been evaluated, hence all but the last.

    Returns (N, C, H, W), detached. Gradients of parameters are neither computed nor touched.
    """
    x_adv = start.detach()
    for step, size in enumerate(tracked(step_sizes, "steps", unit="step", delay=BRIEF)):
        x_adv.requires_grad_(True)
        with torch.enable_grad():
            value = objective(x_adv)
        gradient = None
        if value.requires_grad:
            (gradient,) = torch.autograd.grad(value, x_adv, allow_unused=True)
        x_adv = x_adv.detach()
        if visit is not None:
            visit(step, x_adv)
        if gradient is not None:
            gradient = gradient.nan_to_num(0, 0, 0)  # else one overflow would end an image's attack for good
            x_adv = threat.project(x_adv + size * threat.steepest_step(gradient), x)
    return x_adv


def cross_entropy_loss(labels: Tensor) -> AttackLoss:
    """The untargeted attack's loss: cross-entropy with the true `labels`, (N,)."""
    return lambda logits: F.cross_entropy(logits.float(), labels, reduction="sum")


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """Largest wrong logit less the true one (Carlini & Wagner, 2017), (N,) for (N, K) and `labels` (N,)."""
    logits = logits.float()
    true = F.one_hot(labels, logits.shape[1]).bool()
    return logits.masked_fill(true, -torch.inf).amax(1) - logits[true]


def margin_loss(labels: Tensor) -> AttackLoss:
    """The margin by which the true classes `labels` (N,) lose: unlike cross-entropy it does not saturate."""
    return lambda logits: margins(logits, labels).sum()


def probability_margin_loss(labels: Tensor) -> AttackLoss:
    """The margin of probabilities, max_{j != y} p_j - p_y for p = softmax(logits) and `labels` (N,) as y: -1 where the
    true class is certain, 1 where a wrong one is. Source: arXiv:2411.15210 (PMA).
    """
    return lambda logits: margins(logits.float().softmax(1), labels).sum()


def dlr_loss(labels: Tensor) -> AttackLoss:
    """Difference of logits ratio (Croce & Hein, ICML 2020, eq. 6): the margin over the largest logit's lead on the
    third, so that neither a shift nor a scale of the logits changes it. Needs at least 3 classes.
    """

    def loss(logits: Tensor) -> Tensor:
        if logits.shape[1] < 3:
            raise InputError(f"loss dlr must have at least 3 classes, got {logits.shape[1]}")
        top = logits.float().topk(3, 1).values
        return (margins(logits, labels) / (top[:, 0] - top[:, 2] + 1e-12)).sum()

    return loss


def kl_loss(clean_logits: Tensor) -> AttackLoss:
    """TRADES' inner objective: KL(clean || adversarial), from log-probabilities on both sides.

    With `softmax` as the target an underflowing probability would have gradient 0 * log 0 = NaN.
    """
    target = F.log_softmax(clean_logits.detach().float(), 1)
    return lambda logits: F.kl_div(F.log_softmax(logits.float(), 1), target, reduction="sum", log_target=True)


def _from_clean(forward: Predict, x: Tensor) -> AttackLoss:
    with torch.no_grad():
        return kl_loss(forward(x))


@dataclass(frozen=True)
class Loss:
    """What an attack may ascend."""

    at: Callable[[Predict, Tensor, Tensor], AttackLoss]
    """`(forward, x, labels)`, clean images (N, C, H, W) and true classes (N,), -> the loss of logits to ascend."""
    from_labels: bool = True
    """Whether it leads away from the true class; `routed` searches among such."""
    scale_free: bool = False
    """Whether a scale of the logits leaves it as it is."""
    searched: bool = True
    """Whether `routed` tries it, if it is `from_labels`."""
    least_classes: int = 2

    @staticmethod
    def of(function: Callable[[Tensor, Tensor], Tensor], *, from_labels: bool = True, least_classes: int = 2) -> Loss:
        """The loss that `function`, (logits (N, K), classes (N,)) -> (N,), gives each image."""

        def at(forward: Predict, x: Tensor, labels: Tensor) -> AttackLoss:
            def total(logits: Tensor) -> Tensor:
                each = function(logits, labels)
                if not isinstance(each, Tensor) or each.shape != labels.shape:
                    got = f"shape {tuple(each.shape)}" if isinstance(each, Tensor) else f"a {type(each).__name__}"
                    raise InputError(f"a loss must give each image a number, {tuple(labels.shape)}, got {got}")
                return each.sum()

            return total

        return Loss(at, from_labels=from_labels, least_classes=least_classes)


LOSSES: Table[Loss] = Table(
    "loss",
    {
        "ce": Loss(lambda forward, x, labels: cross_entropy_loss(labels)),
        "margin": Loss(lambda forward, x, labels: margin_loss(labels)),
        "dlr": Loss(lambda forward, x, labels: dlr_loss(labels), scale_free=True, least_classes=3),
        "kl": Loss(lambda forward, x, labels: _from_clean(forward, x), from_labels=False),
        "pma": Loss(lambda forward, x, labels: probability_margin_loss(labels), searched=False),
    },
)


def pgd(
    predict: Predict,
    x: Tensor,
    y: Tensor,
    *,
    threat: ThreatModel,
    steps: int = 50,
    step_size: float = 2 / 255,
    restarts: int = 1,
    loss: str | Callable[[Tensor, Tensor], Tensor] = "ce",
    surrogate: Predict | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Adversarial examples for `predict` by PGD with uniform random starts.

    Args:
        predict: the classifier as deployed, (N, C, H, W) pixels -> (N, K) logits; it decides what counts as a success.
        x: clean images, (N, C, H, W) in [0, 1]. y: true classes, (N,).
        surrogate: takes `predict`'s place where gradients are needed (a routed model under soft routing, say).
        restarts: only examples that every earlier start failed on are attacked again.
        loss: a name of `LOSSES`: cross-entropy, margin, difference of logits ratio, KL from the clean prediction, or
            margin of probabilities; or a function (logits (N, K), classes (N,)) -> (N,) to ascend.
        generator: source of the random starts.

    Returns (N, C, H, W), detached: the last iterate of the first start that fools `predict`, or of the last start.
    Warns where no gradient reaches the pixels, so that random starts are all that is tried.
    Raises `ValueError` for pixels outside [0, 1], empty input, classes that do not match the images or the logits, no
    `ThreatModel`, fewer than one step or restart, or within `torch.inference_mode`, which has no gradients.
    """
    _require_steps(steps, step_size)
    require_whole("restarts", restarts, 1)
    require_attackable(x, y, threat)
    x, y = x.detach(), y.to(x.device, torch.long)
    chosen = Loss.of(loss) if callable(loss) else LOSSES.find(loss)
    predict, own = _checked("predict", predict, y), predict
    forward = predict if surrogate in (None, own) else _checked("surrogate", surrogate, y)

    def climb(clean: Tensor, labels: Tensor) -> Tensor:
        start = threat.random_start(clean, generator)
        of_logits = chosen.at(forward, clean, labels)
        return ascend(
            lambda x_adv: _felt(of_logits(forward(x_adv))), clean, start, threat=threat, step_sizes=[step_size] * steps
        )

    result = x.clone()
    unbroken = torch.arange(len(x), device=x.device)
    for _ in range(restarts):
        labels = y[unbroken]
        result[unbroken] = x_adv = climb(x[unbroken], labels)
        if restarts > 1:
            with torch.no_grad():
                unbroken = unbroken[predict(x_adv).argmax(1) == labels]
            if len(unbroken) == 0:
                break
    return result


def _require_steps(steps: object, step_size: object) -> None:
    """Raise `InputError` for what is no number of steps, or no size, and where nothing has a gradient."""
    require_whole("steps", steps, 1)
    number = isinstance(step_size, numbers.Real) and not isinstance(step_size, bool)
    if not (number and math.isfinite(float(step_size)) and float(step_size) >= 0):  # type: ignore[arg-type]
        raise InputError(f"step_size must be a number >= 0, got {show(step_size)}")
    if torch.is_inference_mode_enabled():
        rule = "an attack must be made outside torch.inference_mode, which has no gradients"
        raise InputError(f"{rule}, got inside (torch.no_grad does no harm)")


def _felt(value: Tensor) -> Tensor:
    """An attack's `value`; warns where it has no gradient."""
    if not value.requires_grad:
        warnings.warn("no gradient reaches the pixels: the attack is its random start alone", stacklevel=2)
    return value


def _checked(name: str, network: Predict, y: Tensor) -> Predict:
    """`network`, called `name`, whose answers are looked at: logits (N, K) of N images, where K has room for `y`."""
    highest = int(y.max())

    def answer(x: Tensor) -> Tensor:
        logits = network(x)
        if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(x):
            got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
            raise InputError(f"{name} must make logits (N, K) of {len(x)} images, got {got}")
        if highest >= logits.shape[1]:
            raise InputError(str(label_fault(y, len(y), logits.shape[1])))
        return logits

    return answer


def _fp32(device: torch.device) -> AbstractContextManager[None]:
    """Inside, no autocast. TF32 stays: emulated on three zoo models, two steps reach 0.99 to 1.01 of fp32's KL."""
    return torch.autocast(device.type, enabled=False)


def trades_attack(
    predict: Predict,
    x: Tensor,
    *,
    threat: ThreatModel,
    steps: int,
    step_size: float,
    generator: torch.Generator | None = None,
    held: Tensor | None = None,
    labels: Tensor | None = None,
    uniform: bool = False,
    target: Tensor | None = None,
) -> Tensor:
    """TRADES' inner maximisation: KL(f(x) || f(x_adv)) ascended from x + 0.001 * N(0, 1), each step projected; with
    `labels` and `uniform` that of Madry et al.

    Args:
        predict: pixels (N, C, H, W) -> logits (N, K). It should be in eval mode: a model inside `training.frozen`.
        x: clean pixels in [0, 1], (N, C, H, W).
        threat: the ball, in the unit of pixels. steps: K. step_size: of each, in the unit of pixels.
        generator: source of the noise.
        held: perturbations of an earlier attack, (N, C, H, W), which this one goes on from where they are not 0.
        labels: true classes, (N,); the cross-entropy with these is ascended in place of the KL.
        uniform: start from a uniform draw from the ball, not from noise on the image.
        target: logits (N, K) in the place of f(x): a teacher's.

    Under autocast the clean logits and the first step are in fp32 all the same: so close to the clean image the KL is
    all rounding in bf16, and its gradient points elsewhere.

    Returns adversarial pixels (N, C, H, W), detached. Parameters get no gradients. Warns and raises as `pgd` does; on
    other devices than the CPU, whose host would wait, pixels are not looked at.

    Source: Zhang et al., ICML 2019, Algorithm 1; `held`: ATTA, Zheng et al., CVPR 2020; `labels`: Madry et al., ICLR
    2018; `target`: RSLAD, Zi et al., ICCV 2021.
    """
    _require_steps(steps, step_size)
    if not isinstance(threat, ThreatModel):
        raise InputError(f"threat must be a ThreatModel(norm, eps), got {show(threat)}")
    if x.device.type == "cpu" and not torch.compiler.is_compiling() and (fault := pixel_fault(x)) is not None:
        raise InputError(fault)
    x = x.detach()
    if labels is not None:
        loss = cross_entropy_loss(labels)
    else:
        with torch.no_grad(), _fp32(x.device):
            loss = kl_loss(predict(x) if target is None else target)
    delta = threat.random_start(x, generator) - x if uniform else 0.001 * randn_like(x, generator)
    if held is not None:
        delta = torch.where(held == 0, delta, held)
    climb, sizes = partial(ascend, lambda x_adv: _felt(loss(predict(x_adv))), x, threat=threat), [step_size] * steps
    with _fp32(x.device):
        first = climb(threat.project(x + delta, x), step_sizes=sizes[:1])
    return climb(first, step_sizes=sizes[1:])
