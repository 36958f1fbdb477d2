"""Both ascents step by step: which iterate is kept, what routers are pulled and pushed by, and how strongly."""

import math

import pytest
import torch
from planted import WIDE, Planted, Toy, against_zero, opened, pixels, planted_images, seeded

from advmoe.attacks.routed import Combination, RoutedTarget, along_pathway, combined, step_sizes, stride


def test_step_sizes_by_hand():
    assert step_sizes("constant", 3, 0.01, 0.1) == [0.01] * 3
    half = math.sqrt(0.5)
    assert step_sizes("cosine", 4, 0.01, 0.1) == pytest.approx([0.2, 0.1 * (1 + half), 0.1, 0.1 * (1 - half)])
    for steps in (1, 2, 7, 50):
        sizes = step_sizes("cosine", steps, 0.01, 0.1)
        assert len(sizes) == steps and sizes[0] == pytest.approx(0.2) and min(sizes) > 0
        assert sum(sizes) == pytest.approx(0.1 * (steps + 1))  # the cosines other than cos(0) cancel
        assert sizes == sorted(sizes, reverse=True)


def test_steps_too_short_to_cross_the_ball_are_lengthened():
    assert stride(2 / 255, 20, 8 / 255) == 2 / 255
    assert stride(0.01, 10, 1.0) == 0.25


BAND = (0.435, 0.465)


def in_band(x):
    """A margin that rises everywhere in pixel 0, is positive in a band, and far below 0 elsewhere."""
    p = x[:, 0, 0, 0]
    return p - 10 + 20 * ((p > BAND[0]) & (p < BAND[1]))


def iterates(x, steps):
    """What ascent in pixel 0 by steps of 0.01 visits from the random starts of `seeded()`, (steps + 1, N)."""
    start = WIDE.random_start(x, seeded())[:, 0, 0, 0]
    return torch.stack([(start + 0.01 * step).clamp_max(0.6) for step in range(steps + 1)])


@pytest.mark.parametrize(
    ("how", "seen"),
    [("hard", range(11)), ("soft", (3, 7, 10)), ("own pathway", range(11)), ("other pathway", (3, 7, 10))],
)
def test_the_first_iterate_that_fools_is_kept(how, seen):
    x, y = torch.full((40, 1, 1, 1), 0.5), torch.zeros(40, dtype=torch.long)
    toy = Toy(lambda z: against_zero(in_band(z)), lambda z: against_zero(0 * z[:, 0, 0] - 1))
    arguments, sizes = (RoutedTarget(toy, lambda z: toy(z).logits, WIDE), x, y), [0.01] * 10
    if "pathway" in how:
        forced = torch.full((40, 1), int(how == "other pathway"))
        x_adv, fooled = along_pathway(*arguments, forced, sizes, seeded())
    else:
        combination = Combination(temperature=None if how == "hard" else 1.0)
        x_adv, fooled = combined(*arguments, combination, sizes, seeded())
    path = iterates(x, 10)[list(seen)]
    hits = (path > BAND[0]) & (path < BAND[1])
    expected = torch.where(hits.any(0), path[hits.int().argmax(0), torch.arange(40)], path[-1])
    assert fooled.tolist() == hits.any(0).tolist() and 5 < fooled.sum() < 35
    torch.testing.assert_close(x_adv[:, 0, 0, 0], expected)
    assert not hits[-1].all() and hits[-1].sum() < hits.any(0).sum()  # the last iterate alone would show fewer


def test_only_the_deployed_model_decides():
    x, y = torch.full((4, 1, 1, 1), 0.5), torch.zeros(4, dtype=torch.long)
    wrong = Toy(lambda z: against_zero(1 + z[:, 0, 0, 0]), lambda z: against_zero(z[:, 0, 0]))
    target = RoutedTarget(wrong, lambda z: torch.tensor([[1.0, 0.0]]).expand(len(z), 2), WIDE)
    assert combined(target, x, y, Combination(), [0.01] * 3)[1].tolist() == [False] * 4
    forced = torch.zeros(4, 1, dtype=torch.long)
    assert along_pathway(target, x, y, forced, [0.01] * 3)[1].tolist() == [False] * 4


def test_a_router_is_pulled_no_further_than_it_must():
    # Channel 0 moves the router alone, which chooses expert 1 above 0.53; channel 1 the classifier alone, which holds.
    x, y = pixels([0.5] * 20, [0.5] * 20), torch.ones(20, dtype=torch.long)
    toy = Toy(lambda z: against_zero(z[:, 1, 0, 0] + 1), lambda z: against_zero(z[:, 0, 0] - 0.53))
    target = RoutedTarget(toy, lambda z: toy(z).logits, WIDE)
    x_adv, fooled = along_pathway(target, x, y, torch.ones(20, 1, dtype=torch.long), [0.02] * 12, seeded())
    start = WIDE.random_start(x, seeded())[:, 0, 0, 0]
    missing = ((0.53 - start) / 0.02).ceil().clamp_min(0)
    torch.testing.assert_close(x_adv[:, 0, 0, 0], start + 0.02 * missing)
    torch.testing.assert_close(x_adv[:, 1, 0, 0], torch.full((20,), 0.4))  # down to the edge of the ball
    assert not fooled.any() and missing.min() == 0 and missing.max() > 3


@pytest.mark.parametrize(("anchor", "ends"), [("clean", (0.6, 0.6)), ("current", (0.48, 0.54))])
def test_routers_are_pushed_off_the_anchor(anchor, ends):
    # The router chooses expert 1 above 0.51; images at 0.5 start on expert 0. Pushed off the clean choice they go on to
    # the edge, pushed off the current one they turn back at the threshold. The classifier knows nothing of pixels.
    x, y = torch.full((20, 1, 1, 1), 0.5), torch.zeros(20, dtype=torch.long)
    toy = Toy(lambda z: against_zero(0 * z[:, 0, 0, 0] - 1), lambda z: against_zero(z[:, 0, 0] - 0.51))
    target = RoutedTarget(toy, lambda z: toy(z).logits, WIDE)
    x_adv, _ = combined(target, x, y, Combination(weight=1.0, anchor=anchor), [0.02] * 11, seeded())
    assert bool(((x_adv >= ends[0] - 1e-6) & (x_adv <= ends[1] + 1e-6)).all())


@pytest.mark.parametrize("loss", ["margin", "dlr"])
def test_scales_of_logits_and_scores_change_nothing(loss):
    torch.manual_seed(0)
    w, r = torch.randn(6, 4), torch.randn(6, 2 * 3)
    x, y = torch.rand(5, 6, 1, 1), torch.arange(5) % 4

    def attacked(logits, scores):
        toy = Toy(lambda z: logits * z.flatten(1) @ w, lambda z: (scores * z.flatten(1) @ r).unflatten(1, (2, 3)))
        target, sizes, generator = RoutedTarget(toy, lambda z: toy(z).logits, WIDE), [0.03] * 5, seeded()
        forced = torch.tensor([[0, 1]]).expand(5, 2)
        mixed = combined(target, x, y, Combination(loss=loss, weight=0.3), sizes, generator)
        return torch.cat([*mixed[:1], along_pathway(target, x, y, forced, sizes, generator)[0]])

    expected = attacked(1, 1)
    for logits, scores in ((2**14, 1), (1, 2**14), (2**-10, 2**6)):  # powers of two scale without rounding
        torch.testing.assert_close(attacked(logits, scores), expected)


def test_a_combination_in_words():
    assert str(Combination()) == "straight-through, margin, constant steps"
    mixed = Combination(temperature=0.3, loss="ce", weight=10.0, anchor="clean", schedule="cosine")
    assert str(mixed) == "soft T=0.3, ce + 10 x router margins (clean), cosine steps"


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_losses_that_pull_apart(no_straight_through, scale):
    # Class 1 loses where channel 1 falls, but expert 1, which answers the opposite, is chosen where it rises.
    x, y = planted_images(24)
    x, y = x[y == 1], y[y == 1]
    model = Planted(looks_at=1, threshold=0.815, scale=scale).requires_grad_(False)
    for weight in (0.1, 1.0, 10.0):
        _, fooled = combined(opened(model), x, y, Combination(weight=weight), [2 / 255] * 20)
        assert fooled.all()
