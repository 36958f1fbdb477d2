"""The MoE convolution: a bank of filters, of which each sample uses one expert's.

Axes: `N` batch, `C_in C_out` channels of one pathway (r times the backbone's), `G` groups, `M` rows of the bank, `E`
experts, `k` kernel.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advmoe import ops
from advmoe.errors import InputError, require_whole, whole
from advmoe.moe.described import Described
from advmoe.moe.layer import MoELayer
from advmoe.moe.routers import LayerRouter, MakeRouter
from advmoe.moe.ways import Output
from advmoe.text import show

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


class MoEConv2d(MoELayer):
    """A convolution of which every sample computes one expert, chosen by a router.

    Args:
        c_in, c_out: channels of one pathway. The rest is as of `torch.nn.Conv2d` and `MoELayer`.
        make_router: makes the layer's own router; None where scores are made ahead of all layers.
        shared_init: whether the experts start as copies of one another.

    Raises `ValueError` for a setting that no convolution can have.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        *,
        bank_rows: int,
        num_experts: int,
        layer: int,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
        padding_mode: str = "zeros",
        make_router: MakeRouter | None = LayerRouter,
        shared_init: bool = False,
    ) -> None:
        for name, number in (("c_in", c_in), ("c_out", c_out), ("groups", groups)):
            require_whole(name, number, 1)
        if c_in % groups or c_out % groups:
            raise InputError(f"groups must divide c_in={c_in} and c_out={c_out}, got {groups!r}")
        if padding_mode not in PADDING_MODES:
            raise InputError(f"padding_mode must be one of {', '.join(PADDING_MODES)}, got {padding_mode!r}")
        router = make_router(c_in, num_experts) if make_router else None
        super().__init__(
            bank_rows=bank_rows, expert_rows=c_out, num_experts=num_experts, layer=layer, router=router
        )  # fmt: skip
        given = {"kernel_size": kernel_size, "stride": stride, "dilation": dilation}
        for name, size in {**given, **({} if isinstance(padding, str) else {"padding": padding})}.items():
            _require_sizes(name, size, least=0 if name == "padding" else 1)
        kernel = _pair(kernel_size)
        self.c_in, self.c_out, self.groups = c_in, c_out, groups
        self.in_channels, self.out_channels, self.kernel_size = c_in, c_out, kernel  # as a `Conv2d` calls them
        self.stride, self.dilation = _pair(stride), _pair(dilation)
        self.padding = padding if isinstance(padding, str) else _pair(padding)
        self.transposed, self.output_padding = False, (0, 0)
        sides = _padded_sides(kernel, _pair(stride), padding, _pair(dilation))
        # The convolution pads with zeros itself; any other padding is a step before it.
        self.padding_mode, self.sides = padding_mode, None if padding_mode == "zeros" else sides
        self.bank = nn.Parameter(torch.empty(bank_rows, c_in // groups, *kernel))
        # The backbone's own initialisation: fan-out of one pathway, as in S-Dense.
        nn.init.normal_(self.bank, std=math.sqrt(2 * groups / (c_out * math.prod(kernel))))
        self.bias = nn.Parameter(torch.zeros(bank_rows)) if bias else None
        self.strided = kernel == (1, 1) and _pair(stride) != (1, 1) and not any(sides)
        self.pointwise = (kernel, _pair(stride), any(sides), groups, bias) == ((1, 1), (1, 1), False, 1, False)
        self.linear = not bias
        if shared_init:
            self.copy_first_expert()

    def banks(self) -> tuple[Tensor, ...]:
        """The filters (M, C_in / G, k, k) and, where there is a bias, its numbers (M,)."""
        return (self.bank,) if self.bias is None else (self.bank, self.bias)

    @property
    def weight(self) -> Described:
        """Type, place and shape of one expert's filters (C_out, C_in / G, k, k)."""
        return Described(self.bank, self.c_out, f"the weight of {self.title}")

    def packed(self, *banks: Tensor, once: Tensor | None = None) -> ops.Packed | None:
        """Filters (M, C_in, k, k) and biases (M,), if there are any, packed by `ops.pack`; None where it packs none."""
        if self.masks or self.kernels or not self.usual:
            return None
        filters, biases = banks if len(banks) == 2 else (banks[0], None)
        rows = None if self.apart else self.row_index
        assert not isinstance(self.padding, str)
        return ops.pack(
            filters, biases, _pair(self.stride), _pair(self.padding), experts=self.num_experts, rows=rows, once=once
        )

    @property
    def usual(self) -> bool:
        """Whether kernels of ours know such a convolution: one group, no dilation, zeros alike on opposite sides."""
        plain = self.sides is None and self.groups == 1 and _pair(self.dilation) == (1, 1)
        return plain and not isinstance(self.padding, str)

    def by_kernels(self, x: Tensor, gate: Tensor | None, choice: Tensor, *banks: Tensor) -> Output | None:
        """By `ops.routed`."""
        if not self.usual:
            return None
        assert not isinstance(self.padding, str)
        filters = tuple(map(self.each_expert, banks))
        return ops.routed(x, gate, choice, filters, _pair(self.stride), _pair(self.padding))

    def compute(self, x: Tensor, *weights: Tensor) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, H', W') with the filters (C_out, C_in / G, k, k) and the bias (C_out,), if
        any.
        """
        bias = weights[1] if len(weights) == 2 else None
        if self.strided:
            return F.conv2d(ops.kept_pixels(x, _pair(self.stride)), weights[0], bias, groups=self.groups)
        if self.sides is not None:
            x = F.pad(x, self.sides, self.padding_mode)
            if self.kernel_size == (1, 1):
                return F.conv2d(ops.kept_pixels(x, _pair(self.stride)), weights[0], bias, groups=self.groups)
            return F.conv2d(x, weights[0], bias, self.stride, 0, self.dilation, self.groups)
        return F.conv2d(x, weights[0], bias, self.stride, self.padding, self.dilation, self.groups)

    def compute_each(self, x: Tensor, choice: Tensor, *banks: Tensor) -> Tensor | None:
        """Each sample by its own expert, where it has so few filters that grouping costs more (`ops.experts`), or its
        filters are rows of a matrix (`ops.products`).
        """
        if self.pointwise:
            by_expert = ops.sorted_by_expert(x, choice, self.num_experts, self.c_in, self.c_out)
            if by_expert is not None:
                pixels, filters = by_expert.split(x).movedim(1, -1), self.each_expert(banks[0]).flatten(2)
                return by_expert.merge(by_expert.product(pixels, filters.mT).movedim(-1, 1))
            return ops.pointwise(x, choice, banks, self.row_index)
        if self.groups == 1 and ops.fits_a_vector(x, self.num_experts * self.c_out):
            return ops.chosen(self.compute_all(x, *banks), choice)
        return None

    def compute_all(self, x: Tensor, *banks: Tensor) -> Tensor:
        """Every expert's output, (N, E, C_out, H', W'), in one convolution."""
        outputs: Tensor
        each = [[self.of_expert(e, bank) for e in range(self.num_experts)] for bank in banks]
        if self.groups == 1:
            together = banks if self.apart else tuple(map(torch.cat, each))
            outputs = self.compute(x, *together).unflatten(1, (self.num_experts, self.c_out))
            return outputs
        # A group's filters must lie side by side: (G, E, C_out / G) of them, and of the channels that they make.
        share = self.c_out // self.groups
        by_group = [torch.stack([part.unflatten(0, (-1, share)) for part in parts], 1).flatten(0, 2) for parts in each]
        y = self.compute(x, *by_group).unflatten(1, (self.groups, self.num_experts, share))
        outputs = y.transpose(1, 2).flatten(2, 3)
        return outputs

    def extra_repr(self) -> str:
        """Shape, for `print(model)`."""
        return (
            f"{self.c_in}, {self.c_out}, experts={self.num_experts}, bank={tuple(self.bank.shape)}, layer={self.layer}"
        )


def _require_sizes(name: str, sizes: object, *, least: int) -> None:
    """Raise `InputError` unless `sizes` are a whole number, or two."""
    each = sizes if isinstance(sizes, tuple | list) else (sizes, sizes)
    if len(each) != 2 or not all(whole(size) and size >= least for size in each):
        raise InputError(f"{name} must be a whole number >= {least}, or two, got {show(sizes)}")


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _padded_sides(
    kernel: tuple[int, int], stride: tuple[int, int], padding: int | tuple[int, int] | str, dilation: tuple[int, int]
) -> list[int]:
    """What stands left, right, above and below of the image: `F.pad`'s order. Raises `ValueError`."""
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise InputError(f"padding must be a size, same or valid, got {padding!r}")
        if padding == "valid":
            return [0, 0, 0, 0]
        if stride != (1, 1):
            raise InputError(f"stride must be 1 where padding is same, got {stride!r}")
        (above, below), (left, right) = (
            (d * (k - 1) // 2, d * (k - 1) - d * (k - 1) // 2) for k, d in zip(kernel, dilation, strict=True)
        )
        return [left, right, above, below]
    vertical, horizontal = _pair(padding)
    return [horizontal, horizontal, vertical, vertical]
