"""What every attack and every loss promises: a new entry of the tables is tested by being there.

Axes: `N` images, `K` classes. Pixels and eps are in [0, 1].
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advmoe.attacks.pgd import LOSSES, Loss, margins
from advmoe.attacks.routed import Combination, RoutedPlan
from advmoe.config import AttackConfig, Pixels
from advmoe.evaluation.harness import Job
from advmoe.evaluation.scoring import correct, measuring
from advmoe.evaluation.suite import ATTACKS, Setting, build
from advmoe.moe import MoEConv2d, pathway
from advmoe.threat import ThreatModel

CLASSES, IMAGES, BATCH = 5, 8, 4
THREATS = {"linf": ThreatModel("linf", 0.03), "l2": ThreatModel("l2", 0.25)}
PLAN = RoutedPlan(best=Combination(weight=0.1), tried=(), examples=0, reached=2, pathways=((0,), (1,)))
"""What `routed` knows beforehand of a model with one MoE layer of two experts."""


def names() -> list[str]:
    """Every attack: the table's, PGD with every loss, restarts, and AutoAttack's parts alone."""
    losses = [f"pgd-3{'' if loss == 'ce' else f'-{loss}'}" for loss in LOSSES]
    parts = [f"autoattack:{part}" for part in ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")]
    return [*ATTACKS, *losses, "pgd-3-soft", "restarts-6", *parts]


class Routed(nn.Module):
    """One MoE layer of two experts and a linear classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = MoEConv2d(3, 4, 3, 2, 1, bank_rows=8, num_experts=2, layer=0)
        self.classifier = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.layer(x - 0.5).relu().flatten(1))
        return 3 * logits


def images(n: int) -> Tensor:
    """Images (N, 3, 8, 8) in [0, 1] that differ in brightness and colour."""
    return 0.6 * torch.rand(n, 3, 1, 1) + 0.4 * torch.rand(n, 3, 8, 8)


@cache
def problem() -> tuple[nn.Module, Tensor, Tensor]:
    """A model, images (N, 3, 8, 8) and classes (N,): the model's own, but for two images that it has wrong."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model, x = Routed(), images(IMAGES)
        for _ in range(20):
            model(images(32))
        router = model.eval().layer.router
        router.scores.bias -= router(x - 0.5).mean(0)  # neither expert is ahead of the other
        y = model(x).argmax(1)
    y[[1, 6]] = (y[[1, 6]] + 1) % CLASSES
    return model, x, y


@dataclass(frozen=True)
class Case:
    """An attack by name, within a ball."""

    name: str
    norm: str = "linf"

    def __str__(self) -> str:
        return f"{self.name}-{self.norm}"

    def job(self) -> Job:
        _, x, y = problem()
        attack = AttackConfig(steps=3, step_size=Pixels(0.02), restarts=2, queries=20)
        setting = Setting(threat=THREATS[self.norm], attack=attack, routed=True)
        return Job(data=(x, y), setting=setting, batch_size=BATCH, seed=3, plan=PLAN)

    @cache  # noqa: B019 - as many as there are attacks
    def outcomes(self, *, reverse: bool = False) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
        """Whether each image is robust, its predicted class and its adversarial image, by the batch's position."""
        job, (model, x, y) = self.job(), problem()
        tasks, found = list(job.tasks([self.name])), {}
        with measuring(model, torch.device("cpu")):
            for task in reversed(tasks) if reverse else tasks:
                at = job.examples(task)
                _, outcome = job.run(task, model, x[at], y[at])
                found[task.first] = (outcome.robust, outcome.predicted, outcome.x_adv)
        return found


# The checks: each takes a case, and raises AssertionError where it breaks the promise.


def proposals_stay_in_the_ball(case: Case) -> None:
    """What each part proposes lies in the ball around its image and in [0, 1], without being brought back."""
    (model, x, y), setting = problem(), case.job().setting
    with measuring(model, torch.device("cpu")):
        for part in build(case.name, model, setting, PLAN).parts:
            x_adv = part.run(x, y, 7).x_adv
            assert x_adv.shape == x.shape and x_adv.min() >= 0 and x_adv.max() <= 1
            torch.testing.assert_close(x_adv, setting.threat.project(x_adv, x), rtol=0, atol=1e-5)


def accuracy_never_rises(case: Case) -> None:
    """An image that is wrong without an attack is not attacked and counts as wrong; the rest is the model's answer."""
    model, x, y = problem()
    robust, predicted, x_adv = map(torch.cat, zip(*case.outcomes().values(), strict=True))
    with measuring(model, torch.device("cpu")), torch.no_grad():
        right = correct(model(x), y)
        torch.testing.assert_close(model(x_adv).argmax(1), predicted)
    assert 0 < right.sum() < len(right)
    assert not (robust & ~right).any() and robust.equal(right & (predicted == y))
    assert x_adv[~right].equal(x[~right])


def batches_are_independent(case: Case) -> None:
    """A batch ends in the same way whichever batches came before it, and whatever else has drawn random numbers."""
    first, before = case.outcomes(), torch.get_rng_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        again = case.outcomes(reverse=True)
    assert torch.get_rng_state().equal(before)
    for position, tensors in first.items():
        assert all(one.equal(other) for one, other in zip(tensors, again[position], strict=True))


CHECKS = [proposals_stay_in_the_ball, accuracy_never_rises, batches_are_independent]


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    """The official ensembles iterate less."""
    official = pytest.importorskip("pyautoattack")
    complete = official.AutoAttack.__init__

    def init(ensemble, *args, **options):
        complete(ensemble, *args, **options)
        ensemble.apgd.n_iter = ensemble.apgd_targeted.n_iter = ensemble.fab.n_iter = 3
        ensemble.apgd.n_restarts = ensemble.fab.n_restarts = 1
        ensemble.apgd.eot_iter = ensemble.apgd_targeted.eot_iter = 1
        ensemble.square.n_queries = 20

    monkeypatch.setattr(official.AutoAttack, "__init__", init)


@pytest.mark.parametrize("norm", THREATS)
@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("check", CHECKS)
def test_every_attack(check, name, norm):
    check(Case(name, norm))


def test_the_images_are_neither_all_robust_nor_all_broken_and_take_both_experts():
    robust, *_ = map(torch.cat, zip(*Case("pgd-3").outcomes().values(), strict=True))
    assert 0 < robust.sum() < IMAGES - 2
    model, x, _ = problem()
    assert pathway(model, x).unique().tolist() == [0, 1]


# Losses


def logits_and_labels(n: int = 6) -> tuple[Tensor, Tensor]:
    """Logits (N, K) that are right: DLR has no gradient where the true class is third."""
    logits = 3 * torch.randn(n, CLASSES, generator=torch.Generator().manual_seed(0))
    return logits, logits.argmax(1)


def of_logits(loss: Loss, logits: Tensor, labels: Tensor) -> tuple[float, Tensor]:
    """The loss, and its gradient (N, K), of logits whose clean images had others."""
    clean = logits.flip(1)
    objective = loss.at(lambda x: x, clean, labels)
    logits = logits.clone().requires_grad_()
    value = objective(logits)
    (gradient,) = torch.autograd.grad(value, logits)
    return float(value.detach()), gradient


def images_are_summed_up(loss: Loss) -> None:
    """The loss is the sum of those of images alone, so that no image's gradient depends on the rest of the batch."""
    logits, labels = logits_and_labels()
    value, gradient = of_logits(loss, logits, labels)
    alone = [of_logits(loss, logits[i : i + 1], labels[i : i + 1]) for i in range(len(logits))]
    torch.testing.assert_close(gradient, torch.cat([each for _, each in alone]))
    assert value == pytest.approx(sum(each for each, _ in alone), rel=1e-5)
    assert gradient.abs().amax(1).min() > 0


def gradients_are_finite(loss: Loss) -> None:
    """Logits of any size have a gradient, and the loss is taken in fp32 whatever they are in."""
    logits, labels = logits_and_labels()
    for scale in (1e-4, 1.0, 1e4):
        value, gradient = of_logits(loss, scale * logits, labels)
        assert abs(value) < float("inf") and gradient.isfinite().all()
    value, _ = of_logits(loss, logits.bfloat16(), labels)
    assert value == pytest.approx(of_logits(loss, logits.bfloat16().float(), labels)[0], rel=1e-5)


def facts_are_true(loss: Loss) -> None:
    """What the entry says of the loss: whether it is of labels, and whether logits' scale changes it."""
    logits, labels = logits_and_labels()
    value, gradient = of_logits(loss, logits, labels)
    if loss.from_labels:  # it falls as the true logit rises
        assert gradient.gather(1, labels[:, None]).max() < 0
    else:
        assert of_logits(loss, logits, (labels + 1) % CLASSES)[0] == value
    assert (of_logits(loss, 3 * logits, labels)[0] == pytest.approx(value, rel=1e-5)) == loss.scale_free
    fewest = F.pad(logits, (0, loss.least_classes - CLASSES)), labels % loss.least_classes
    assert of_logits(loss, *fewest)[1].isfinite().all()


LOSS_CHECKS = [images_are_summed_up, gradients_are_finite, facts_are_true]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("check", LOSS_CHECKS)
def test_every_loss(check, name):
    check(LOSSES[name])


# Faults, which are caught


@dataclass(frozen=True)
class Planted:
    """PGD whose proposals are then changed: `changed(x_adv, x, threat)`."""

    changed: Callable[[Tensor, Tensor, ThreatModel], Tensor]
    for_routed = False
    least_classes = 2

    def named(self, setting):
        return "planted"

    def steps(self, setting):
        return 1

    def build(self, predict, setting, plan):
        attack = build("pgd-3", predict, setting, plan)
        (part,) = attack.parts

        def run(x, y, seed):
            proposals = part.run(x, y, seed)
            return replace(proposals, x_adv=self.changed(proposals.x_adv, x, setting.threat))

        return replace(attack, parts=(replace(part, run=run),))


OUTSIDE = Planted(lambda x_adv, x, threat: x + 2 * (x_adv - x))
UNSEEDED = Planted(lambda x_adv, x, threat: threat.random_start(x))


@pytest.mark.parametrize(
    ("form", "check"), [(OUTSIDE, proposals_stay_in_the_ball), (UNSEEDED, batches_are_independent)]
)
def test_an_attack_with_a_fault_is_caught(monkeypatch, form, check):
    monkeypatch.setitem(ATTACKS, "planted", form)
    with pytest.raises(AssertionError):
        check(Case("planted"))


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        (
            Loss(lambda forward, x, labels: lambda z: margins(z - z.mean(0), labels).square().sum()),
            images_are_summed_up,
        ),
        (
            Loss(lambda forward, x, labels: lambda z: (z.exp().sum(1) - z.gather(1, labels[:, None])[:, 0]).sum()),
            gradients_are_finite,
        ),
        (replace(LOSSES["ce"], scale_free=True), facts_are_true),
    ],
)
def test_a_loss_with_a_fault_is_caught(fault, check):
    with pytest.raises(AssertionError):
        check(fault)
