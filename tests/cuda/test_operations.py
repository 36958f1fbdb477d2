"""Operations that are done otherwise on a CUDA device agree with the CPU's, gradients included."""

import pytest
import torch

from advmoe import ops


@pytest.mark.parametrize("shape", [(5, 3, 4, 6, 2), (5, 2, 7), (1, 4, 2, 3, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_sample_gets_its_experts_output(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    every = torch.rand(shape, generator=generator).to(dtype)
    choice = torch.randint(shape[1], shape[:1], generator=generator)
    wanted = torch.rand(shape[0], *shape[2:], generator=generator).to(dtype)
    results = []
    for place in ("cpu", "cuda"):
        leaf = every.to(place, copy=True).requires_grad_()
        y = ops.chosen(leaf, choice.to(place))
        y.backward(wanted.to(place))
        results.append((y.detach().cpu(), leaf.grad.cpu()))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert torch.equal(results[0][0], every[torch.arange(len(every)), choice])


def test_what_is_not_finite_in_one_expert_stays_there():
    every = torch.zeros(2, 2, 3, 1, 1, device="cuda")
    every[0, 1], every[1, 0] = torch.inf, torch.nan
    assert torch.equal(ops.chosen(every, torch.tensor([0, 1], device="cuda")).cpu(), torch.zeros(2, 3, 1, 1))


def test_pixels_stay_channels_last():
    every = torch.rand(2, 4, 4, 6, device="cuda").permute(0, 3, 1, 2).unflatten(1, (2, 3))
    y = ops.chosen(every, torch.tensor([0, 1], device="cuda"))
    assert y.is_contiguous(memory_format=torch.channels_last)
