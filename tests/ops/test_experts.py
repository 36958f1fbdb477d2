"""Each sample by its own expert's few filters: the same as one expert after another."""

import pytest
import torch
from torch.nn import functional as F

from advmoe.ops import chosen, fits_a_vector, pointwise


def test_of_what_all_experts_made_each_sample_takes_its_own():
    every = torch.arange(6.0).view(3, 2, 1, 1, 1)
    assert chosen(every, torch.tensor([1, 0, 1])).flatten().tolist() == [1.0, 2.0, 5.0]


def test_what_is_not_finite_in_one_expert_spoils_no_other_s_samples():
    every = torch.ones(2, 2, 1, 1, 1)
    every[:, 1] = float("nan")
    y = chosen(every, torch.tensor([0, 1])).flatten()
    assert y[0] == 1 and y[1].isnan()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("biased", [False, True])
def test_a_pointwise_convolution_is_each_expert_s_own(biased, layout):
    torch.manual_seed(0)
    x, choice = torch.rand(5, 6, 8, 8).contiguous(memory_format=layout), torch.tensor([2, 0, 1, 2, 2])
    filters, bias = torch.rand(12, 6, 1, 1), torch.rand(12)
    rows = torch.arange(12).view(3, 4)
    y = pointwise(x, choice, (filters, bias) if biased else (filters,), rows)
    for i, expert in enumerate(choice.tolist()):
        own = F.conv2d(x[i : i + 1], filters[rows[expert]], bias[rows[expert]] if biased else None)
        torch.testing.assert_close(y[i : i + 1], own)


def test_wide_filters_are_better_grouped():
    x, rows = torch.rand(2, 64, 4, 4), torch.arange(128).view(2, 64)
    assert pointwise(x, torch.tensor([0, 1]), (torch.rand(128, 64, 1, 1),), rows) is None


def test_all_experts_filters_fit_side_by_side_only_if_few_and_without_a_gradient():
    x = torch.rand(2, 3, 4, 4)
    assert not fits_a_vector(x, 4)  # a gradient may be asked for
    with torch.no_grad():
        assert fits_a_vector(x, 4) and not fits_a_vector(x, 64)
        assert not fits_a_vector(x.to("meta"), 4)
