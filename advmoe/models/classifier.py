"""What every model here is at its outermost: from [0, 1] pixels to logits.

Axes: `N` batch, `C` channels, `H W` size, `K` classes.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from advmoe.moe.repeats import unrecorded
from advmoe.moe.routers import RouterOwner
from advmoe.moe.routing import forward_scope, keep
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

    @property
    def routed(self) -> bool:
        """Whether the model has MoE layers."""
        return bool(self.spec["kind"] == "moe")

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, K), under the active routing."""
        shares = not torch.compiler.is_compiling() and not (torch.is_grad_enabled() and heard(self))
        with forward_scope(shares=shares) as routing:
            x = self.normalize(x)
            if self.router is not None:
                with nullcontext() if routing.repeats is None else unrecorded(self.router):
                    routing.shared = self.router(x)
            logits: Tensor = self.backbone(x)
            keep(logits)
            return logits
