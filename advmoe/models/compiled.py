"""`torch.compile` for a classifier: a pass as one graph where its MoE layers allow that, or in pieces between them.

Axes: `N` batch, `C` channels, `H W` size, `K` classes, `E` experts, `L` MoE layers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from advmoe.models.classifier import Classifier
from advmoe.moe.layer import moe_layers
from advmoe.moe.routing import Routing, RoutingMode, active_routing, in_graph
from advmoe.progress import tell
from advmoe.text import one_line

_RECOMPILES = 64
"""Models share their code, which is compiled anew for each shape and each mode (attack, loss, measurement)."""
Network = Callable[[Tensor], Tensor]
"""Pixels (N, C, H, W) in [0, 1] -> logits (N, K), under the active routing."""


class Pass(NamedTuple):
    """What a pass computes."""

    logits: Tensor
    """(N, K)."""
    scores: dict[int, Tensor]
    """(N, E) of each MoE layer, by its index."""
    choices: dict[int, Tensor]
    """(N,), likewise."""
    shared: list[Tensor]
    """As of `Routing`."""


def routed_pass(
    model: Classifier,
    x: Tensor,
    mode: RoutingMode = "hard",
    temperature: float = 1.0,
    forced: Tensor | None = None,
    gated: bool = True,
) -> Pass:
    """The pass of `model` over pixels `x` (N, C, H, W), routed as `Routing` says, as a function of its arguments: with
    no context around it, so that `torch.compile(..., fullgraph=True)` takes it, which it is for.
    """
    routing = Routing(mode, temperature, forced, gated, one_pass=True)
    with in_graph(routing):
        logits = model.routed_by(routing, x)
    return Pass(logits, routing.scores, routing.choices, routing.shared)


class WholePasses:
    """A classifier as a `Network`, each of whose passes is one graph; what it chose is in the active routing, as ever.

    A graph is made for each use: a mode of routing, train or eval, what learns, a precision. A second batch size makes
    one for any. Where PyTorch cannot trace the model, a note says so, and it is compiled in pieces (`compile_model`).
    """

    def __init__(self, model: Classifier, **options: Any) -> None:
        """`options` are those of `torch.compile`."""
        _raise_limit()
        self.model = model
        self.graph: Callable[..., Pass] | None = torch.compile(partial(routed_pass, model), fullgraph=True, **options)

    def __call__(self, x: Tensor) -> Tensor:
        """Logits (N, K) of pixels `x` (N, C, H, W)."""
        if self.graph is None:
            return self.model(x)  # type: ignore[no-any-return]
        routing = active_routing()
        try:
            made = self.graph(x, routing.mode, routing.temperature, routing.forced, routing.gated)
        except torch._dynamo.exc.Unsupported as error:
            logits: Tensor = self.model(x)  # which raises an error of its own where the input is at fault
            tell(f"note  the model is compiled in pieces: PyTorch cannot trace it whole ({one_line(error, 200)})")
            self.graph = None
            compile_model(self.model)
            return logits
        routing.record(made.scores, made.choices, made.shared)
        return made.logits


def compiled(model: Classifier, **options: Any) -> Network:
    """`model`, compiled: `WholePasses` where every MoE layer computes all experts (`set_compute`) and routing needs no
    host, else in pieces (`compile_model`). `options` of `torch.compile` are those of whole passes.
    """
    return WholePasses(model, **options) if all(layer.masks for layer in moe_layers(model)) else compile_model(model)


def compile_model(model: Classifier) -> Classifier:
    """Have `torch.compile` speed up `model`'s backbone, in train and eval mode, from its next pass on; returns `model`.

    MoE layers run as they are, between compiled pieces: they group samples by a choice that they read on the host,
    which a compiled graph cannot. State dicts, modules and parameters keep their names.
    """
    _raise_limit()
    for layer in moe_layers(model):
        layer.forward = torch.compiler.disable(layer.forward)  # type: ignore[method-assign]
    model.backbone.compile()
    return model


def _raise_limit() -> None:
    torch._dynamo.config.recompile_limit = max(_RECOMPILES, torch._dynamo.config.recompile_limit)
