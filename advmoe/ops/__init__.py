"""Operations of routed networks: the only place that knows that there are kernels.

Each is a function that says what it computes in PyTorch's terms, and does it faster where it can: `raw` calls the
kernels for CPUs (C++ in `csrc`), `triton_conv` has those for GPUs, autograd's functions stand below the one that uses
them, and where no kernel suits (other devices, a traced graph, `without_kernels`) PyTorch computes the definition.
"""

from advmoe.ops.convolution import Convolved, convolved, fixed_convolution, kept_pixels, pack, worth_packing
from advmoe.ops.experts import chosen, fits_a_vector, pointwise
from advmoe.ops.gate import chosen_probability, mix, straight_through
from advmoe.ops.grouping import Grouped, merge, split
from advmoe.ops.hooks import heard, hooked, listened
from advmoe.ops.norm import fixed_norm
from advmoe.ops.products import Sorted, sorted_by_expert
from advmoe.ops.raw import Packed, as_written, kernels_used, without_kernels
from advmoe.ops.rectifier import Rectified, norm_act, rectify
from advmoe.ops.routed import Routed, kernels_missing, routed, routed_linear
from advmoe.ops.routers import global_pool, router_scores, whole_layer

__all__ = [
    "Convolved",
    "Grouped",
    "Packed",
    "Rectified",
    "Routed",
    "Sorted",
    "as_written",
    "chosen",
    "chosen_probability",
    "convolved",
    "fits_a_vector",
    "fixed_convolution",
    "fixed_norm",
    "global_pool",
    "heard",
    "hooked",
    "kept_pixels",
    "kernels_missing",
    "kernels_used",
    "listened",
    "merge",
    "mix",
    "norm_act",
    "pack",
    "pointwise",
    "rectify",
    "routed",
    "routed_linear",
    "router_scores",
    "sorted_by_expert",
    "split",
    "straight_through",
    "whole_layer",
    "without_kernels",
    "worth_packing",
]
