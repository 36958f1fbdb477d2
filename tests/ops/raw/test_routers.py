"""The kernels of routers in eval mode, and of a choice's probability, against PyTorch's operations."""

import pytest
import torch
from kernel_checks import assert_close, batch, kernels, router

from advmoe.ops import raw

pytestmark = kernels


@pytest.mark.parametrize("channels", [3, 8, 20, 64, 150])
def test_scores_and_their_gradient(channels):
    scorer, parts = router(channels, 3)
    pooled = batch(9, channels, 1, 1)[:, :, 0, 0].contiguous().requires_grad_()
    expected, g = parts(pooled), batch(9, 3, 1, 1, seed=1)[:, :, 0, 0].contiguous()
    scores, kept = scorer.scores(pooled.detach())
    assert_close(scores, expected.detach())
    assert_close(scorer.backward(g, kept), torch.autograd.grad(expected, pooled, g)[0])


def test_the_probability_of_a_choice_and_its_gradient():
    scores = (20 * batch(9, 4, 1, 1)[:, :, 0, 0]).contiguous().requires_grad_()
    choice, g = torch.arange(9) % 4, batch(9, 1, 1, 1, seed=1).flatten()
    expected = scores.double().softmax(1)[torch.arange(9), choice]
    assert_close(raw.chosen_probability(scores.detach(), choice), expected.detach())
    found = raw.chosen_probability_backward(scores.detach(), choice, g)
    assert_close(found, torch.autograd.grad(expected, scores, g.double())[0])
