"""Kernels of our own for routed networks on CPUs, on channels-last tensors. Autograd knows of none of them.

Each has a condition (`suits`, `rectifies`, `Packed.suits`) under which it may be called; elsewhere PyTorch's operations
do the same.

Axes: `N` batch, `C` channels, `H W` size, `E` experts, `k` kernel.
"""

from advmoe.ops.raw.activations import (
    Gradients,
    Normed,
    Parts,
    mixed,
    mixes,
    norm_rectify,
    pooled,
    products,
    rectifies,
    rectify,
    unmixed,
    unnorm_rectify,
    unrectify,
    unsplit,
)
from advmoe.ops.raw.convolution import LayerOutput, Packed, whole_layer
from advmoe.ops.raw.routers import Scorer, chosen_probability, chosen_probability_backward
from advmoe.ops.raw.tensors import LANES, as_written, available, eager, kernels_used, missing, suits, without_kernels

__all__ = [
    "LANES",
    "Gradients",
    "LayerOutput",
    "Normed",
    "Packed",
    "Parts",
    "Scorer",
    "as_written",
    "available",
    "chosen_probability",
    "chosen_probability_backward",
    "eager",
    "kernels_used",
    "missing",
    "mixed",
    "mixes",
    "norm_rectify",
    "pooled",
    "products",
    "rectifies",
    "rectify",
    "suits",
    "unmixed",
    "unnorm_rectify",
    "unrectify",
    "unsplit",
    "whole_layer",
    "without_kernels",
]
