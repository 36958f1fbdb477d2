"""ReLU behind a residual sum, of which the router behind it takes the pool.

Axes: `N` batch, `C` channels, `H W` size.
"""

from __future__ import annotations

from torch import Tensor, nn

from advmoe.moe.routing import active_routing
from advmoe.ops import Rectified, rectify


class Rectifier(nn.ReLU):
    """ReLU, in place, of what nothing else needs as it was; with `pools`, an MoE layer's router stands behind it, which
    begins with the mean over pixels.
    """

    def __init__(self, *, pools: bool = False) -> None:
        super().__init__(inplace=True)
        self.pools = pools

    def forward(self, y: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """max(y + shortcut, 0) for `y` (N, C, H, W), which it overwrites."""
        return kept(rectify(y, shortcut, pool=self.pools))


def kept(made: Rectified) -> Tensor:
    """What was rectified; the rest of it is known to this pass from now on (`Routing.keep_beside`)."""
    x, pooled, again = made
    if pooled is not None or again is not None:
        active_routing().keep_beside(x, pooled, again)
    return x
