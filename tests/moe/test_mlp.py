"""The MoE MLP: what it computes, by hand and against the reference, and which hidden units an expert has."""

import math

import pytest
import torch
from torch.nn import functional as F

from advmoe.models import create_model
from advmoe.moe import MoEMLP, route

LAYOUTS = {
    "halves": {"bank_rows": 8},
    "wrapping": {"bank_rows": 6, "num_experts": 3},  # windows of 4 of 6 that overlap, the last split in two
    "independent": {"bank_rows": 12, "num_experts": 3},
    "per token": {"bank_rows": 8, "per_token": True},
    "per token, wrapping": {"bank_rows": 6, "num_experts": 3, "per_token": True},
}


def layer(dim=5, hidden=4, *, num_experts=2, **kwargs):
    torch.manual_seed(0)
    made = MoEMLP(dim, hidden, num_experts=num_experts, layer=0, **kwargs).double()
    with torch.no_grad():  # weights of a usual size, and statistics under which the experts are in use
        for bank in (*made.banks(), made.fc2_bias):
            bank.normal_()
        for _ in range(20):
            made.router(tokens(32, dim=dim))
    return made.eval()


def tokens(n=12, t=3, dim=5):
    return torch.randn(n, 1, dim, dtype=torch.double) + torch.randn(n, t, dim, dtype=torch.double)


def test_two_experts_by_hand():
    # gelu(x) = x Phi(x): gelu(0) = 0, gelu(1) = 0.8413447, gelu(2) = 2 * 0.9772499.
    made = MoEMLP(2, 1, bank_rows=2, num_experts=2, layer=0, make_router=None)
    with torch.no_grad():
        made.fc1_weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        made.fc1_bias.copy_(torch.tensor([0.0, 1.0]))
        made.fc2_weight.copy_(torch.tensor([[3.0, 0.0], [1.0, -1.0]]))
        made.fc2_bias.copy_(torch.tensor([0.5, 0.0]))
    one = [[1.0, -0.5], [0.0, 0.5]]  # two tokens
    first = [[3 * 0.8413447 + 0.5, 0.0], [0.5, 0.0]]  # units gelu(1), gelu(0)
    second = [[0.5, 0.0], [1.9544997 + 0.5, -1.9544997]]  # units gelu(-1 + 1), gelu(1 + 1)
    for mode in ("hard", "masked"):
        with torch.no_grad(), route(mode, forced=torch.tensor([[0], [1]])) as routing:
            routing.shared = [torch.zeros(2, 2)]
            y = made(torch.tensor([one, one]))
        torch.testing.assert_close(y, torch.tensor([first, second]))
    with torch.no_grad(), route("soft") as routing:
        routing.shared = [torch.tensor([[3.0, 0.0]]).log1p()]  # probabilities 4/5 and 1/5
        y = made(torch.tensor([one]))
    torch.testing.assert_close(y[0], 0.8 * torch.tensor(first) + 0.2 * torch.tensor(second))


@pytest.mark.parametrize("kwargs", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_hard_and_masked_agree_in_outputs_and_gradients(kwargs):
    made, x = layer(**kwargs), tokens().requires_grad_()
    weights = torch.randn(12, 3, 5, dtype=torch.double)
    results = {}
    for mode in ("hard", "masked"):
        made.zero_grad()
        x.grad = None
        with route(mode) as routing:
            y = made(x)
        (y * weights).sum().backward()
        results[mode] = (y.detach(), x.grad, {name: p.grad for name, p in made.named_parameters()})
    assert len(routing.choices[0].unique()) == made.num_experts
    torch.testing.assert_close(results["hard"], results["masked"])
    for name, gradient in results["hard"][2].items():
        assert gradient.abs().sum() > 0, name


@pytest.mark.parametrize("kwargs", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_every_expert_at_once_is_each_by_itself(kwargs):
    made, x = layer(**kwargs), tokens()
    with torch.no_grad():
        every = made.compute_all(x, *made.banks())
        for expert, rows in enumerate(made.rows):
            hidden = F.gelu(x @ made.fc1_weight[rows].T + made.fc1_bias[rows])
            expected = hidden @ made.fc2_weight[rows] + made.fc2_bias
            torch.testing.assert_close(every[:, expert], expected)
            torch.testing.assert_close(made.compute(x, *(made.of_expert(expert, b) for b in made.banks())), expected)


@pytest.mark.parametrize("kwargs", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_soft_routing_mixes_experts_by_probability(kwargs):
    made, x = layer(**kwargs), tokens()
    with torch.no_grad(), route("soft", temperature=0.5) as routing:
        y = made(x)
        every = made.compute_all(x, *made.banks())  # (N, E, T, D)
    p = (routing.scores[0] / 0.5).softmax(-1)
    p = p.transpose(1, 2)[..., None] if kwargs.get("per_token") else p[:, :, None, None]
    torch.testing.assert_close(y, (p * every).sum(1))


def test_gathered_weights_are_the_chosen_expert_s():
    made, x = layer(**LAYOUTS["wrapping"]), tokens()
    with torch.no_grad():
        hard = made(x)
        with route("gathered"):
            torch.testing.assert_close(torch.cat([made(each[None]) for each in x]), hard)


def test_gathering_needs_one_choice():
    for made, x in ((layer(bank_rows=8), tokens()), (layer(bank_rows=8, per_token=True), tokens(1, t=12))):
        with (
            pytest.raises(ValueError, match="mode gathered must be for 1 image with 1 expert a layer, got 12"),
            route("gathered"),
        ):
            made(x)


def test_routing_a_token_depends_on_it_alone():
    made, x = layer(bank_rows=8, per_token=True), tokens()
    with torch.no_grad():
        y = made(x)
        alone = torch.stack([made(each[:, None])[:, 0] for each in x])  # every token an image of its own
    torch.testing.assert_close(alone, y)


def test_shared_experts_start_equal_and_overlapping_ones_cannot():
    torch.manual_seed(0)
    plain = MoEMLP(6, 4, bank_rows=12, num_experts=3, layer=0)
    torch.manual_seed(0)
    shared = MoEMLP(6, 4, bank_rows=12, num_experts=3, layer=0, shared_init=True)
    for bank, other in zip(shared.banks(), plain.banks(), strict=True):
        for expert in range(3):
            assert torch.equal(shared.of_expert(expert, bank), plain.of_expert(0, other))
    assert not torch.equal(plain.of_expert(0, plain.fc1_weight), plain.of_expert(1, plain.fc1_weight))
    with pytest.raises(ValueError, match=r"experts_init must be independent where experts overlap .* got 'shared'"):
        MoEMLP(6, 4, bank_rows=6, num_experts=3, layer=0, shared_init=True)


@pytest.mark.parametrize(
    ("kwargs", "units"),
    [
        ({"experts": "subset"}, 64),
        ({"experts": "subset", "num_experts": 3}, 64),
        ({"experts": "independent", "num_experts": 3}, 96),
        ({"experts": "independent", "num_experts": 3, "scale": 0.25}, 48),
    ],
    ids=str,
)
def test_bank_shapes_in_a_model(kwargs, units):
    model = create_model("deit-tiny", num_classes=5, width=16, input_size=8, **kwargs)
    mlp = next(m for m in model.modules() if isinstance(m, MoEMLP))
    assert mlp.fc1_weight.shape == mlp.fc2_weight.shape == (units, 16) and mlp.fc1_bias.shape == (units,)
    assert [len(each) for each in mlp.rows] == [int(64 * kwargs.get("scale", 0.5))] * kwargs.get("num_experts", 2)
    # Per unit that a pathway leaves out: 16 weights in, a bias, 16 weights out.
    assert mlp.idle_parameters() == (units - len(mlp.rows[0])) * 33


def test_initialisation_is_that_of_one_pathway():
    made = MoEMLP(64, 128, bank_rows=256, num_experts=2, layer=0)
    for weight in (made.fc1_weight, made.fc2_weight):  # 16384 draws each, so the estimate is good to 1 %
        assert weight.std().item() == pytest.approx(math.sqrt(2 / (64 + 128)), rel=0.02)


@pytest.mark.parametrize("per_token", [False, True])
def test_bf16_pass_gives_fp32_scores_and_gradients(per_token):
    made, x = layer(bank_rows=8, per_token=per_token).float(), tokens().float()
    with torch.no_grad(), route() as exact:
        expected = made(x)
    with torch.autocast("cpu", torch.bfloat16), route() as rounded:
        y = made(x)
    assert torch.equal(rounded.scores[0], exact.scores[0])
    torch.testing.assert_close(y.float(), expected, atol=0.3, rtol=0.05)
    y.float().square().sum().backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all(), name
