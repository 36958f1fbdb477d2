"""The MoE linear layer: rows by expert, one choice per sample over features or tokens, parity of its modes."""

import pytest
import torch
from torch import nn

from advmoe.moe import MoELinear, route

SHAPES = [(12, 6), (12, 5, 6), (12, 2, 3, 6)]


def layer(**kwargs):
    """Three experts of 4 rows of a bank of 8, in double precision, whose router tells `rows` apart."""
    torch.manual_seed(0)
    settings = {"bank_rows": 8, "num_experts": 3, "layer": 0, **kwargs}
    made = MoELinear(6, 4, **settings).double()
    with torch.no_grad():
        for _ in range(20):
            made.router(rows((32, 6)))
        made.eval().router.scores.bias -= made.router(rows((32, 6))).mean(0)  # no expert is ahead of the others
    return made


def rows(shape):
    return torch.rand(shape[0], *[1] * (len(shape) - 2), shape[-1], dtype=torch.double) + 0.1 * torch.rand(
        shape, dtype=torch.double
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_every_expert_is_pytorch_s_linear_layer(shape, bias):
    moe, x = layer(bias=bias), rows(shape)
    for expert, chosen in enumerate(moe.rows):
        own = nn.Linear(6, 4, bias=bias).double()
        own.load_state_dict(dict(zip(("weight", "bias"), (bank[chosen] for bank in moe.banks()), strict=False)))
        with torch.no_grad(), route(forced=torch.full((12, 1), expert)):
            torch.testing.assert_close(moe(x), own(x))
            with route("gathered", forced=torch.tensor([[expert]])):
                torch.testing.assert_close(moe(x[:1]), own(x[:1]))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_router_sees_the_mean_of_a_sample_s_tokens(shape):
    moe, x = layer(), rows(shape)
    with torch.no_grad(), route() as routing:
        moe(x)
    expected = moe.router(x if len(shape) == 2 else x.flatten(1, -2).mean(1))
    torch.testing.assert_close(routing.scores[0], expected)
    assert routing.pathway().shape == (12, 1) and len(routing.pathway().unique()) > 1


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_hard_and_masked_agree_in_outputs_and_gradients(shape):
    moe, x = layer(), rows(shape).requires_grad_()
    parameters = dict(moe.named_parameters())
    found = []
    for mode in ("hard", "masked"):
        with route(mode):
            y = moe(x)
        assert y.shape == (*shape[:-1], 4)
        c = torch.linspace(-1, 2, y.numel(), dtype=torch.double).view_as(y)
        found.append((y.detach(), torch.autograd.grad((y * c).sum(), [x, *parameters.values()])))
    torch.testing.assert_close(found[0][0], found[1][0])
    for name, hard, masked in zip(["x", *parameters], found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(hard, masked, msg=lambda text, name=name: f"{name}: {text}")
        assert masked.abs().max() > 0, name


def test_soft_routing_mixes_experts_by_probability():
    moe, x = layer(), rows((12, 5, 6))
    with torch.no_grad(), route("soft", temperature=0.5) as routing:
        y = moe(x)
    p = (routing.scores[0] / 0.5).exp()
    p = p / p.sum(1, keepdim=True)
    parts = [nn.functional.linear(x, moe.bank[chosen], moe.bias[chosen]) for chosen in moe.rows]
    torch.testing.assert_close(y, sum(p[:, e, None, None] * part for e, part in enumerate(parts)))


def test_shared_experts_start_equal():
    moe = layer(bank_rows=12, shared_init=True)
    for bank in moe.banks():
        assert torch.equal(bank[:4], bank[4:8]) and torch.equal(bank[:4], bank[8:])
    assert moe.idle_parameters() == 8 * 6 + 8
