"""Bounds of choices: what they prove no attack changes, at eps 0 they are the model's own scores, and on networks
worked by hand they are exact.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from advmoe import create_model, pathway, route, to_moe
from advmoe.attacks.pgd import ascend
from advmoe.attacks.routed.flips import changed_choices
from advmoe.evaluation.bounds import ChoiceBounds
from advmoe.evaluation.boxes import Unbounded
from advmoe.evaluation.scoring import OpenRouting
from advmoe.models.modes import frozen
from advmoe.threat import ThreatModel

ROOM = 1e-4
"""By which bounds in fp64 may miss scores in fp32, of the scores' size."""


def settled(model, size=16):
    """`model` in eval mode, its batch norms having seen images."""
    with torch.no_grad():
        for _ in range(12):
            model(torch.rand(32, 3, size, size))
    return model.eval().requires_grad_(False)


def scores_of(model, x):
    with torch.no_grad(), route() as routing:
        model(x)
    return [routing.scores[layer] for layer in sorted(routing.scores)]


def assert_inside(model, bounds, x):
    for layer, scores in zip(bounds, scores_of(model, x), strict=True):
        room = ROOM * (1 + scores.abs())
        assert (scores >= layer.scores.low - room).all() and (scores <= layer.scores.high + room).all()


def attacked(model, x, threat, seed):
    """Images within the radius: drawn, at corners, and from steps against the choice of one layer after another."""
    generator = torch.Generator().manual_seed(seed)
    yield threat.random_start(x, generator)
    yield threat.project(x + threat.eps * torch.randn(x.shape, generator=generator).sign(), x)
    clean = pathway(model, x)
    for layer in {0, 1, clean.shape[1] // 2, clean.shape[1] - 1}:

        def objective(x_adv, layer=layer):
            with route() as routing:
                model(x_adv)
            scores = routing.scores[layer]
            return -scores.gather(1, clean[:, layer, None]).sum() * scores.shape[1] + scores.sum()

        start = threat.random_start(x, generator)
        yield ascend(objective, x, start, threat=threat, step_sizes=[threat.eps / 2] * 4)


def assert_sound(model, x, radii):
    """Scores stay within their bounds and proved choices as they are; returns the shares proved by radius and layer."""
    bounds, clean, shares = ChoiceBounds(model), pathway(model, x), []
    for eps in radii:
        found, proved = bounds(x, eps), bounds.proved(x, eps)
        for near in attacked(model, x, ThreatModel("linf", eps), seed=0):
            assert_inside(model, found, near)
            assert not ((pathway(model, near) != clean) & proved).any()
        shares.append(proved.double().mean(0))
    return shares


CNNS = [("resnet18", 8), ("resnet50", 8), ("wrn-10-1", 16), ("vgg16", 8), ("densenet40", 8)]


@pytest.mark.parametrize("experts", [2, 3])
@pytest.mark.parametrize(("name", "width"), CNNS)
def test_layer_routers_stay_within_their_bounds(name, width, experts):
    torch.manual_seed(0)
    model = settled(create_model(name, num_classes=4, width=width, input_size=16, num_experts=experts))
    small, large = assert_sound(model, torch.rand(6, 3, 16, 16), [0.05 / 255, 2 / 255])
    assert small[0] > 0.5 and (small >= large).all() and large[-1] == 0


@pytest.mark.parametrize("experts", [2, 3])
@pytest.mark.parametrize(("name", "width"), CNNS)
def test_without_a_radius_bounds_are_the_scores(name, width, experts):
    torch.manual_seed(1)
    model = settled(create_model(name, num_classes=4, width=width, input_size=16, num_experts=experts))
    x = torch.rand(6, 3, 16, 16)
    bounds, scores = ChoiceBounds(model), scores_of(model, x)
    with frozen(model):  # where norms are folded into convolutions
        bounds.check(x)
    best = torch.stack([each.topk(2).values for each in scores], 1)
    size = torch.stack([each.abs().amax(1) for each in scores], 1)
    # Behind two scores that rounding cannot tell apart both experts may be chosen.
    tied = (best[..., 0] - best[..., 1] <= 3 * ROOM * (1 + size)).cumsum(1) > 0
    assert (bounds.proved(x, 0.0) | tied).all() and tied.double().mean() < 0.2
    for index, (layer, score) in enumerate(zip(bounds(x, 0.0), scores, strict=True)):
        apart = ~tied[:, index]
        for end in (layer.scores.low, layer.scores.high):
            assert torch.allclose(end[apart].float(), score[apart], atol=1e-4, rtol=1e-4)


def one_channel(bias):
    """Two MoE convolutions of one pixel to one: by 1 or 2, then by 1; the routers' scores are (0, x - bias)."""
    model = to_moe(nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.Conv2d(1, 1, 1, bias=False), nn.Flatten())).eval()
    with torch.no_grad():
        for layer in model.backbone[:2]:
            layer.bank.fill_(1)
            for parameter in layer.router.parameters():
                parameter.zero_()
            layer.router.norm.weight.fill_((1 + layer.router.norm.eps) ** 0.5)
            layer.router.hidden.weight[0] = layer.router.scores.weight[1, 0] = 1
        model.backbone[0].bank[1] = 2
        model.backbone[0].router.scores.bias[1], model.backbone[1].router.scores.bias[1] = -bias[0], -bias[1]
    return model


def test_behind_an_open_choice_goes_on_what_any_expert_makes():
    model, x = one_channel((0.5, 0.95)), torch.tensor([0.4, 0.55]).view(2, 1, 1, 1)
    first, second = ChoiceBounds(model)(x, 0.0625)
    assert torch.allclose(first.scores.low[:, 1], torch.tensor([-0.1625, -0.0125]).double())
    assert torch.allclose(first.scores.high[:, 1], torch.tensor([-0.0375, 0.1125]).double())
    assert first.possible.tolist() == [[True, False], [True, True]] and first.proved.tolist() == [True, False]
    # 0.3375 to 0.4625 by 1; and 0.4875 to 0.6125 by 1 or 2: to 1.225.
    assert torch.allclose(second.scores.low[:, 1], torch.tensor([-0.6125, -0.4625]).double())
    assert torch.allclose(second.scores.high[:, 1], torch.tensor([-0.4875, 0.275]).double())
    assert ChoiceBounds(model).proved(x, 0.0625).tolist() == [[True, True], [False, False]]


def test_pixels_stop_at_0_and_1():
    model, x = one_channel((0.5, 3.0)), torch.tensor([0.98]).view(1, 1, 1, 1)
    _, second = ChoiceBounds(model)(x, 0.25)
    assert torch.allclose(second.scores.high[:, 1], torch.tensor([-1.0]).double())
    assert ChoiceBounds(model).proved(x, 0.25).tolist() == [[True, True]]


class Own(nn.Module):
    """A network as users write them: functions, sums in place, a layer used twice, a linear layer."""

    def __init__(self):
        super().__init__()
        self.first, self.again = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
        self.shrink, self.head = nn.Conv2d(4, 4, 1, stride=2), nn.Linear(4 * 9, 8)
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        x = F.gelu(self.first(x))
        y = self.again(F.relu(self.again(x)))
        y += x
        y = F.max_pool2d(F.relu(y, inplace=True), 2)
        return self.last(F.silu(self.head(torch.flatten(self.shrink(y), 1))))


def test_converted_networks_stay_within_their_bounds():
    torch.manual_seed(0)
    model = to_moe(Own(), 3, linear=["head", "last"], example=torch.rand(4, 3, 12, 12))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    shares = assert_sound(settled(model, 12), torch.rand(8, 3, 12, 12), [0.01 / 255, 0.5 / 255, 2 / 255])
    assert shares[0].min() > 0.5 and len(shares[0]) == 5


@pytest.mark.parametrize("router", ["image", "embedding"])
def test_no_attack_changes_a_proved_choice(router):
    torch.manual_seed(0)
    model = create_model("resnet18", num_classes=4, width=4, input_size=8, router=router).eval().requires_grad_(False)
    nn.init.normal_(model.router.heads.bias, std=0.05)
    x, bounds = torch.rand(48, 3, 8, 8), ChoiceBounds(model)
    bounds.check(x)
    radii = (each / 255 for each in (2, 1, 0.5, 0.2, 0.1, 0.05, 0.02))
    eps = next(each for each in radii if bounds.proved(x, each).all(1).any())
    proved = bounds.proved(x, eps)
    assert proved.shape == (48, 16) and not bounds.proved(x, 1.0).any()
    threat, before = ThreatModel("linf", eps), pathway(model, x)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        moved = changed_choices(OpenRouting(model), x, threat=threat, sizes=[eps / 3] * 8, generator=generator)
        assert not (moved & proved.all(1)).any()
        near = threat.random_start(x, generator)
        assert_inside(model, bounds(x, eps), near)
        assert not ((pathway(model, near) != before) & proved).any()


def test_a_linear_router_is_bounded_exactly():
    model = create_model(
        "resnet18", num_classes=4, width=4, in_channels=1, input_size=8, router="image", mean=[0.0], std=[1.0]
    ).eval()
    router = model.router
    with torch.no_grad():
        for each in router.embedding:
            if isinstance(each, nn.Conv2d):  # the pixel itself, in the first channel; ReLU leaves it, as it is positive
                each.weight.zero_()
                each.weight[0, 0, 1, 1] = 1
        router.heads.weight.zero_()
        router.heads.bias.copy_(torch.tensor([0.0, -0.5]))
        router.heads.weight[1, 0] = 1
    x = torch.full((1, 1, 8, 8), 0.6)  # 0.1 of brightness above the threshold, but for batch norm's 1e-5
    assert ChoiceBounds(model).proved(x, 0.0995).tolist() == [[True] * 16]
    assert ChoiceBounds(model).proved(x, 0.1005).tolist() == [[False] * 16]


class Otherwise(nn.Conv2d):
    """Doubles tensors alone."""

    def forward(self, x):
        return super().forward(x) * (2 if isinstance(x, torch.Tensor) else 1)


class Halting(nn.Module):
    def forward(self, x):
        return x if x.mean() > 0 else -x


def bounded(model, size=16):
    ChoiceBounds(model).check(torch.rand(2, 3, size, size))


def hooked():
    model = create_model("resnet18", num_classes=4, width=4, input_size=16)
    model.backbone.blocks.register_forward_hook(lambda module, args, y: y + 1)
    return model


def converted(*first):
    network = nn.Sequential(*first, nn.Conv2d(4, 4, 3), nn.Flatten(), nn.LazyLinear(2))
    network(torch.rand(2, 3, 16, 16))
    return to_moe(network)


@pytest.mark.parametrize(
    ("make", "of"),
    [
        (lambda: create_model("deit-tiny", num_classes=4, width=16, input_size=16), "layer_norm"),
        (lambda: create_model("wrn-10-1", num_classes=4, router="fixed-top", input_size=16), "HalfspaceRouter"),
        (lambda: create_model("resnet18", num_classes=4, width=4, router_norm="layer", input_size=16), "layer_norm"),
        (lambda: nn.Conv2d(3, 3, 1), "a Conv2d"), (hooked, "hooks"),
        (lambda: converted(nn.Conv2d(3, 4, 3), nn.Softmax(1)), "softmax"),
        (lambda: converted(nn.Conv2d(3, 4, 3), Halting()), "gt|TypeError"),
        (lambda: converted(Otherwise(3, 4, 3)), "otherwise"),
    ],
)  # fmt: skip
def test_what_has_no_bounds_is_told(make, of):
    torch.manual_seed(0)
    with pytest.raises(Unbounded, match=of):
        bounded(make())
