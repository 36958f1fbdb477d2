"""Cost against the shapes' own arithmetic and the figures of the paper."""

import time

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from advmoe.evaluation.cost import (
    activation_bytes,
    cost,
    example_input,
    gmacs,
    in_turn,
    milliseconds_per_image,
    parameters,
)
from advmoe.models import create_model
from advmoe.models.modes import frozen
from advmoe.moe import route

ROUTERS = ["layer", "embedding", "image"]


def model(width=64, **kwargs):
    return create_model("resnet18", width=width, **{"num_classes": 10, **kwargs})


def backbone_macs(width, r, *, size=32, classes=10, in_channels=3):
    """Multiply-accumulates of ResNet-18 at model scale `r`: k^2 C_in C_out H' W' a convolution, and the classifier."""
    c = [int(r * width * 2**stage) for stage in range(4)]
    total = 9 * in_channels * c[0] * size**2
    for stage, out in enumerate(c):
        before, side = c[max(stage - 1, 0)], size // 2**stage
        total += side**2 * 9 * (before * out + 3 * out * out)  # four 3x3 convolutions
        total += side**2 * before * out if stage else 0  # the 1x1 shortcut
    return total + c[3] * classes


def router_macs(router, width, r, *, experts=2, size=32, in_channels=3):
    if router == "layer":
        total = 0
        for stage in range(4):
            out = int(r * width * 2**stage)
            inputs = [out // 2 if stage else out, out, out, out]
            total += sum(c * (hidden := max(8, min(64, c // 4))) + hidden * experts for c in inputs)
        return total
    b = max(8, width // 4)
    total = 9 * (in_channels * b * size**2 + 2 * b * b * (size // 2) ** 2 + 8 * b * b * (size // 4) ** 2)
    if router == "image":
        return total + 9 * 16 * b * b * (size // 8) ** 2 + 4 * b * experts
    return total + 4 * b * experts * 16


@pytest.mark.parametrize(("kind", "r"), [("dense", 1.0), ("s-dense", 0.5)])
def test_plain_backbones(kind, r):
    classifier = model(kind=kind)
    assert gmacs(classifier) == pytest.approx(backbone_macs(64, r) / 1e9, rel=1e-9)
    # The paper's 0.56 and 0.14 G, to three digits.
    assert round(gmacs(classifier), 3) == {"dense": 0.555, "s-dense": 0.139}[kind]


@pytest.mark.parametrize("router", ROUTERS)
def test_a_routed_model_costs_s_dense_and_its_routers(router):
    classifier = model(router=router)
    expected = backbone_macs(64, 0.5) + router_macs(router, 64, 0.5)
    assert gmacs(classifier) == pytest.approx(expected / 1e9, rel=1e-9)
    assert 1 < gmacs(classifier) / gmacs(model(kind="s-dense")) < 1.08


@pytest.mark.parametrize("backbone", ["resnet18", "wrn-16-4", "vgg16", "densenet40", "deit-tiny"])
def test_pytorch_counts_the_same(backbone):
    classifier = create_model(backbone, num_classes=10, width=32, input_size=16)
    x = example_input(classifier, 1)
    with frozen(classifier), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        classifier(x)
    assert gmacs(classifier) == counter.get_total_flops() / 2e9 > 0


@pytest.mark.parametrize("experts", [1, 2, 5])
def test_more_experts_cost_no_more_than_their_scores(experts):
    kwargs = {"num_experts": experts, "experts": "independent", "width": 16, "in_channels": 1, "input_size": 16}
    expected = backbone_macs(16, 0.5, size=16, in_channels=1)
    expected += router_macs("layer", 16, 0.5, size=16, in_channels=1, experts=experts)
    assert gmacs(model(**kwargs)) == pytest.approx(expected / 1e9, rel=1e-9)


def test_parameters():
    dense, narrow = parameters(model(kind="dense")), parameters(model(kind="s-dense"))
    assert dense[0] == dense[1] == 11_173_962  # published as 11.17 M
    for kwargs in ({}, {"num_experts": 4, "experts": "independent"}, {"num_experts": 3}, {"scale": 1.0}):
        classifier = model(**kwargs)
        stored, active = parameters(classifier)
        assert stored == sum(p.numel() for p in classifier.parameters())
        routers = sum(p.numel() for name, p in classifier.named_parameters() if "router" in name)
        assert active - routers == (dense if kwargs.get("scale") else narrow)[0]


def test_measuring_leaves_the_model_as_it_was():
    classifier = model(width=8, input_size=16, in_channels=1)
    classifier.backbone.stem.eval()
    modes = [m.training for m in classifier.modules()]
    state = {name: value.clone() for name, value in classifier.state_dict().items()}
    figures = cost(classifier, batch=4)
    assert [m.training for m in classifier.modules()] == modes
    assert all(p.requires_grad for p in classifier.parameters())
    assert all(torch.equal(value, state[name]) for name, value in classifier.state_dict().items())
    assert figures["gmacs"] == pytest.approx(gmacs(classifier), abs=1e-6)
    assert (figures["parameters"], figures["active_parameters"]) == parameters(classifier)
    assert (figures["batch"], figures["device"], figures["threads"]) == (4, "cpu", torch.get_num_threads())
    assert 0 < figures["ms_per_image"] < 1000


def test_the_example_is_an_image_of_the_model():
    classifier = model(width=8, input_size=16, in_channels=1)
    x = example_input(classifier, 4)
    assert x.shape == (4, 1, 16, 16) and x.min() >= 0 and x.max() <= 1
    assert milliseconds_per_image(classifier, 4, repeats=1) > 0


class Branch(nn.Module):
    def forward(self, x):
        return x + x.relu()


CONV, MAP = nn.Conv2d(1, 2, 3, padding=1), 4 * 2 * 8 * 8 * 4
"""A convolution, and the bytes of its output for four images of 8x8: 2 channels of 4-byte numbers."""


@pytest.mark.parametrize(
    ("net", "expected"),
    [
        (CONV, MAP),
        (nn.Sequential(CONV, nn.ReLU()), 2 * MAP),  # the convolution's output lives until ReLU has made its own
        (nn.Sequential(CONV, nn.ReLU(inplace=True)), MAP),
        (nn.Sequential(CONV, Branch()), 3 * MAP),  # the shortcut, the branch and their sum
        # Two at once, whatever the depth; the last layer's input and its 4 x 10 logits are less.
        (nn.Sequential(CONV, nn.ReLU(), nn.Sigmoid(), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10)), 2 * MAP),
        (nn.Sequential(CONV, nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(128, 10)), MAP + 160),
        (nn.Flatten(), 0),  # a view of the images, which are not counted
    ],
    ids=["one", "two", "in place", "branch", "chain", "logits", "view"],
)
def test_activations_are_what_is_alive_at_once(net, expected):
    assert activation_bytes(net, torch.rand(4, 1, 8, 8)) == expected
    assert activation_bytes(net.train(), torch.rand(8, 1, 8, 8)) == 2 * expected
    assert all(module.training for module in net.modules())


@pytest.mark.parametrize("experts", [2, 3, 8])
def test_activations_of_one_expert_are_at_most_three_copies_more_than_s_dense_s(experts):
    torch.manual_seed(0)
    classifier = model(width=8, input_size=16, num_experts=experts, experts="independent")
    x = example_input(classifier, 16)
    largest = 16 * 4 * 16 * 16 * 4  # bytes of a batch between layers of the first stage, in fp32
    alone, sparse = activation_bytes(model(width=8, input_size=16, kind="s-dense"), x), activation_bytes(classifier, x)
    # The images sorted by expert, what the experts make of them, and that in order; and some numbers of routers.
    assert alone <= sparse <= alone + 3.1 * largest
    with route("masked"):
        every = activation_bytes(classifier, x)
    # Of few experts the results that are not wanted weigh no more than the copies.
    assert sparse < every or experts < 8


def test_sides_take_turns_for_as_long_as_was_asked(monkeypatch):
    clock, calls = iter(range(10**6)), []
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))  # every pass takes one second
    sides = {name: lambda x, name=name: calls.append((name, len(x))) for name in ("a", "b")}
    for seconds, rounds in ((10, 5), (0, 3), (1000, 50)):
        calls.clear()
        times = in_turn(sides, torch.zeros(4, 1), seconds=seconds)
        assert times == {"a": rounds * [250.0], "b": rounds * [250.0]}  # milliseconds per image
        assert calls == (2 + rounds) * [("a", 4), ("b", 4)]
