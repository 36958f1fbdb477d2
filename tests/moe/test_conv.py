"""The MoE convolution: which rows an expert has, how they start, and what the layer computes under each routing."""

import math
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from advmoe import ops
from advmoe.models import create_model
from advmoe.moe import MoEConv2d, route


def layer(c_in=3, c_out=4, *, bank_rows=8, num_experts=2, **kwargs):
    torch.manual_seed(0)
    made = MoEConv2d(c_in, c_out, 3, 1, 1, bank_rows=bank_rows, num_experts=num_experts, layer=0, **kwargs)
    with torch.no_grad():  # statistics under which both experts are in use
        for _ in range(20):
            made.router(images(32, c_in))
    return made.eval()


def images(n=12, channels=3):
    return torch.rand(n, channels, 1, 1) * torch.rand(n, channels, 4, 4)


@pytest.mark.parametrize(
    ("kwargs", "rows"),
    [
        ({"experts": "subset"}, 16),
        ({"experts": "subset", "num_experts": 3}, 16),
        ({"experts": "independent"}, 16),
        ({"experts": "independent", "num_experts": 3}, 24),
        ({"experts": "independent", "num_experts": 3, "scale": 0.25}, 12),
        ({"experts": "independent", "scale": 1.0}, 32),
    ],
    ids=str,
)
def test_bank_shapes_in_a_model(kwargs, rows):
    model = create_model("resnet18", num_classes=5, width=8, **kwargs)
    conv = next(m for m in model.modules() if isinstance(m, MoEConv2d) and m.c_out != m.c_in)  # 8 -> 16 when dense
    r, experts = kwargs.get("scale", 0.5), kwargs.get("num_experts", 2)
    assert conv.bank.shape == (rows, 8 * r, 3, 3)
    assert [len(each) for each in conv.rows] == [16 * r] * experts
    if kwargs["experts"] == "independent":
        assert sorted(row for each in conv.rows for row in each) == list(range(rows))


def test_experts_are_the_rows_of_the_bank():
    conv = layer(num_experts=3)
    for expert, rows in enumerate(conv.rows):
        assert torch.equal(conv.of_expert(expert, conv.bank), conv.bank[rows])
    assert conv.of_expert(0, conv.bank).data_ptr() == conv.bank.data_ptr()  # adjacent rows are a view, no copy


def test_initialisation_is_that_of_one_pathway():
    conv = layer(c_in=32, c_out=64, bank_rows=128)
    # Fan-out of one pathway: sqrt(2 / (64 * 9)); 36864 draws, so the estimate is good to 1 %.
    assert conv.bank.std().item() == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.02)


def test_shared_experts_start_equal():
    plain, shared = layer(bank_rows=12, num_experts=3), layer(bank_rows=12, num_experts=3, shared_init=True)
    assert torch.equal(shared.of_expert(0, shared.bank), plain.of_expert(0, plain.bank))
    assert torch.equal(shared.of_expert(1, shared.bank), shared.of_expert(0, shared.bank)) and torch.equal(
        shared.of_expert(2, shared.bank), shared.of_expert(0, shared.bank)
    )
    assert not torch.equal(plain.of_expert(1, plain.bank), plain.of_expert(0, plain.bank))
    layer(bank_rows=4, shared_init=True)  # r = 1: equal anyhow


def test_overlapping_experts_cannot_start_equal():
    with pytest.raises(ValueError, match=r"experts_init must be independent where experts overlap .* got 'shared'"):
        layer(bank_rows=8, num_experts=3, shared_init=True)


def by_hand(conv, x):
    """(scores, every expert's output (N, E, C_out, H, W)), from the layer's parts."""
    outputs = [F.conv2d(x, conv.bank[rows], padding=1) for rows in conv.rows]
    return conv.router(x), torch.stack(outputs, 1)


@pytest.mark.parametrize("mode", ["hard", "masked"])
def test_a_sample_gets_the_expert_of_its_highest_score(mode):
    conv, x = layer(num_experts=3), images()
    scores, outputs = by_hand(conv, x)
    choice = scores.argmax(1)
    assert len(choice.unique()) > 1
    with route(mode) as routing:
        y = conv(x)
    torch.testing.assert_close(y, outputs[torch.arange(12), choice])
    assert torch.equal(routing.choices[0], choice) and torch.equal(routing.scores[0], scores)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_soft_routing_mixes_experts_by_probability(temperature):
    conv, x = layer(num_experts=3), images()
    scores, outputs = by_hand(conv, x)
    p = (scores / temperature).exp() / (scores / temperature).exp().sum(1, keepdim=True)
    with route("soft", temperature=temperature):
        y = conv(x)
    torch.testing.assert_close(y, sum(p[:, e].view(-1, 1, 1, 1) * outputs[:, e] for e in range(3)))


def test_the_router_s_gradient_by_hand():
    # p = softmax(s)[k] has gradient p (1[i = k] - softmax(s)_i) in s_i, and dL/dp = <dL/dy, y>.
    conv, x = layer(), images()
    c = torch.rand(12, 4, 4, 4)
    with route() as routing:
        y = conv(x)
    scores, choice = routing.scores[0], routing.choices[0]
    (gradient,) = torch.autograd.grad((y * c).sum(), scores)
    q, k = scores.softmax(1).detach(), F.one_hot(choice, 2)
    inner = (c * y).sum((1, 2, 3)).detach()
    expected = (inner * q.gather(1, choice[:, None])[:, 0])[:, None] * (k - q)
    torch.testing.assert_close(gradient, expected)
    assert expected.abs().max() > 1e-3


def test_a_forced_choice_overrules_the_scores_and_takes_their_gradient():
    conv, x = layer(), images(6)
    scores, outputs = by_hand(conv, x)
    other = 1 - scores.argmax(1)
    with route(forced=other[:, None]) as routing:
        y = conv(x)
    torch.testing.assert_close(y, outputs[torch.arange(6), other])
    assert torch.equal(routing.pathway(), other[:, None])
    (gradient,) = torch.autograd.grad(y.sum(), routing.scores[0])
    # The gradient in the two scores is opposite, as their softmax sums to 1.
    torch.testing.assert_close(gradient[:, 0], -gradient[:, 1])
    assert gradient.abs().max() > 0


def test_memory_format_changes_nothing():
    conv, x = layer(num_experts=3), images()
    plain = conv(x)
    fast = conv.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    assert fast.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(fast, plain)


# All that a convolution can be

SETTINGS = {
    "1x1": {"kernel_size": 1},
    "rectangular": {"kernel_size": (3, 1), "stride": (2, 1), "padding": (1, 2)},
    "strided": {"kernel_size": 3, "stride": 2, "padding": 1},
    "dilated": {"kernel_size": 3, "padding": 2, "dilation": 2},
    "grouped": {"kernel_size": 3, "padding": 1, "groups": 2},
    "depthwise": {"kernel_size": 3, "groups": 4},
    "biased": {"kernel_size": 3, "padding": 1, "bias": True},
    "same": {"kernel_size": (4, 3), "padding": "same", "dilation": (1, 2), "bias": True},
    "valid": {"kernel_size": 3, "padding": "valid"},
    "reflect": {"kernel_size": 3, "padding": (2, 1), "padding_mode": "reflect", "stride": 2},
    "circular same": {"kernel_size": (2, 3), "padding": "same", "padding_mode": "circular"},
    "everything": {
        "kernel_size": (3, 2), "stride": (1, 2), "padding": (1, 2), "dilation": (2, 1), "groups": 4, "bias": True,
        "padding_mode": "replicate",
    },
}  # fmt: skip


def general(**kwargs):
    """Three experts of 8 rows of a bank of 16 (overlapping, wrapping around), in double precision."""
    torch.manual_seed(0)
    made = MoEConv2d(4, 8, bank_rows=16, num_experts=3, layer=0, **kwargs)
    with torch.no_grad():
        for bank in made.banks():
            bank.normal_()
        for _ in range(20):
            made.router(images(32, 4))
        made.eval().router.scores.bias -= made.router(images(32, 4)).mean(0)  # no expert is ahead of the others
    return made.double()


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("kwargs", SETTINGS.values(), ids=SETTINGS)
def test_every_expert_is_pytorch_s_convolution(kwargs):
    conv = general(**kwargs)
    x = torch.rand(5, 4, 7, 6, dtype=torch.double)
    for expert, rows in enumerate(conv.rows):
        own = torch.nn.Conv2d(4, 8, **{"bias": False, **kwargs}).double()
        own.load_state_dict(dict(zip(("weight", "bias"), (bank[rows] for bank in conv.banks()), strict=False)))
        with torch.no_grad(), route(forced=torch.full((5, 1), expert)):
            torch.testing.assert_close(conv(x), own(x))
            with route("gathered", forced=torch.tensor([[expert]])):
                torch.testing.assert_close(conv(x[:1]), own(x[:1]))


@pytest.mark.parametrize("kwargs", SETTINGS.values(), ids=SETTINGS)
def test_hard_and_masked_agree_whatever_the_convolution(kwargs):
    conv = general(**kwargs)
    x = images(12, 4).double().repeat(1, 1, 2, 2)[..., :6].requires_grad_()
    parameters = dict(conv.named_parameters())
    found = []
    for mode in ("hard", "masked"):
        with route(mode) as routing:
            y = conv(x)
        assert len(routing.choices[0].unique()) > 1
        c = torch.linspace(-1, 2, y.numel(), dtype=torch.double).view_as(y)
        found.append((y.detach(), torch.autograd.grad((y * c).sum(), [x, *parameters.values()])))
    (y, gradients), (expected, wanted) = found
    torch.testing.assert_close(y, expected)
    for name, gradient, right in zip(["x", *parameters], gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, right, msg=lambda text, name=name: f"{name}: {text}")
        assert right.abs().max() > 0, name


@pytest.mark.parametrize(("experts", "c_out"), [(2, 3), (3, 2)])
def test_few_filters_of_all_experts_at_once_give_each_sample_its_own(experts, c_out, monkeypatch):
    torch.manual_seed(0)
    conv = MoEConv2d(
        4, c_out, 3, 1, 1, bank_rows=experts * c_out, num_experts=experts, layer=0, bias=True, make_router=None
    )
    torch.nn.init.normal_(conv.bias)
    x, forced = torch.rand(9, 4, 6, 5), torch.arange(9)[:, None] % experts
    seen, chosen = [], ops.chosen
    monkeypatch.setattr(ops, "chosen", lambda *given: seen.append(1) or chosen(*given))
    scores = [torch.zeros(9, experts)]
    with route(forced=forced) as routing:
        routing.shared = scores
        grouped = conv(x)
        assert not seen  # a gradient is to come: samples are grouped
        with torch.no_grad():
            torch.testing.assert_close(conv(x), grouped)
    assert seen
    for expert, rows in enumerate(conv.rows):
        own = torch.nn.functional.conv2d(x[expert::experts], conv.bank[rows], conv.bias[rows], 1, 1)
        torch.testing.assert_close(grouped[expert::experts], own)


def test_a_bias_is_a_bank_of_its_own():
    conv = MoEConv2d(4, 8, 3, bank_rows=16, num_experts=2, layer=0, bias=True)
    assert [tuple(bank.shape) for bank in conv.banks()] == [(16, 4, 3, 3), (16,)]
    # A pathway leaves the other expert's 8 filters of 36 numbers and their 8 biases unused.
    assert conv.idle_parameters() == 8 * 36 + 8
    assert conv.bias.count_nonzero() == 0
    assert len(MoEConv2d(4, 8, 3, bank_rows=16, num_experts=2, layer=0).banks()) == 1


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"groups": 3}, "groups must divide c_in=4 and c_out=8, got 3"),
        ({"groups": 0}, "groups must be a whole number >= 1, got 0"),
        ({"groups": "1"}, "groups must be a whole number >= 1, got '1'"),
        ({"stride": 0}, "stride must be a whole number >= 1, or two, got 0"),
        ({"stride": 1.5}, "stride must be a whole number >= 1, or two, got 1.5"),
        ({"dilation": (1, 0)}, r"dilation must be a whole number >= 1, or two, got \(1, 0\)"),
        ({"padding": (1, 1, 1)}, r"padding must be a whole number >= 0, or two, got \(1, 1, 1\)"),
        ({"padding_mode": "mirror"}, "padding_mode must be one of zeros, reflect, replicate, circular, got 'mirror'"),
        ({"padding": "full"}, "padding must be a size, same or valid, got 'full'"),
        ({"padding": "same", "stride": 2}, r"stride must be 1 where padding is same, got \(2, 2\)"),
    ],
)
def test_what_is_no_convolution(kwargs, message):
    with pytest.raises(ValueError, match=message):
        MoEConv2d(4, 8, 3, bank_rows=16, num_experts=2, layer=0, **kwargs)


@pytest.mark.parametrize("size", [0, (3,), (3, 3, 7), "3"])
def test_a_kernel_has_two_sides(size):
    with pytest.raises(ValueError, match=r"^kernel_size must be a whole number >= 1, or two, got "):
        MoEConv2d(4, 8, size, bank_rows=16, num_experts=2, layer=0)


def test_a_layer_without_a_router_says_so():
    layer = MoEConv2d(4, 8, 3, bank_rows=16, num_experts=2, layer=0, make_router=None)
    with pytest.raises(ValueError, match=r"^MoE layer 0 must have a router, or scores .* of 0 layers$"):
        layer(torch.rand(2, 4, 5, 5))


NARROW = """
import torch
from advmoe import create_model
from advmoe.moe import MoEConv2d

torch.set_num_threads(1)
torch.manual_seed(0)
strided = MoEConv2d(8, 16, 1, 2, bank_rows=32, num_experts=2, layer=0)
network = create_model("resnet18", num_classes=3, width=8, kind="s-dense", scale=1.0, input_size=64)
for n in (2, 7, 25):
    for layer, c in ((strided, 8), (network, 3)):
        x = torch.rand(n, c, 64, 64).contiguous(memory_format=torch.channels_last).requires_grad_()
        layer.to(memory_format=torch.channels_last)(x).sum().backward()
print("whole")
"""


def test_strided_1x1_convolutions_of_few_channels_leave_memory_whole():
    # PyTorch's own end such a process by a signal.
    done = subprocess.run([sys.executable, "-c", NARROW], text=True, capture_output=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "whole\n"), done.stderr


@pytest.mark.parametrize(("stride", "groups", "bias"), [(2, 1, False), ((2, 3), 1, True), (3, 2, False)])
def test_a_strided_1x1_convolution_is_pytorch_s(stride, groups, bias):
    torch.manual_seed(0)
    layer = MoEConv2d(4, 6, 1, stride, bank_rows=12, num_experts=2, layer=0, groups=groups, bias=bias).double().eval()
    if bias:
        nn.init.normal_(layer.bias)
    x = torch.randn(3, 4, 7, 8, dtype=torch.float64, requires_grad=True)
    ours = layer.compute(x, *(layer.of_expert(1, bank) for bank in layer.banks()))  # without the gate's gradient
    theirs = F.conv2d(x, layer.bank[6:], layer.bias[6:] if bias else None, stride=stride, groups=groups)
    torch.testing.assert_close(ours, theirs)
    weight = torch.randn_like(ours)
    grads = [torch.autograd.grad((y * weight).sum(), (x, layer.bank), retain_graph=True) for y in (ours, theirs)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("padding_mode", ["reflect", "replicate", "circular"])
def test_strided_filters_of_one_pixel_write_nowhere_else(padding_mode):
    layer = MoEConv2d(3, 8, 1, (2, 1), 1, bank_rows=16, num_experts=2, layer=0, padding_mode=padding_mode)
    layer = layer.to(memory_format=torch.channels_last)
    for _ in range(40):
        x = torch.rand(17, 3, 6, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
        with route(forced=torch.zeros(17, 1, dtype=torch.long), gated=False):
            y = layer(x)
        y.sum().backward()
        plain = F.conv2d(F.pad(x, (1, 1, 1, 1), padding_mode), layer.bank[:8])[:, :, ::2]
        torch.testing.assert_close(y, plain)
