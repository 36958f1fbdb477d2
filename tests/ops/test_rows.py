"""Samples as rows of memory: indexing and inner products in either memory format."""

import pytest
import torch

from advmoe.ops.rows import merge_rows, row_products, split_rows

FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def test_inner_products_by_hand(kernels):
    a, b = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[5.0, -1.0], [0.5, 2.0]])
    with kernels():
        assert row_products(a, b).tolist() == [3.0, 9.5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("second", FORMATS)
@pytest.mark.parametrize("first", FORMATS)
def test_inner_products_do_not_depend_on_the_memory_format(first, second, dtype, kernels):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(5, 3, 4, 2, generator=generator).to(dtype) for _ in range(2))
    exact = (a.double() * b.double()).flatten(1).sum(1)
    with kernels():
        products = row_products(a.contiguous(memory_format=FORMATS[first]), b.contiguous(memory_format=FORMATS[second]))
    rounding = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 2**-8}[dtype]
    torch.testing.assert_close(products.double(), exact, rtol=rounding, atol=0)


@pytest.mark.parametrize("layout", FORMATS)
def test_rows_are_taken_and_put_back(layout):
    x = torch.arange(48.0).view(4, 3, 2, 2).contiguous(memory_format=FORMATS[layout])
    members = (torch.tensor([2]), torch.tensor([3, 0, 1]))
    parts = split_rows(x, members)
    assert [part[:, 0, 0, 0].tolist() for part in parts] == [[24.0], [36.0, 0.0, 12.0]]
    assert torch.equal(merge_rows(parts, members), x)
    assert all(each.is_contiguous(memory_format=FORMATS[layout]) for each in (*parts, merge_rows(parts, members)))
