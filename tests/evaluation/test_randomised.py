"""Models that answer otherwise in each pass: what their mean over draws is, and that an evaluation by it repeats."""

import math

import pytest
import torch
from torch import nn

import advmoe
from advmoe.attacks import pgd
from advmoe.config import AttackConfig, Pixels
from advmoe.evaluation.accuracy import Execution, assess
from advmoe.evaluation.outcomes import Measurement, make_job
from advmoe.evaluation.randomised import Averaged, averaged, draws_of, mean_of
from advmoe.evaluation.scoring import OpenRouting
from advmoe.moe.routing import route
from advmoe.threat import ThreatModel

CPU, THREAT = torch.device("cpu"), ThreatModel("linf", 0.1)


class Noisy(nn.Module):
    """P(class 1) is the first pixel v or, with probability 1/2, 1 - v/2: 1/2 + v/4 in the mean. Drawn per image."""

    def forward(self, x):
        v = x[:, 0, 0, 0]
        p = torch.where(torch.rand(len(x)) < 0.5, v, 1 - v / 2)
        return torch.stack([1 - p, p], 1).log()


class Blurred(nn.Module):
    """Class 1 where the mean of an image, and noise of its own for each draw, exceed 1/2."""

    def forward(self, x):
        score = 10 * (x.flatten(1).mean(1, keepdim=True) - 0.5) + torch.randn(len(x), 1)
        return torch.cat([-score, score], 1)


def load(device):
    return Blurred()


def images(n=24):
    x = torch.linspace(0.2, 0.8, n).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).contiguous()
    return x, (x[:, 0, 0, 0] > 0.5).long()


def assessed(workers=1, **changes):
    measurement = Measurement(
        threat=THREAT, attack=AttackConfig(steps=2, step_size=Pixels(0.05)), batch_size=6, **{"eot": 4, **changes}
    )
    evaluation = assess(load, images(), measurement, execution=Execution(workers=workers, threads=1))
    for report in evaluation.result["attacks"].values():
        report.pop("seconds")
    return evaluation.result, {name: each.tolist() for name, each in evaluation.examples.items()}


def test_the_mean_is_of_probabilities_and_so_is_its_gradient():
    p = torch.tensor([[[0.8, 0.2]], [[0.4, 0.6]]])
    logits = [(each.log() + shift).requires_grad_() for each, shift in zip(p, (3.0, -7.0), strict=True)]
    mean = mean_of(logits).exp()
    assert mean.tolist() == [pytest.approx([0.6, 0.4])]
    mean[0, 0].backward()
    for draw, (right, wrong) in zip(logits, ((0.8, 0.2), (0.4, 0.6)), strict=True):
        assert draw.grad.tolist() == [pytest.approx([right * wrong / 2, -right * wrong / 2])]


def test_gradients_and_scores_are_those_expected_of_the_noise():
    x = torch.full((1, 1, 1, 1), 0.6, requires_grad=True)
    with averaged(Noisy(), 4000, 3) as many:
        p = many(x)[0, 1].exp()
    (gradient,) = torch.autograd.grad(p, x)
    # Deviations of the mean of 4000: 0.05 / sqrt(4000) of a probability of 0.6 or 0.7, 0.75 / sqrt(4000) of a gradient.
    assert p.item() == pytest.approx(0.5 + 0.6 / 4, abs=0.003) and gradient.item() == pytest.approx(0.25, abs=0.04)
    with averaged(Noisy(), 1, 3) as single:
        p = single(x)[0, 1].exp()
    (gradient,) = torch.autograd.grad(p, x)
    assert (round(p.item(), 4), round(gradient.item(), 4)) in {(0.6, 1.0), (0.7, -0.5)}


def test_a_step_along_one_draw_is_noise_and_along_the_mean_goes_where_it_should():
    x, y = torch.full((200, 1, 1, 1), 0.6), torch.zeros(200, dtype=torch.long)  # class 1 is what an attack wants
    right = {}
    for draws in (1, 64):
        with averaged(Noisy(), draws, 0) as predict:
            x_adv = pgd(
                predict, x, y, threat=THREAT, steps=1, step_size=0.2, generator=torch.Generator().manual_seed(0)
            )
        right[draws] = (x_adv > x).float().mean().item()
    # A draw points upwards half of the time; the mean of 64, 0.25 with a deviation of 0.09, nearly always.
    assert right[1] == pytest.approx(0.5, abs=0.15) and right[64] > 0.97


def test_draws_follow_from_their_purpose_and_leave_the_state_of_the_generator_alone():
    x = images()[0]

    def answer(eot, *purpose):
        with averaged(Blurred(), eot, *purpose) as predict:
            return predict(x), predict(x)

    torch.manual_seed(1)
    before = torch.get_rng_state()
    one, two = answer(3, 0, "a"), answer(3, 0, "b")
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert all(map(torch.equal, one, answer(3, 0, "a"))) and not torch.equal(one[0], two[0])
    assert not torch.equal(*one)  # each pass draws anew
    model = Blurred()
    with averaged(model, None, 0) as predict:
        assert predict is model
    assert draws_of(model) == [model] and draws_of(Averaged(model, 3)) == [model] * 3


def test_a_randomised_model_is_refused_unless_it_is_averaged():
    with pytest.raises(ValueError, match=r"deterministic: logits of two equal passes differ by .*--eot K"):
        assessed(eot=None)
    result, _ = assessed()
    assert result["attack"]["eot"] == 4 and list(result["robust_accuracy"]) == ["pgd-2", "pgd-2-margin"]
    failed = [each["name"] for each in result["checks"] if not each["passed"]]
    assert failed == ["batch-independent"]  # which draw an image gets depends on its batch
    assert result["worst_case"] < result["clean_accuracy"]
    # Each step takes a gradient pass for each draw.
    assert result["attacks"]["pgd-2"]["gradient_passes"] == 2 * 4
    with pytest.raises(ValueError, match="eot must be a whole number >= 1, got 0"):
        assessed(eot=0)


def test_an_evaluation_repeats_with_any_number_of_workers():
    one = assessed()
    torch.rand(7)
    assert assessed() == one == assessed(workers=2)
    assert assessed(seed=1) != one


def test_what_does_not_follow_from_the_seed_is_refused_all_the_same():
    own = torch.Generator().manual_seed(0)

    def private(x):
        score = 10 * (x.flatten(1).mean(1, keepdim=True) - 0.5) + torch.randn(len(x), 1, generator=own)
        return torch.cat([-score, score], 1)

    with pytest.raises(ValueError, match="deterministic: logits of two equal passes differ"):
        advmoe.evaluate(private, images(), threat=THREAT, eot=2)

    def probabilities(x):
        return Blurred()(x).softmax(1)

    with pytest.raises(ValueError, match="logits must be taken before the softmax"):
        advmoe.evaluate(probabilities, images(), threat=THREAT, eot=2)


def test_the_number_of_draws_is_part_of_what_an_evaluation_depends_on():
    described = []
    for eot in (None, 2):
        measurement = Measurement(threat=THREAT, attack=AttackConfig(), eot=eot)
        described.append(make_job(Blurred(), images(), measurement, CPU)[0].setting.described)
    assert "eot" not in described[0] and described[1] == described[0] | {"eot": 2}


def test_a_model_that_is_not_randomised_is_its_own_mean(make_routed, make_images):
    model, x = make_routed().requires_grad_(False), make_images(4)
    assert torch.allclose(Averaged(model, 3)(x), model(x).log_softmax(1), atol=1e-5)
    once, mean = OpenRouting(model)(x), OpenRouting(Averaged(model, 3))(x)
    assert torch.allclose(mean.logits, once.logits.log_softmax(1), atol=1e-5)
    assert torch.equal(mean.pathway, once.pathway)
    assert all(torch.allclose(*pair, atol=1e-6) for pair in zip(mean.scores, once.scores, strict=True))


def test_the_scores_of_a_routed_model_are_averaged_too(make_routed, make_images):
    model, x = make_routed().requires_grad_(False), make_images(3)

    def noisy(x):
        return model((x + 0.1 * torch.randn(x.shape)).clamp(0, 1))

    with averaged(noisy, 5, 0) as predict:
        mean = OpenRouting(predict)(x)
    with averaged(noisy, 5, 0), route() as routing:
        first = [(noisy(x), routing.scores[0].clone()) for _ in range(5)]
    assert torch.allclose(mean.scores[0], sum(scores for _, scores in first) / 5, atol=1e-5)
    expected = sum(logits.softmax(1) for logits, _ in first) / 5
    assert torch.allclose(mean.logits.exp(), expected, atol=1e-5) and math.isfinite(mean.logits.sum())
