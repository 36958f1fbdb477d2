"""What every model here is at its outermost: from [0, 1] pixels to logits.

Axes: `N` batch, `C` channels, `H W` size, `K` classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from advmoe.models.modes import evaluating
from advmoe.models.predictions import Picture, predict
from advmoe.moe.halfspace import HalfspaceRouter
from advmoe.moe.repeats import unrecorded
from advmoe.moe.routers import RouterOwner
from advmoe.moe.routing import Routing, forward_scope, keep, route
from advmoe.ops import heard


@dataclass(frozen=True)
class Origin:
    """Where a model was loaded from."""

    digest: str
    """Of the model as it was then (`state.digest`)."""
    run: Path | None = None
    """The run directory, or the folder of a checkpoint."""


class Classifier(RouterOwner):
    """[0, 1] pixels (N, C, H, W) -> logits (N, K): normalisation, the router that sees the image if any, the backbone.

    `spec` holds what rebuilds it: the arguments of `create_model`, or for a module of the user's own those of `to_moe`.
    `origin` is where it was loaded from, if it was; what has been done to it since does not show there.
    """

    def __init__(
        self, normalize: nn.Module, backbone: nn.Module, router: nn.Module | None, spec: dict[str, Any]
    ) -> None:
        super().__init__()
        self.normalize, self.backbone, self.router, self.spec = normalize, backbone, router, spec
        self.origin: Origin | None = None
        self._pixels_looked_at = False

    def predict(self, pictures: Picture | Sequence[Picture], *, top: int = 5) -> Any:
        """What the model says of pictures: a `Prediction` (names, probabilities, pathway) of one, a list of several.

        Args:
            pictures: a file, an image of Pillow's, bytes (H, W) or (H, W, C), pixels (C, H, W) in [0, 1]; or several: a
                list of them, or a batch of pixels (N, C, H, W). Pictures of other sizes are cut and resized as the
                images were that the model was trained for.
            top: how many of the most probable classes.

        Raises `ValueError` that names the first picture which cannot be used. The model computes in eval mode, on its
        own device; each of its parts is left in the mode it is in.
        """
        device = next(self.parameters()).device

        @torch.no_grad()
        def network(x: Tensor) -> tuple[Tensor, Tensor | None]:
            with route() as routing:
                logits = self(x.to(device))
            return logits.float().cpu(), routing.pathway().cpu() if routing.choices else None

        with evaluating(self):
            return predict(network, self.spec, pictures, top)

    @property
    def routed(self) -> bool:
        """Whether the model has MoE layers."""
        return bool(self.spec["kind"] == "moe")

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, K), under the active routing."""
        tracing = torch.compiler.is_compiling()
        if not self._pixels_looked_at and not tracing:
            self._pixels_looked_at = True
            _point_out(x, self.spec)
        shares = not tracing and not (torch.is_grad_enabled() and heard(self))
        with forward_scope(shares=shares) as routing:
            logits = self.routed_by(routing, x)
            keep(logits)
            return logits

    def routed_by(self, routing: Routing, x: Tensor) -> Tensor:
        """Logits (N, K) of pixels `x` in the pass that has this `routing`, which is the active one."""
        pixels, x = x, self.normalize(x)
        if self.router is not None:
            seen = pixels if isinstance(self.router, HalfspaceRouter) else x
            with nullcontext() if routing.repeats is None else unrecorded(self.router):
                routing.shared = self.router(seen)
        logits: Tensor = self.backbone(x)
        return logits


def _point_out(x: Tensor, spec: dict[str, Any]) -> None:
    """Warn of images of another size than the model's, and of pixels beyond [0, 1]: logits come out all the same."""
    size = spec["input_size"]
    if size is not None and x.ndim == 4 and tuple(x.shape[2:]) != (size, size):
        got = "x".join(map(str, x.shape[2:]))
        warnings.warn(f"the model was made for images of {size}x{size} pixels, got {got}", stacklevel=5)
    if x.numel() and type(x) is Tensor and not x.is_meta:  # no tracer, no outline of a tensor
        low, high = (value.item() for value in torch.aminmax(x.detach()))
        if low < -0.5 or high > 1.5:  # attacks of one's own may step a little beyond
            warnings.warn(f"pixels must be in [0, 1], not normalised, got {low:.4g} to {high:.4g}", stacklevel=5)
