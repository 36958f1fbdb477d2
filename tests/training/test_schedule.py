"""The learning rate's course, and which images make which batch."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from advmoe.config import TrainingConfig
from advmoe.training.schedule import batches, cosine, one_cycle, rate, tenths


def test_cosine_by_hand():
    # cos(0) = 1, cos(pi/3) = 1/2, cos(pi/2) = 0, cos(pi) = -1.
    assert [cosine(step, 6) for step in (0, 2, 3, 6)] == pytest.approx([1, 0.75, 0.5, 0])
    values = [cosine(step, 100) for step in range(101)]
    assert values == sorted(values, reverse=True)
    assert cosine(25, 100) == pytest.approx((1 + math.sqrt(0.5)) / 2)


def test_one_cycle_and_tenths_by_hand():
    # The middles of five iterations are at 0.1, 0.3, 0.5, 0.7, 0.9; up to 0.4, down from there.
    assert [one_cycle(step, 5) for step in range(5)] == pytest.approx([0.25, 0.75, 0.5 / 0.6, 0.5, 0.1 / 0.6])
    assert [tenths(step, 8) for step in range(8)] == pytest.approx([1] * 4 + [0.1] * 2 + [0.01] * 2)


@pytest.mark.parametrize(("schedule", "course"), [("cosine", cosine), ("one-cycle", one_cycle), ("step", tenths)])
def test_a_run_s_rate_is_its_schedule_s(schedule, course):
    training = TrainingConfig(epochs=4, schedule=schedule)
    assert [rate(training, step, 3) for step in range(12)] == [course(step, 12) for step in range(12)]


@pytest.mark.parametrize(("schedule", "course"), [("cosine", cosine), ("step", tenths)])
def test_a_rate_that_warms_up_leaves_the_rest_to_its_schedule(schedule, course):
    training = TrainingConfig(epochs=3, schedule=schedule, warmup_epochs=1)
    assert [rate(training, step, 4) for step in range(4)] == [0.25, 0.5, 0.75, 1]
    assert [rate(training, step, 4) for step in range(4, 12)] == [course(step, 8) for step in range(8)]


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    num_images=st.integers(1, 300),
    batch_size=st.integers(1, 150),
    levels=st.integers(1, 3),
    seed=st.integers(0, 99),
    epoch=st.integers(0, 9),
)
def test_batches_hold_each_image_at_most_once_per_level(num_images, batch_size, levels, seed, epoch):
    plan = batches(num_images, batch_size, seed=seed, epoch=epoch, levels=levels)
    size = min(batch_size, num_images)
    assert len(plan) == num_images // size
    for level in range(levels):
        seen = torch.cat([iteration[level] for iteration in plan])
        assert len(seen) == len(plan) * size == len(seen.unique())
        assert seen.min() >= 0 and seen.max() < num_images
    if levels * size <= num_images:
        for iteration in plan:
            assert len(torch.cat(iteration).unique()) == levels * size  # no image shared within an iteration


def test_order_follows_seed_and_epoch():
    def flat(**kwargs):
        return torch.cat([torch.cat(i) for i in batches(100, 10, levels=2, **kwargs)])

    reference = flat(seed=0, epoch=0)
    assert torch.equal(reference, flat(seed=0, epoch=0))
    assert not torch.equal(reference, flat(seed=0, epoch=1))
    assert not torch.equal(reference, flat(seed=1, epoch=0))
    assert not torch.equal(reference[:10], torch.arange(10))


def test_levels_take_different_batches_that_cover_the_same_images():
    plan = batches(60, 10, seed=0, epoch=0, levels=2)
    lower, upper = (torch.cat([iteration[level] for iteration in plan]) for level in (0, 1))
    assert torch.equal(lower.sort().values, torch.arange(60)) and torch.equal(upper.sort().values, torch.arange(60))
    for first, second in plan:
        assert not set(first.tolist()) & set(second.tolist())


def test_one_level_is_the_same_whatever_the_others():
    # A method's first level sees the images in the order of a method with one level.
    alone, pair = batches(50, 8, seed=1, epoch=2), batches(50, 8, seed=1, epoch=2, levels=2)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(alone, pair, strict=True))


def test_a_cosine_ends_at_its_total():
    assert cosine(0, 10) == 1 and abs(cosine(10, 10)) < 1e-12
    for step, total in ((15, 10), (-1, 10), (0, 0)):
        with pytest.raises(ValueError, match=r"^step must be from 0 to total="):
            cosine(step, total)
