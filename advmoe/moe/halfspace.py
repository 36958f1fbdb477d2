"""Routers whose choices can be proved: each is the side of a hyperplane on which the image lies.

Axes: `N` batch, `C` channels, `H W` size, `B` bits, `G` side of the grid, `L` MoE layers. Pixels are in [0, 1].

A bit of image x is w . x > t; w is constant on each cell of a G x G grid, hence of low frequency. In linf the bit keeps
its value within |w . x - t| / ||w||_1 of x (in l2: / ||w||_2), and further where pixels stop at 0 and 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advmoe.errors import InputError
from advmoe.moe.routers import FullPrecision

GRID = 4
STEEPNESS = 32.0
"""Scores in units of the linf radius: experts differ by 1 where a choice has room for 8/255."""

_FORMS: dict[str, tuple[tuple[int, ...], ...]] = {
    "top": ((0,),), "top-bottom": ((0,), (GRID - 1,)), "mean": (tuple(range(GRID)),), "late": ((), (0,)),
}  # fmt: skip
"""Of each form the grid's rows whose mean brightness is a bit; a bit of no rows is never set."""


class HalfspaceRouter(FullPrecision):
    """[0, 1] pixels, not normalised -> scores (N, 2) for each of the L layers, from B bits.

    Layer l takes expert 1 where bit floor(l B / L) is set: with two bits the first drives the first half of the layers,
    the second the others. Of more bits than layers the last are kept. At the threshold itself a bit is not set.

    A learnt w has the mean of w . x for its threshold: of the batch in train mode, of those before (a running mean, as
    of batch norms: of the process's own batch, of two images at least) in eval mode. A threshold that learnt would run
    away, for a route that is the same for all images is the safest.

    Args:
        weight: of each cell's mean, (B, C, G, G). learnt: whether it is a parameter.

    Raises `ValueError` for another number of experts than two, and for more bits than two.
    """

    weight: Tensor

    def __init__(self, weight: Tensor, num_layers: int, num_experts: int, *, learnt: bool) -> None:
        super().__init__()
        if num_experts != 2:
            raise InputError(f"model.num_experts must be 2 for a router that chooses by bits, got {num_experts!r}")
        if len(weight) not in (1, 2):
            raise InputError(f"weight must be of one bit or two, got {len(weight)}")
        weight = weight[-num_layers:]
        self.num_layers, self.learnt = num_layers, learnt
        threshold = weight.flatten(1).sum(1) / 2  # of an image of middle grey
        threshold[_empty(weight)] = 1.0
        if learnt:
            self.weight, self.centre = nn.Parameter(weight), nn.BatchNorm1d(len(weight), affine=False)
            self.centre.running_mean = threshold
        else:
            self.register_buffer("weight", weight)
            self.register_buffer("threshold", threshold)

    @property
    def layers(self) -> list[int]:
        """The bit of each layer."""
        return [layer * len(self.weight) // self.num_layers for layer in range(self.num_layers)]

    @property
    def thresholds(self) -> Tensor:
        """t of each bit in eval mode, (B,): a buffer, to be written in place."""
        thresholds = self.centre.running_mean if self.learnt else self.threshold
        assert isinstance(thresholds, Tensor)
        return thresholds

    def projections(self, x: Tensor) -> Tensor:
        """w . x of each bit, (N, B), for pixels `x` (N, C, H, W)."""
        return F.linear(F.adaptive_avg_pool2d(x, GRID).flatten(1), self.weight.flatten(1))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Scores (N, 2) of each of the L layers for pixels `x` (N, C, H, W) in [0, 1]."""
        half = self._halves(x)
        scores = torch.stack([-half, half], 2).unbind(1)
        return [scores[bit] for bit in self.layers]

    def bits(self, x: Tensor) -> Tensor:
        """Whether each bit is set of pixels `x` (N, C, H, W), as the scores have it, (N, B)."""
        return self._halves(x) > 0

    def _halves(self, x: Tensor) -> Tensor:
        """The score of expert 1 by each bit, (N, B); expert 0 has its negative."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            projections = self.projections(x)
            if self.learnt and self.centre.training:  # which may be so alone, when statistics are estimated anew
                self.centre(projections)  # records their mean
            return STEEPNESS / 2 * self._distances(projections) / self._norm("linf", x)

    def _distances(self, projections: Tensor) -> Tensor:
        """w . x - t, (N, B), of w . x."""
        return projections - (projections.mean(0) if self.learnt and self.training else self.thresholds)

    def radii(self, x: Tensor, norm: Literal["linf", "l2"]) -> Tensor:
        """|w . x - t| / ||w||_1 (l2: / ||w||_2) of each bit, (N, B), were pixels free to leave [0, 1].

        Exact where the images' sides are multiples of `GRID`; cells overlap by a pixel otherwise.
        """
        with torch.autocast(x.device.type, enabled=False):
            radii: Tensor = self._distances(self.projections(x.float())).abs() / self._norm(norm, x)
        return radii

    def _norm(self, norm: str, x: Tensor) -> Tensor:
        """The dual norm of each bit's w, (B,): a cell shares its weight out among its pixels."""
        cells = self.weight.flatten(1)
        size: Tensor = torch.linalg.vector_norm(cells, 1 if norm == "linf" else 2, dim=1)
        pixels: float = 1 if norm == "linf" else x.shape[2] * x.shape[3] / GRID**2
        return size.div(pixels**0.5).clamp_min(1e-12)

    @torch.no_grad()
    def fit(self, batches: Iterable[Tensor]) -> None:
        """Put each threshold at the median over images, pixels (N, C, H, W), that of learnt weights at the mean: both
        experts get about half of them.
        """
        projections = torch.cat([self.projections(x) for x in batches])
        middle = projections.mean(0) if self.learnt else projections.quantile(0.5, dim=0)
        self.thresholds.copy_(torch.where(_empty(self.weight), self.thresholds, middle))

    def pixel_weights(self, channels: int, height: int, width: int) -> Tensor:
        """w of each bit as an image, (B, C, H, W) in fp64."""
        weight = self.weight.detach().double()
        x = torch.zeros(len(weight), channels, height, width, dtype=weight.dtype, device=weight.device)
        x.requires_grad_()
        with torch.enable_grad():
            value = (F.adaptive_avg_pool2d(x, GRID) * weight).sum()
            (weights,) = torch.autograd.grad(value, x)
        return weights


def _empty(weight: Tensor) -> Tensor:
    """Which bits no image sets, (B,)."""
    return (weight == 0).flatten(1).all(1)


def fixed_router(
    in_channels: int, width: int, num_layers: int, num_experts: int, *, pool: int = 1, form: str
) -> HalfspaceRouter:
    """A router that nothing trains: bits are the mean brightness of the image's `top` quarter, of `top-bottom` quarters
    (two bits), or of all (`mean`). `late` is `top` in the second half of the layers; the first half has expert 0 alone.
    """
    weight = torch.zeros(len(_FORMS[form]), in_channels, GRID, GRID)
    for bit, rows in enumerate(_FORMS[form]):
        weight[bit, :, list(rows)] = 1 / (in_channels * GRID * max(1, len(rows)))
    return HalfspaceRouter(weight, num_layers, num_experts, learnt=False)


def linear_router(
    in_channels: int, width: int, num_layers: int, num_experts: int, *, pool: int = 1, bits: int
) -> HalfspaceRouter:
    """A router of so many `bits` whose weights are random first, then learnt through the straight-through estimate."""
    return HalfspaceRouter(torch.randn(bits, in_channels, GRID, GRID), num_layers, num_experts, learnt=True)
