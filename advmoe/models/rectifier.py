"""ReLU of a residual sum, and the mean over its pixels, with which the next layer's router begins.

Axes: `N` batch, `C` channels, `H W` size.
"""

from __future__ import annotations

from torch import Tensor, nn

from advmoe.moe.routing import active_routing
from advmoe.ops import Rectified, rectify


class Rectifier(nn.ReLU):
    """ReLU, in place: nothing else needs its input. With `pools` it also takes the mean over pixels, with which the
    router of the MoE layer behind it begins.
    """

    def __init__(self, *, pools: bool = False) -> None:
        super().__init__(inplace=True)
        self.pools = pools

    def forward(self, y: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """max(y + shortcut, 0) for `y` (N, C, H, W), which it overwrites."""
        return registered(rectify(y, shortcut, pool=self.pools))


def registered(rectified: Rectified) -> Tensor:
    """The activations (N, C, H, W); the pass's routing takes in their pool and second use (`Routing.keep_beside`)."""
    x, pooled, again = rectified
    if pooled is not None or again is not None:
        active_routing().keep_beside(x, pooled, again)
    return x
