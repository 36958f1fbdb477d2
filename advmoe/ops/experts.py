"""Each sample by its own expert, for layers of so few filters that grouping the samples by expert would cost more.

Axes: `N` batch, `C` channels, `H W` size, `M` rows of a bank, `R` rows of one expert, `E` experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from advmoe.ops import raw
from advmoe.ops.once import once

_LANES = 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8
"""Output channels of fp32 that a CPU's convolutions compute at once: fewer take as long."""


def chosen(every: Tensor, choice: Tensor) -> Tensor:
    """every[n, choice[n]] for each sample, (N, ...), of all experts' outputs `every` (N, E, ...)."""
    if torch.compiler.is_dynamo_compiling():
        # Not `where`: fused with a batch norm's statistics, inductor (2.13, CPU) mixed up the samples of large batches.
        index = choice.view(-1, *[1] * (every.dim() - 1)).expand(-1, 1, *every.shape[2:])
        return every.gather(1, index)[:, 0]
    if every.is_cuda and not raw.as_written():
        picked: Tensor = _Picked.apply(every, choice)  # type: ignore[no-untyped-call]
        return picked
    y = every[:, 0]  # not by `unbind`, whose parts a network could not change in place
    for expert, other in enumerate(every[:, 1:].unbind(1), 1):
        # Not the faster `lerp`: what is not finite in one expert would spoil the other's samples.
        y = torch.where((choice == expert).view(-1, *[1] * (y.dim() - 1)), other, y)
    return y


class _Picked(torch.autograd.Function):
    """`chosen` in one launch forward and two backward, whatever the number of experts. No atomics: an output has one
    place in `every`.
    """

    @staticmethod
    def forward(ctx: Any, every: Tensor, choice: Tensor) -> Tensor:
        pixels_first = _pixels_first(every)
        axis = pixels_first.dim() - 2
        shape = list(pixels_first.shape)
        shape[axis] = 1
        index = choice.view(-1, *[1] * (len(shape) - 1)).expand(shape)
        ctx.save_for_backward(index)
        ctx.shape = pixels_first.shape
        size = [len(every), *every.shape[2:]]
        layout = [0, *range(2, len(size)), 1]
        y = torch.empty_permuted(size, layout, dtype=every.dtype, device=every.device)
        torch.gather(pixels_first, axis, index, out=y.movedim(1, -1).unsqueeze(axis))
        return y

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        axis = len(ctx.shape) - 2
        every = grad.new_zeros(ctx.shape).scatter_(axis, index, grad.movedim(1, -1).unsqueeze(axis))
        return every.movedim((-2, -1), (1, 2)), None


def _pixels_first(every: Tensor) -> Tensor:
    """(N, E, C, H, W) as (N, H, W, E, C), and (N, E, C) as it is: in memory, where images are channels-last."""
    return every.movedim((1, 2), (-2, -1))


def fits_a_vector(x: Tensor, channels: int) -> bool:
    """Whether all experts' `channels` together fit a CPU's vector: then all their outputs take a convolution of `x` the
    time of one expert's, and there are few to choose from (`chosen`). In DenseNet-BC-40 (24 channels to
    6, batch 64, two threads) a layer takes 2.4 ms so and 2.8 ms grouped; one expert for all 2.1 ms.
    """
    # As many as there are lanes take a sixth longer.
    return channels < _LANES and x.device.type == "cpu" and not torch.is_grad_enabled()


def pointwise(x: Tensor, choice: Tensor, banks: tuple[Tensor, ...], rows: Tensor) -> Tensor | None:
    """The 1x1 convolution of each sample of `x` (N, C, H, W) with its own expert's rows of `banks`, filters
    (M, C, 1, 1) and perhaps biases (M,): (N, R, H, W), as one batched product of its pixels with its filters. `rows`
    (E, R) says which are whose. None where that is slower.

    Grouping would copy activations twice, which for narrow ones costs as much as the convolution: DenseNet-BC-40, half
    the images to each expert, took 1.5 times S-Dense with it and takes 1.3 times. Wide ones are better as convolutions.
    """
    (n, c, h, w), (experts, c_out) = x.shape, rows.shape
    # Multiplications for each number that is moved; and a sample's filters beside its pixels.
    if c * c_out > min(32, h * w // 2) * (c + c_out):
        return None
    filters = banks[0].index_select(0, rows[choice].flatten()).view(n, c_out, c)
    if x.is_contiguous(memory_format=torch.channels_last):
        y = torch.bmm(x.permute(0, 2, 3, 1).view(n, h * w, c), filters.transpose(1, 2))
        y = y.view(n, h, w, c_out).permute(0, 3, 1, 2)
    else:
        y = torch.bmm(filters, x.flatten(2)).view(n, c_out, h, w)
    return y + banks[1].view(experts, -1)[choice][:, :, None, None] if len(banks) == 2 else y
