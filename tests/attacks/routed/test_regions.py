"""What an attacker can reach: radii on paper, choices that no attack flips, and a flip that plain PGD misses."""

import pytest
import torch
from torch.nn import functional as F

from advmoe.attacks.pgd import pgd
from advmoe.attacks.routed import Halfspaces, Pass, RoutedTarget
from advmoe.attacks.routed.regions import distances, inside_regions, radii, reachable, region
from advmoe.threat import ThreatModel

LINF, L2 = ThreatModel("linf", 8 / 255), ThreatModel("l2", 0.3)


def space(weights, thresholds, layers=(0,), slack=0.0):
    weights = torch.tensor(weights, dtype=torch.float64).view(len(thresholds), 1, 2, 2)
    thresholds = torch.tensor(thresholds, dtype=torch.float64)
    return Halfspaces(weights, thresholds, torch.tensor(layers), torch.full_like(thresholds, slack))


def images(*pixels):
    return torch.tensor(pixels).view(len(pixels), 1, 2, 2)


def drawn(bits=1, side=4, number=64):
    generator = torch.Generator().manual_seed(5)
    weights = torch.randn(bits, 3, side, side, generator=generator, dtype=torch.float64)
    x = torch.rand(number, 3, side, side, generator=generator)
    thresholds = (x.double().flatten(1) @ weights.flatten(1).T).median(0).values
    slack = 1e-5 * weights.flatten(1).abs().sum(1)
    return Halfspaces(weights, thresholds, torch.arange(bits), slack), x


BY_HAND = [
    # w . x - t = 0.6, downwards: the first pixel, of weight 2, stops at 0 after 0.1; 0.4 are left to the second.
    ((0.1, 0.9, 0.3, 0.3), 0.4, 0.17**0.5),
    # -0.3, upwards and far from 1: 0.3 / 3, and 0.3 / sqrt(5).
    ((0.0, 0.2, 0.3, 0.3), 0.1, 0.3 / 5**0.5),
    # At the threshold itself.
    ((0.125, 0.25, 1.0, 0.0), 0.0, 0.0),
]


@pytest.mark.parametrize(("pixels", "linf", "l2"), BY_HAND)
def test_radii_of_two_by_two_pixels(pixels, linf, l2):
    plane = space([[2, 1, 0, 0]], [0.5])
    assert radii(plane, images(pixels), "linf").item() == pytest.approx(linf, abs=1e-7)
    assert radii(plane, images(pixels), "l2").item() == pytest.approx(l2, abs=1e-7)


def test_what_no_pixels_reach():
    plane = space([[1, 0, 0, 0]], [1.5])
    assert radii(plane, images((0.5, 0, 0, 0)), "linf").item() == torch.inf
    assert radii(plane, images((0.5, 0, 0, 0)), "l2").item() == torch.inf


def test_rounding_is_taken_off_what_is_proved():
    plane = space([[2, 1, 0, 0]], [0.5], slack=0.03)
    x = images((0.0, 0.2, 0.3, 0.3), (0.125, 0.25, 0, 0))
    assert radii(plane, x, "linf", proved=True)[:, 0].tolist() == pytest.approx([0.27 / 3, 0])


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_smallest_perturbation_reaches_and_no_smaller_one_does(norm):
    plane, x = drawn()
    exact = radii(plane, x, norm)[:, 0]
    side = distances(plane, x)[:, 0] > 0
    for factor, reached in ((0.99, False), (1.01, True)):
        for index in (exact > 0.005).nonzero()[::8, 0].tolist():  # not the median image, which lies at the threshold
            one = x[index : index + 1]
            threat = ThreatModel(norm, float(factor * exact[index]))
            across = region(plane, one, ~side[index : index + 1, None], threat)
            assert bool(across.holds(across.inside, one).all()) == reached


@pytest.mark.parametrize("threat", [LINF, L2], ids=lambda each: each.norm)
def test_no_perturbation_flips_a_proved_choice(threat):
    plane, x = drawn()
    side = distances(plane, x)[:, 0] > 0
    proved = radii(plane, x, threat.norm, proved=True)[:, 0] > threat.eps
    assert 0 < proved.sum() < len(x)
    towards = torch.where(side, -1.0, 1.0)[:, None, None, None] * plane.weights.float()
    worst = threat.project(x + 100 * threat.steepest_step(towards), x)
    flipped = (distances(plane, worst)[:, 0] > 0) != side
    assert not (flipped & proved).any()
    if threat.norm == "linf":  # where this is the worst perturbation
        assert flipped.equal(~proved)
    for seed in range(20):
        near = threat.random_start(x, torch.Generator().manual_seed(seed))
        assert not (((distances(plane, near)[:, 0] > 0) != side) & proved).any()


@pytest.mark.parametrize("threat", [ThreatModel("linf", 0.1), ThreatModel("l2", 0.6)], ids=lambda each: each.norm)
def test_a_projection_lies_in_ball_pixels_and_half_spaces(threat):
    plane, x = drawn(bits=2)
    own = distances(plane, x) > 0
    for flipped, able in reachable(plane, x, threat):
        sides = own[able] ^ torch.tensor(flipped)
        within = region(plane, x[able], sides, threat)
        found = within.holds(within.inside, x[able])
        far = x[able] + torch.randn(x[able].shape, generator=torch.Generator().manual_seed(0))
        z = within.project(far, x[able])
        assert found.float().mean() > 0.9  # of two bits that share pixels, a few cannot be flipped together
        assert ((distances(plane, z) > 0) == sides)[found].all()
        assert z.min() >= 0 and z.max() <= 1
        assert ((z - threat.project(z, x[able])).abs().amax((1, 2, 3))[found] < 1e-6).all()


def test_what_is_reachable_of_two_bits():
    # The first bit is 0.01 from its threshold, the second 0.4.
    plane = space([[1, 0, 0, 0], [0, 1, 0, 0]], [0.5, 0.5], layers=(0, 1))
    x = images((0.51, 0.9, 0, 0))
    able = {flipped: bool(which) for flipped, which in reachable(plane, x, LINF)}
    assert able == {(False, False): True, (True, False): True, (False, True): False, (True, True): False}


class Switch:
    """Expert 0 answers 0 whatever it sees, expert 1 answers 1: only a flip of the choice fools, without a gradient."""

    def __init__(self, plane):
        self.plane = plane

    def __call__(self, x, *, temperature=None, forced=None):
        chosen = (distances(self.plane, x) > 0).long() if forced is None else forced
        return Pass(F.one_hot(chosen[:, 0], 2).float() + 0 * x.sum((1, 2, 3))[:, None], (), chosen)


def test_a_planted_flip_is_found_that_plain_pgd_misses():
    plane = space([[1, -1, 1, -1]], [0.0], slack=1e-7)
    x = images((0.5, 0.51, 0.5, 0.5 + 0.104), (0.5, 0.51, 0.5, 0.5 + 0.13))  # 0.114 and 0.14 of the 4 eps = 0.125
    y, model = torch.zeros(2, dtype=torch.long), Switch(plane)

    def predict(x):
        return model(x).logits

    plain = pgd(predict, x, y, threat=LINF, steps=20, step_size=2 / 255, generator=torch.Generator().manual_seed(0))
    assert predict(plain).argmax(1).tolist() == [0, 0]
    target = RoutedTarget(model, predict, LINF, plane)
    found, fooled = inside_regions(target, x, y, [2 / 255] * 3, torch.Generator().manual_seed(0))
    assert fooled.tolist() == [True, False]
    assert predict(LINF.project(found, x)).argmax(1).tolist() == [1, 0]
