"""Which tensors the kernels take, and that threads change no result."""

import pytest
import torch
from kernel_checks import PRECISIONS, batch, kernels
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from advmoe.ops import raw

pytestmark = kernels


def test_what_suits_is_plain_memory_that_nobody_watches():
    x = batch(2, 8, 3, 3)
    assert raw.suits(x) and raw.suits(x, nn.Parameter(x))
    with raw.without_kernels():
        assert not raw.suits(x)
    assert not raw.suits(x.double())
    assert not raw.suits(x, x.bfloat16())
    assert not raw.suits(x.contiguous())
    assert not raw.suits(x.to("meta"))
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
        assert not raw.suits(fake)
    assert not raw.suits(fake)
    with FlopCounterMode(display=False):
        assert not raw.suits(x)
    seen = []
    torch.func.vmap(lambda each: seen.append(raw.suits(each)) or each)(x[None])
    assert seen == [False]


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_results_do_not_depend_on_threads(dtype):
    x, choice = batch(9, 32, 6, 6, dtype=dtype), torch.arange(9) % 2
    made = raw.Packed.of(batch(64, 32, 3, 3, dtype=dtype).view(2, 32, 32, 3, 3), None, (1, 1), (1, 1))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            y = made.convolve(x, choice)
            results.append((y, *made.backward(y, x, choice, products=True), raw.pooled(x), raw.products(x, x)))
    finally:
        torch.set_num_threads(before)
    for one, three in zip(*results, strict=True):
        assert torch.equal(one, three)
