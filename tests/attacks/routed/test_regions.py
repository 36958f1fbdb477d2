"""What an attacker can reach: radii on paper, choices that no attack flips, and a flip that plain PGD misses."""

import pytest
import torch
from scipy import optimize
from torch.nn import functional as F

from advmoe.attacks.pgd import pgd
from advmoe.attacks.routed import Halfspaces, Pass, RoutedTarget
from advmoe.attacks.routed.regions import deepest, distances, inside_regions, radii, reachable, region
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


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_bit_is_unset_at_its_threshold_and_set_beyond_it(norm):
    plane, white = space([[0.25] * 4], [1.0]), images((1.0,) * 4)
    assert radii(plane, white, norm).item() == torch.inf  # not set, and nothing is brighter
    assert radii(plane, white, norm, own=torch.tensor([[True]])).item() == 0
    plane = space([[0.25] * 4], [0.0])
    assert radii(plane, images((0.0,) * 4), norm).item() == 0  # not set, and whatever is brighter sets it
    assert radii(plane, images((0.5,) * 4), "linf").item() == pytest.approx(0.5)  # black unsets it


def test_a_bit_that_rounding_has_the_other_way_is_judged_as_it_is():
    plane, x = space([[0.25] * 4], [1 - 1e-8], slack=1e-6), images((1.0,) * 4, (0.5,) * 4)
    unset = torch.tensor([[False], [False]])
    for rounding, half in ((-1, 0.5 - 1e-6), (0, 0.5), (1, torch.inf)):
        least = 0 if rounding < 0 else torch.inf
        found = radii(plane, x, "linf", own=unset, rounding=rounding)[:, 0].tolist()
        assert found == pytest.approx([least, half], abs=2e-8)


def test_rounding_is_taken_off_what_is_proved_and_added_to_what_is_changed():
    plane = space([[2, 1, 0, 0]], [0.5], slack=0.03)
    x = images((0.0, 0.2, 0.3, 0.3), (0.125, 0.25, 0, 0))
    assert radii(plane, x, "linf", rounding=-1)[:, 0].tolist() == pytest.approx([0.27 / 3, 0])
    assert radii(plane, x, "linf", rounding=1)[:, 0].tolist() == pytest.approx([0.33 / 3, 0.03 / 3])


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
    proved = radii(plane, x, threat.norm, rounding=-1)[:, 0] > threat.eps
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
        assert within.holds(within.inside, x[able]).all()
        far = x[able] + torch.randn(x[able].shape, generator=torch.Generator().manual_seed(0))
        z = within.project(far, x[able])
        assert ((distances(plane, z) > 0) == sides).all()
        assert z.min() >= 0 and z.max() <= 1
        assert ((z - threat.project(z, x[able])).abs().amax((1, 2, 3)) < 1e-6).all()


def test_what_is_reachable_of_two_bits():
    # The first bit is 0.01 from its threshold, the second 0.4.
    plane = space([[1, 0, 0, 0], [0, 1, 0, 0]], [0.5, 0.5], layers=(0, 1))
    x = images((0.51, 0.9, 0, 0))
    able = {flipped: bool(which) for flipped, which in reachable(plane, x, LINF)}
    assert able == {(False, False): True, (True, False): True, (False, True): False, (True, True): False}


def narrow(cosine, number=24):
    """Two bits of 4x4 pixels at an angle of that cosine, and images near both thresholds."""
    generator = torch.Generator().manual_seed(3)
    first, second = torch.randn(2, 16, generator=generator, dtype=torch.float64)
    second = second - first * (first @ second) / (first @ first)
    second = cosine * first / first.norm() + (1 - cosine**2) ** 0.5 * second / second.norm()
    weights = torch.stack([first / first.norm(), second]).view(2, 1, 4, 4)
    x = torch.rand(number, 1, 4, 4, generator=generator)
    thresholds = (x.double().flatten(1) @ weights.flatten(1).T).median(0).values
    return Halfspaces(weights, thresholds, torch.arange(2), torch.full((2,), 1e-7, dtype=torch.float64)), x


def best_by_linear_programme(plane, x, sides, eps):
    """The largest that the lesser of two signed distances can be, each in units of its ||w||_1."""
    size = plane.weights.flatten(1).abs().sum(1)
    rows = torch.where(sides, 1.0, -1.0)[:, None] * plane.weights.flatten(1) / size[:, None]
    limits = torch.where(sides, 1.0, -1.0) * plane.thresholds / size
    box = [(max(0.0, v - eps), min(1.0, v + eps)) for v in x.double().flatten().tolist()]
    table = torch.cat([-rows, torch.ones(2, 1)], 1).numpy()
    found = optimize.linprog([0.0] * 16 + [-1.0], A_ub=table, b_ub=-limits.numpy(), bounds=[*box, (None, None)])
    return -found.fun


@pytest.mark.parametrize("cosine", [0.0, 0.9, -0.95, 0.99])
def test_what_is_reachable_of_two_bits_is_what_a_linear_programme_says(cosine):
    plane, x = narrow(cosine)
    threat, own, seen = ThreatModel("linf", 0.1), distances(plane, x) > 0, set()
    for flipped, able in reachable(plane, x, threat):
        sides = own ^ torch.tensor(flipped)
        within = region(plane, x, sides, threat)
        deep = deepest(plane, x, sides, threat)[1]
        for i in range(len(x)):
            best = best_by_linear_programme(plane, x[i], sides[i], threat.eps)
            assert deep[i].item() == pytest.approx(best, abs=1e-6)
            assert bool(able[i]) == (best >= 0) or abs(best) < 1e-6
            seen.add((sum(flipped), best > 0))
        assert within.holds(within.inside, x)[deep > 1e-6].all()
    assert seen >= {(1, True), (1, False), (2, False)}


def test_two_bits_of_different_pixels_in_l2_by_hand():
    plane, x = space([[1, 0, 0, 0], [0, 1, 0, 0]], [0.5, 0.5], layers=(0, 1)), images((0.3, 0.3, 0.5, 0.5))
    for eps, both in ((0.21, False), (0.28, False), (0.29, True)):  # 0.2 each, 0.2 * 2 ** 0.5 for both
        able = {flipped: bool(which) for flipped, which in reachable(plane, x, ThreatModel("l2", eps))}
        assert able == {(False, False): True, (True, False): True, (False, True): True, (True, True): both}


def test_two_bits_in_l2_are_reached_by_no_random_search_where_they_are_not_reachable():
    plane, x = narrow(0.9)
    threat, own = ThreatModel("l2", 0.25), distances(plane, x) > 0
    for flipped, able in reachable(plane, x, threat):
        sides = own ^ torch.tensor(flipped)
        within = region(plane, x, sides, threat)
        assert within.holds(within.inside, x)[able].all()
        for seed in range(50):
            start = threat.random_start(x, torch.Generator().manual_seed(seed))
            towards = torch.rand(len(x), 2, 1, generator=torch.Generator().manual_seed(seed))
            step = (torch.where(sides, 1.0, -1.0)[:, :, None] * plane.weights.flatten(1) * towards).sum(1)
            far = threat.project(start + 100 * step.view_as(x).float(), x)
            assert not (((distances(plane, far) > 0) == sides).all(1) & ~able).any()


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
    for flipped, expected in ((False, [False, False]), (True, [True, False])):
        generator = torch.Generator().manual_seed(0)
        found, fooled = inside_regions(target, x, y, [2 / 255] * 3, flipped=flipped, generator=generator)
        assert fooled.tolist() == expected
    assert predict(LINF.project(found, x)).argmax(1).tolist() == [1, 0]
