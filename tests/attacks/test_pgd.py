"""PGD and TRADES' inner step against optima known by hand and loops written out."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import advmoe
from advmoe.attacks import ascend, cross_entropy_loss, kl_loss, margin_loss, pgd, probability_margin_loss, trades_attack
from advmoe.threat import ThreatModel

LINF, L2 = ThreatModel("linf", 0.1), ThreatModel("l2", 0.5)
W = torch.tensor([[1.0, -2.0, 0.0], [2.0, 2.0, -1.0]])  # logit k of pixels p is W[k] . p


def linear(x):
    return x.flatten(1) @ W.T


def pixels(*rows):
    return torch.tensor(rows).view(len(rows), 1, 1, -1)


class Recorder:
    """`predict`, noting for every call how many examples came and whether gradients were wanted."""

    def __init__(self, predict):
        self.predict, self.calls = predict, []

    def __call__(self, x):
        self.calls.append((len(x), torch.is_grad_enabled() and x.requires_grad))
        return self.predict(x)


@pytest.mark.parametrize("loss", ["ce", "margin", "pma"])
def test_linf_optimum_of_a_linear_model(loss):
    # With two classes both losses rise with (W[1] - W[0]) . delta = (1, 4, -1) . delta where class 0 is true, and with
    # its opposite where class 1 is: the optimum is eps * sign, cut at the pixel range.
    x, y = pixels([0.5, 0.5, 0.5], [0.5, 0.5, 0.5], [0.95, 0.5, 0.02]), torch.tensor([0, 1, 0])
    expected = pixels([0.6, 0.6, 0.4], [0.4, 0.4, 0.6], [1.0, 0.6, 0.0])
    x_adv = pgd(linear, x, y, threat=LINF, steps=20, step_size=0.02, loss=loss)
    torch.testing.assert_close(x_adv, expected)


def test_l2_optimum_of_a_linear_model():
    # eps * (1, 4, -1) / sqrt(18), which stays inside [0, 1].
    x, y = pixels([0.5, 0.5, 0.5], [0.5, 0.5, 0.5]), torch.tensor([0, 1])
    direction = torch.tensor([1.0, 4.0, -1.0]) / math.sqrt(18)
    expected = torch.stack([0.5 + 0.45 * direction, 0.5 - 0.45 * direction]).view(2, 1, 1, 3)
    x_adv = pgd(linear, x, y, threat=ThreatModel("l2", 0.45), steps=60, step_size=0.1)
    torch.testing.assert_close(x_adv, expected, atol=1e-4, rtol=0)


def test_losses_by_hand():
    logits, labels = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 1.0]]), torch.tensor([0, 2])
    # Margins: 1 - 2 and 3 - 1. Cross-entropies: log(e^2 + 1 + e) - 2 and log(1 + e^3 + e) - 1.
    assert margin_loss(labels)(logits).item() == pytest.approx(-1 + 2)
    e = math.e
    expected = math.log(e**2 + 1 + e) - 2 + math.log(1 + e**3 + e) - 1
    assert cross_entropy_loss(labels)(logits).item() == pytest.approx(expected, rel=1e-6)
    # KL of (2/3, 1/3) against (1/2, 1/2): log 2 - H(1/3).
    clean, adversarial = torch.tensor([[math.log(2), 0.0]]), torch.zeros(1, 2)
    expected = 2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3)
    assert kl_loss(clean)(adversarial).item() == pytest.approx(expected, rel=1e-5)


def test_restarts_attack_only_what_is_unbroken():
    # The score of class 1 is pixel 0 less 0.55. Within eps 0.1 of 0.5 it can be made positive, within 0.1 of 0.2 not.
    def predict(x):
        score = x.flatten(1)[:, :1] - 0.55
        return torch.cat([-score, score], 1)

    x, y = pixels([0.5], [0.2], [0.5], [0.3]), torch.zeros(4, dtype=torch.long)
    recorder = Recorder(predict)
    x_adv = pgd(recorder, x, y, threat=LINF, steps=5, step_size=0.05, restarts=3)
    # Each start: 5 steps with gradients, then scoring without; examples 1 and 3 are left after the first.
    assert recorder.calls == [(4, True)] * 5 + [(4, False)] + ([(2, True)] * 5 + [(2, False)]) * 2
    assert predict(x_adv).argmax(1).tolist() == [1, 0, 1, 0]
    recorder = Recorder(predict)
    pgd(recorder, x[::2], y[::2], threat=LINF, steps=5, step_size=0.05, restarts=3)
    assert len(recorder.calls) == 6  # all broken: no second start


def test_restarts_keep_the_first_success():
    x, y = pixels([0.5, 0.5, 0.5], [0.5, 0.5, 0.5]), torch.tensor([1, 1])

    def always_class_0(x):
        return torch.cat([0 * x.flatten(1)[:, :1] + 1, 0 * x.flatten(1)[:, :1]], 1)

    once, thrice = (
        pgd(always_class_0, x, y, threat=LINF, steps=1, restarts=restarts, generator=torch.Generator().manual_seed(0))
        for restarts in (1, 3)
    )
    assert torch.equal(once, thrice)  # the first start's example fools the model and stays


def test_the_surrogate_gives_gradients_and_predict_the_score():
    x, y = pixels([0.5, 0.5, 0.5], [0.5, 0.5, 0.5]), torch.tensor([0, 1])
    deployed, surrogate = Recorder(linear), Recorder(lambda x: -linear(x))
    x_adv = pgd(deployed, x, y, threat=LINF, steps=10, step_size=0.05, restarts=2, surrogate=surrogate)
    assert all(wanted for _, wanted in surrogate.calls) and len(surrogate.calls) == 20
    # The surrogate's ascent is the model's descent. Clean logits are (-0.5, 1.5): class 1. Example 0 (true class 0) is
    # wrong under every perturbation, so the first start settles it; example 1 never breaks.
    assert deployed.calls == [(2, False), (1, False)]
    torch.testing.assert_close(x_adv[1], pixels([0.6, 0.6, 0.4])[0])


def test_the_generator_decides_the_starts():
    x, y = torch.rand(4, 1, 1, 3), torch.zeros(4, dtype=torch.long)
    first, again, other = (
        pgd(linear, x, y, threat=L2, steps=1, step_size=0.01, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_the_model_and_its_input_are_left_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    model[1].bias.requires_grad_(False)
    model[3].weight.grad = torch.full((2, 4), 7.0)
    x = torch.rand(5, 1, 1, 3)
    before, y = x.clone(), torch.zeros(5, dtype=torch.long)
    for x_adv in (
        pgd(model, x, y, threat=LINF, steps=2, restarts=2),
        trades_attack(model, x, threat=LINF, steps=2, step_size=0.05),
    ):
        assert not x_adv.requires_grad and x_adv.grad_fn is None and not torch.equal(x_adv, before)
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]
    assert [p.grad is None for p in model.parameters()] == [True, True, False, True]
    assert (model[3].weight.grad == 7).all()
    assert torch.equal(x, before) and not x.requires_grad and x.grad is None


@pytest.mark.parametrize("threat", [LINF, L2], ids=["linf", "l2"])
def test_trades_attack_is_the_loop_written_out(threat):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3))
    x = torch.rand(6, 3, 2, 2)
    got = trades_attack(model, x, threat=threat, steps=3, step_size=0.06, generator=torch.Generator().manual_seed(5))

    target = model(x).softmax(1).detach()
    x_adv = x + 0.001 * torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    for _ in range(3):
        x_adv = x_adv.detach().requires_grad_()
        kl = (target * (target.log() - model(x_adv).softmax(1).log())).sum()
        kl.backward()
        if threat.norm == "linf":
            x_adv = x_adv.detach() + 0.06 * x_adv.grad.sign()
            x_adv = x + (x_adv - x).clamp(-0.1, 0.1)
        else:
            x_adv = x_adv.detach() + 0.06 * F.normalize(x_adv.grad.flatten(1)).view_as(x)
            delta = x_adv - x
            x_adv = x + delta / (delta.flatten(1).norm(dim=1) / 0.5).clamp(min=1).view(-1, 1, 1, 1)
        x_adv = x_adv.clamp(0, 1)
    # So close to the clean image the KL's gradient is rounding-prone.
    torch.testing.assert_close(got, x_adv, atol=1e-4, rtol=0)
    assert ((got - x).abs().amax((1, 2, 3)) > 0.05).all()


def test_the_margin_of_probabilities_by_hand():
    p = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2]])
    logits = (p.log() + torch.tensor([[7.0], [-3.0]])).requires_grad_()  # a shift changes no probability
    value = probability_margin_loss(torch.tensor([0, 2]))(logits)
    assert value.item() == pytest.approx((0.3 - 0.5) + (0.5 - 0.2))
    value.backward()
    # d(p_j - p_y)/dz_k = p_j ([j = k] - p_k) - p_y ([y = k] - p_k); here j = 1, y = 0, and then j = 0, y = 2.
    expected = [[-0.15 - 0.25, 0.21 + 0.15, -0.06 + 0.1], [0.25 + 0.1, -0.15 + 0.06, -0.1 - 0.16]]
    assert logits.grad.tolist() == [pytest.approx(row) for row in expected]


def test_ascent_by_hand():
    # The objective rises with pixel 0 and falls with pixel 1; the third step ends at the edge of the ball.
    x, seen = pixels([0.5, 0.5]), []
    x_adv = ascend(
        lambda z: (z.flatten(1) @ torch.tensor([3.0, -2.0])).sum(), x, x, threat=LINF, step_sizes=[0.06, 0.03, 0.05],
        visit=lambda step, z: seen.append((step, z.flatten().tolist())),
    )  # fmt: skip
    assert [step for step, _ in seen] == [0, 1, 2] and not x_adv.requires_grad
    for (_, visited), expected in zip(seen, ([0.5, 0.5], [0.56, 0.44], [0.59, 0.41]), strict=True):
        assert visited == pytest.approx(expected)
    assert x_adv.flatten().tolist() == pytest.approx([0.6, 0.4])
    assert torch.equal(ascend(lambda z: torch.zeros(()), x, x, threat=LINF, step_sizes=[0.1] * 2), x)  # no gradient


@pytest.mark.parametrize("threat", [LINF, L2], ids=["linf", "l2"])
def test_trades_attack_goes_on_from_what_is_held(threat):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3))
    x, settings = torch.rand(6, 3, 2, 2), {"threat": threat, "steps": 1, "step_size": 0.02}
    earlier = 0.3 * torch.rand(x.shape) - 0.15
    earlier[:2] = 0
    got = trades_attack(model, x, **settings, generator=torch.Generator().manual_seed(5), held=earlier)
    # Where there was no earlier one this is the attack from noise, image by image.
    fresh = trades_attack(model, x, **settings, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(got[:2], fresh[:2], atol=1e-6, rtol=0)
    # Elsewhere it is one step from there, as a longer attack would take it, projected first.
    start = threat.project(x + earlier, x)[2:]
    kl = kl_loss(model(x[2:]))
    loop = ascend(lambda z: kl(model(z)), x[2:], start, threat=threat, step_sizes=[0.02])
    torch.testing.assert_close(got[2:], loop, atol=1e-6, rtol=0)
    assert ((got - x)[2:] - (start - x[2:])).abs().max() <= 0.02 + 1e-6
    assert ((got - fresh)[2:].abs().amax((1, 2, 3)) > 0.05).all()


def test_kl_stays_finite_where_a_softmax_target_does_not():
    clean, adversarial = torch.tensor([[200.0, -200.0]]), torch.tensor([[-200.0, 200.0]], requires_grad=True)
    kl_loss(clean)(adversarial).backward()
    # d/dz KL(p || softmax(z)) = softmax(z) - p, with softmax(z) = (0, 1) and p = (1, 0).
    assert adversarial.grad.tolist() == [[-1.0, 1.0]]
    # The common form, whose target is a probability that underflows to 0: 0 * log 0 where gradient reaches the target.
    both = torch.tensor([[200.0, -200.0]], requires_grad=True)
    F.kl_div(F.log_softmax(adversarial.detach(), 1), both.softmax(1), reduction="sum").backward()
    assert both.grad.isnan().any()


def test_pgd_breaks_a_saturated_model_in_l2():
    # At a margin of 40 the gradient is about e^-40 = 4e-18, far below what a floor on its norm would swallow.
    def predict(x):
        return 20 * linear(x)

    x, y = pixels([0.5, 0.5, 0.5]), torch.tensor([1])  # margin 2.0 at distance 2 / sqrt(18) = 0.4714
    x_adv = pgd(predict, x, y, threat=L2, steps=30, step_size=0.1, generator=torch.Generator().manual_seed(0))
    assert linear(x_adv).argmax(1).item() == 0


GOOD = {"x": torch.rand(2, 1, 1, 3), "y": torch.zeros(2, dtype=torch.long)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.empty(0, 1, 1, 3), "y": torch.empty(0, dtype=torch.long)}, r"images .* got \(0, 1, 1, 3\)"),
        ({"y": torch.zeros(3, dtype=torch.long)}, r"labels must be of shape \(2,\), .* got \(3,\)"),
        ({"y": torch.tensor([0, 2])}, r"labels must lie in 0\.\.1, got 2 for image 1"),
        ({"y": torch.tensor([-1, 0])}, r"labels must lie in 0\.\.K-1, got -1 for image 0"),
        ({"y": torch.tensor([0.5, 1.0])}, "labels must be integers"),
        ({"x": pixels([0.0, 0.5, 1.5], [0.0, 0.5, -0.25])}, r"in \[0, 1\], got values from -0.25 to 1.5"),
        ({"x": pixels([0.0, math.nan, 1.0], [0.0, 0.5, 0.5])}, r"in \[0, 1\], got NaN in image 0"),
        ({"x": torch.zeros(2, 1, 1, 3, dtype=torch.uint8)}, "floating-point"),
        ({"x": [[0.5]]}, "x and y must be tensors, got list and Tensor"),
        ({"threat": ("linf", 0.1)}, r"threat must be a ThreatModel\(norm, eps\), got \('linf', 0.1\)"),
        ({"predict": lambda x: x.sum((1, 2, 3))}, r"^predict must make logits \(N, K\) of 2 images, got shape \(2,\)"),
        ({"predict": lambda x: None}, "^predict must make logits .* got a NoneType"),
        ({"predict": lambda x: linear(x[:1])}, r"^predict must make logits .* got shape \(1, 2\)"),
        ({"predict": lambda x: x.sum((1, 2, 3)), "loss": "kl"}, "^predict must make logits"),
        ({"surrogate": lambda x: x.sum((1, 2, 3))}, "^surrogate must make logits"),
        ({"predict": lambda x: x.sum((1, 2, 3)), "surrogate": linear, "restarts": 2}, "^predict must make logits"),
        ({"loss": "hinge"}, "loss must be one of ce, margin, dlr, kl, pma, got 'hinge'"),
        ({"loss": "dlr"}, "loss dlr must have at least 3 classes, got 2"),
        ({"steps": 0}, "steps must be a whole number >= 1, got 0"),
        ({"steps": 2.5}, "steps must be a whole number >= 1, got 2.5"),
        ({"restarts": 0}, "restarts must be a whole number >= 1, got 0"),
        ({"step_size": "2/255"}, "step_size must be a number >= 0, got '2/255'"),
        ({"step_size": math.nan}, "step_size must be a number >= 0, got nan"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        pgd(**{"predict": linear, "threat": LINF, **GOOD, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": GOOD["x"] - 1}, r"pixels must lie in \[0, 1\], got values from -"),
        ({"threat": 0.1}, r"threat must be a ThreatModel\(norm, eps\), got 0.1"),
        ({"steps": -1}, "steps must be a whole number >= 1, got -1"),
        ({"step_size": math.nan}, "step_size must be a number >= 0, got nan"),
    ],
)
def test_the_training_attack_s_bad_input_is_named(change, message):
    given = {"predict": linear, "x": GOOD["x"], "threat": LINF, "steps": 2, "step_size": 0.1, **change}
    with pytest.raises(ValueError, match=message):
        trades_attack(**given)


@pytest.mark.parametrize("attack", [trades_attack, partial(pgd, y=GOOD["y"])], ids=["training", "pgd"])
def test_an_attack_without_gradients_is_not_silent(attack):
    how = {"x": GOOD["x"], "threat": LINF, "steps": 2, "step_size": 0.1}
    with torch.inference_mode(), pytest.raises(ValueError, match=r"^an attack must be made outside torch"):
        attack(linear, **how)
    with pytest.warns(UserWarning, match="no gradient reaches the pixels"):
        attack(torch.no_grad()(linear), **how)
    wanted = GOOD["x"].clone().requires_grad_()
    assert not attack(linear, **{**how, "x": wanted}).requires_grad and wanted.grad is None


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.int16])
def test_classes_of_any_integer_type(dtype):
    x, y = GOOD["x"], torch.tensor([0, 1])
    expected, found = (
        pgd(linear, x, labels, threat=LINF, steps=2, generator=torch.Generator().manual_seed(0))
        for labels in (y, y.to(dtype))
    )
    assert torch.equal(expected, found)


def test_the_first_step_is_fp32_s_under_autocast():
    # So close to the clean image the KL of a trained model is all rounding in bf16.
    model = advmoe.load("zoo:at-s-dense").requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    light, shapes = torch.rand(32, 3, 1, 1, generator=generator), torch.rand(32, 3, 8, 8, generator=generator)
    x = 0.3 * light + 0.7 * F.interpolate(shapes, 32, mode="bilinear")
    threat = ThreatModel("linf", 8 / 255)

    def in_bf16_alone():
        with torch.no_grad():
            loss = kl_loss(model(x))
        start = threat.project(x + 0.001 * torch.randn(x.shape, generator=torch.Generator().manual_seed(3)), x)
        return ascend(lambda z: loss(model(z)), x, start, threat=threat, step_sizes=[5 / 255] * 2)

    def attacked():
        noise = torch.Generator().manual_seed(3)
        return trades_attack(model, x, threat=threat, steps=2, step_size=5 / 255, generator=noise)

    def reached(x_adv):
        with torch.no_grad():
            return kl_loss(model(x))(model(x_adv)).item()

    full = reached(attacked())
    with torch.autocast("cpu", torch.bfloat16):
        ours, alone = attacked(), in_bf16_alone()
    assert reached(ours) == pytest.approx(full, rel=0.02)
    assert reached(alone) < 0.97 * full


@pytest.mark.parametrize("uniform", [False, True])
def test_the_attack_of_training_ascends_the_cross_entropy_with_labels(uniform):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    x, y, seeds = torch.rand(5, 3, 2, 2), torch.arange(5) % 3, [torch.Generator().manual_seed(5) for _ in range(2)]
    got = trades_attack(model, x, threat=LINF, steps=2, step_size=0.02, generator=seeds[0], labels=y, uniform=uniform)
    noise = 0.001 * torch.randn(x.shape, generator=seeds[1])
    start = LINF.random_start(x, seeds[1].manual_seed(5)) if uniform else LINF.project(x + noise, x)
    loss = cross_entropy_loss(y)
    expected = ascend(lambda x_adv: loss(model(x_adv)), x, start, threat=LINF, step_sizes=[0.02] * 2)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)  # x + (start - x) rounds
    assert F.cross_entropy(model(got), y) > F.cross_entropy(model(x), y)
    assert bool(((got - x).abs() > 0.05).any()) == uniform  # two steps alone reach 0.041
