"""What the operations' tests share."""

import contextlib

import pytest

from advmoe.ops import without_kernels


@pytest.fixture(params=[contextlib.nullcontext, without_kernels], ids=["kernels", "PyTorch"])
def kernels(request):
    """A context with the kernels that this machine has, and one without any: an operation computes the same in both."""
    return request.param
