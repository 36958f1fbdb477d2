"""The geometry of the threat model: projection, starts, steps."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from advmoe.threat import ThreatModel, rand_like, randn_like

NORMS = ["linf", "l2"]


def lengths(delta, norm):
    return delta.flatten(1).norm(p=math.inf if norm == "linf" else 2, dim=1)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    norm=st.sampled_from(NORMS),
    eps=st.floats(0, 1),
    seed=st.integers(0, 2**31),
    spread=st.sampled_from([1e-3, 0.1, 3.0]),
)
def test_a_projection_is_allowed_idempotent_and_leaves_allowed_images_alone(norm, eps, seed, spread):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(3, 2, 4, 4, generator=generator)
    x[0] = x[0].round()  # corners of the pixel range
    x_adv = x + spread * torch.randn(x.shape, generator=generator)
    threat = ThreatModel(norm, eps)
    projected = threat.project(x_adv, x)
    assert projected.min() >= 0 and projected.max() <= 1
    assert (lengths(projected - x, norm) <= eps + 1e-6).all()
    torch.testing.assert_close(threat.project(projected, x), projected, atol=1e-6, rtol=0)
    # The inner of two balls: what lies in it is already allowed in the outer one.
    inner = ThreatModel(norm, eps / 2).project(x_adv, x)
    torch.testing.assert_close(threat.project(inner, x), inner, atol=1e-6, rtol=0)


def test_linf_projection_by_hand():
    x = torch.tensor([0.50, 0.50, 0.50, 0.95, 0.05]).view(1, 1, 1, 5)
    x_adv = torch.tensor([0.70, 0.45, 0.10, 1.20, -0.3]).view(1, 1, 1, 5)
    # eps 0.1: cut to +0.1; inside; cut to -0.1; cut to 1 (not 1.05); cut to 0 (not -0.05).
    expected = torch.tensor([0.60, 0.45, 0.40, 1.00, 0.00]).view(1, 1, 1, 5)
    torch.testing.assert_close(ThreatModel("linf", 0.1).project(x_adv, x), expected)


def test_l2_projection_by_hand():
    # Two samples of two pixels. The first moves by (0.3, 0.4), norm 0.5, and is scaled by 0.25/0.5 to (0.15, 0.2);
    # the second by (0.06, -0.08), norm 0.1 < 0.25, and stays.
    x = torch.tensor([[0.5, 0.5], [0.5, 0.5]]).view(2, 1, 1, 2)
    x_adv = torch.tensor([[0.8, 0.9], [0.56, 0.42]]).view(2, 1, 1, 2)
    expected = torch.tensor([[0.65, 0.7], [0.56, 0.42]]).view(2, 1, 1, 2)
    torch.testing.assert_close(ThreatModel("l2", 0.25).project(x_adv, x), expected)
    # At the edge the ball comes first, then the range: (0.9, 0.5) + 0.25 * (0.6, 0.8) = (1.05, 0.7) -> (1, 0.7).
    x, x_adv = torch.tensor([0.9, 0.5]).view(1, 1, 1, 2), torch.tensor([1.2, 0.9]).view(1, 1, 1, 2)
    torch.testing.assert_close(ThreatModel("l2", 0.25).project(x_adv, x).flatten(), torch.tensor([1.0, 0.7]))


@pytest.mark.parametrize("norm", NORMS)
def test_random_starts_lie_in_the_ball_and_fill_it(norm):
    threat = ThreatModel(norm, 0.2)
    x = torch.full((400, 1, 1, 2), 0.5)
    start = threat.random_start(x, torch.Generator().manual_seed(0))
    delta = start - x
    assert (lengths(delta, norm) <= 0.2 + 1e-6).all()
    # Uniform in two dimensions: the ball of half the radius holds a quarter of the draws (sd 2 %).
    assert (lengths(delta, norm) < 0.1).float().mean().item() == pytest.approx(0.25, abs=0.07)
    assert delta.mean().abs() < 0.02
    edges = torch.tensor([0.0, 1.0]).repeat(100, 1).view(100, 1, 1, 2)
    start = threat.random_start(edges, torch.Generator().manual_seed(1))
    assert start.min() == 0 and start.max() == 1 and (lengths(start - edges, norm) <= 0.2 + 1e-6).all()


@pytest.mark.parametrize("norm", NORMS)
def test_draws_follow_the_generator(norm):
    x = torch.rand(2, 3, 4, 4)
    first, again, other = (
        ThreatModel(norm, 0.1).random_start(x, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    for draw in (rand_like, randn_like):
        assert draw(x.double(), None).dtype == torch.double
        assert torch.equal(*(draw(x, torch.Generator().manual_seed(3)) for _ in range(2)))


@pytest.mark.parametrize("scale", [1e-36, 1e-25, 1e-3, 1.0, 1e6])
def test_steepest_steps_have_unit_norm_however_small_the_gradient(scale):
    gradient = torch.tensor([[3.0, -4.0], [0.0, 2.0]]).view(2, 1, 1, 2) * scale
    # linf: the signs; l2: (3, -4)/5 and (0, 2)/2.
    linf, l2 = (ThreatModel(norm, 0.1).steepest_step(gradient).view(2, 2) for norm in NORMS)
    torch.testing.assert_close(linf, torch.tensor([[1.0, -1.0], [0.0, 1.0]]))
    torch.testing.assert_close(l2, torch.tensor([[0.6, -0.8], [0.0, 1.0]]))


@pytest.mark.parametrize("norm", NORMS)
def test_no_gradient_is_no_step(norm):
    assert torch.equal(ThreatModel(norm, 0.1).steepest_step(torch.zeros(1, 1, 2, 2)), torch.zeros(1, 1, 2, 2))


@pytest.mark.parametrize("norm", NORMS)
def test_a_ball_of_radius_0_holds_the_image_alone(norm):
    threat = ThreatModel(norm, 0)
    x = torch.rand(3, 1, 4, 4)
    assert torch.equal(threat.project(x + torch.randn_like(x), x), x)
    assert torch.equal(threat.random_start(x), x)


def test_one_for_each_radius_from_small_to_large():
    assert ThreatModel.ascending("l2", [2, 0.5, 0.5]) == [ThreatModel("l2", 0.5), ThreatModel("l2", 2)]
    for norm, epsilons, told in (
        ("l2", [], "[]"), ("l2", "0.1", "'0.1'"), ("l2", 0.1, "0.1"), ("l2", [0.1, -1], "-1"),
        ("linf", [0.1, 1.5], "1.5"), ("l2", [math.nan], "nan"), ("l2", ["8/255"], "'8/255'"), ("l2", [True], "True"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"^epsilons must ") as error:
            ThreatModel.ascending(norm, epsilons)
        assert str(error.value).endswith(f", got {told}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("l1", 0.1), "threat.norm must be linf or l2, got 'l1'"),
        (("linf", -0.1), "threat.eps must be >= 0 and, in linf, <= 1, got -0.1"),
        (("linf", 1.5), "threat.eps must be >= 0 and, in linf, <= 1, got 1.5"),
        (("l2", math.inf), "threat.eps must be >= 0 and, in linf, <= 1, got inf"),
        (("l2", math.nan), "threat.eps must be >= 0 and, in linf, <= 1, got nan"),
    ],
)
def test_errors_name_field_rule_and_value(arguments, message):
    with pytest.raises(ValueError) as error:
        ThreatModel(*arguments)
    assert str(error.value) == message


def test_an_l2_ball_may_be_wider_than_the_pixel_range():
    assert ThreatModel("l2", 3.0).eps == 3.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [0, 1e-7, 1e-3, 1, 1e4])
def test_half_precision_has_the_norms_of_fp32(dtype, scale):
    threat, generator = ThreatModel("l2", 0.5), torch.Generator().manual_seed(0)
    gradient = (scale * torch.randn(3, 3, 8, 8, generator=generator)).to(dtype)
    gradient[1] = 0
    x = torch.rand(3, 3, 8, 8, generator=generator).to(dtype)
    step = threat.steepest_step(gradient)
    assert step.dtype == dtype and torch.equal(step, threat.steepest_step(gradient.float()).to(dtype))
    assert not step[1].any() and (scale == 0 or (lengths(step.float(), "l2")[[0, 2]] - 1).abs().max() < 0.01)
    for x_adv in (x, x + step, x + 100 * step):
        projected = threat.project(x_adv, x)
        assert projected.dtype == dtype and torch.equal(projected, threat.project(x_adv.float(), x.float()).to(dtype))
    start = threat.random_start(x, generator)
    assert start.dtype == dtype and start.isfinite().all()
    assert (lengths(start.float() - x.float(), "l2") < 0.51 + 0.1 * (dtype == torch.bfloat16)).all()


@pytest.mark.parametrize("eps", ["8/255", "0.1", None, True, (0.1,)])
def test_a_radius_that_is_no_number_is_refused(eps):
    with pytest.raises(ValueError, match=r"^threat.eps must be a number, got "):
        ThreatModel("linf", eps)
    assert ThreatModel("linf", np.float32(0.25)).eps == 0.25


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_to_half_precision_leaves_no_ball(dtype):
    threat = ThreatModel("linf", 8 / 255)
    x = torch.rand(4, 3, 16, 16).to(dtype)
    x_adv = threat.project(x + torch.randn(x.shape).sign().to(dtype), x)
    far = (x_adv.double() - x.double()).abs().max().item()
    assert x_adv.dtype == dtype and 0.9 * threat.eps < far <= threat.eps


def test_a_fraction_is_a_radius():
    threat = ThreatModel("linf", Fraction(8, 255))
    assert threat.eps == 8 / 255 and threat == ThreatModel("linf", 8 / 255)
