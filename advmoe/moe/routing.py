"""A forward pass's routing as a value: how experts are chosen, and what was chosen.

Axes: `N` batch, `L` MoE layers, `E` experts, `T` tokens.

Routing is per image, but in a model whose tokens are routed one by one: scores, choices and pathways there have one
more axis, `T`, after those named here.

MoE layers sit deep inside arbitrary backbones, whose `forward` takes only an image. So the routing of a pass travels
in a context, not in arguments or on modules:

    with route("soft", temperature=0.5) as routing:
        logits = model(x)
    routing.pathway()  # (N, L)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from advmoe.moe.dispatch import Plan
from advmoe.precision import full_fp32

RoutingMode = Literal["hard", "soft", "masked", "gathered"]


@dataclass
class Routing:
    """One forward pass's routing.

    Modes: `hard` computes the chosen expert only; `masked` computes every expert and keeps the chosen one (the
    reference); `soft` mixes all experts by softmax(scores / temperature), a differentiable surrogate; `gathered` picks
    the chosen expert's weights by index, for a batch of one and without gradients: a graph that can be exported.
    `forced` (N, L), where given, overrules the routers' choice: for all tokens of an image alike, or, where tokens are
    routed one by one, as (N, L, T) for each.
    """

    mode: RoutingMode = "hard"
    temperature: float = 1.0
    forced: Tensor | None = None
    scores: dict[int, Tensor] = field(default_factory=dict)
    """Scores (N, E) of each MoE layer that ran, by layer index."""
    choices: dict[int, Tensor] = field(default_factory=dict)
    """Chosen expert (N,) of each MoE layer that ran, by layer index."""
    shared: list[Tensor] = field(default_factory=list)
    """Scores made from the image ahead of all layers, one entry per layer; empty with a router in each layer."""
    one_pass: bool = False
    """Whether a model's forward pass is under way, in which a layer that runs again keeps its choice."""
    shares: bool = False
    """Whether that pass may split the gradient of an activation among several tensors (see `rectifier`)."""
    _plans: list[tuple[Tensor, Tensor, Plan]] = field(default_factory=list)

    def choose(self, layer: int, scores: Tensor) -> Tensor:
        """Record `scores` of `layer`, (N, E) or (N, T, E), and return the choice, (N,) or (N, T)."""
        if self.forced is None:
            choice = scores.argmax(-1)
        else:
            shape = tuple(self.forced.shape)
            if len(shape) < 2 or shape[0] != len(scores) or shape[2:] not in ((), scores.shape[1:-1]):
                rule = f"(N, L) with N = {len(scores)}"
                if scores.dim() == 3:
                    rule = f"(N, L) or (N, L, T) with N = {len(scores)}, T = {scores.shape[1]}"
                raise ValueError(f"forced must be {rule}, got shape {shape}")
            choice, experts = self.forced[:, layer].to(scores.device, torch.long), scores.shape[-1]
            # On a GPU looking would take a wait; there an index that is too large is an error of its own.
            if choice.device.type == "cpu" and not bool(((choice >= 0) & (choice < experts)).all()):
                raise ValueError(f"forced must hold experts from 0 to {experts - 1}, got {choice.unique().tolist()}")
            if choice.dim() < scores.dim() - 1:
                choice = choice[:, None].expand(scores.shape[:-1])
        self.scores[layer], self.choices[layer] = scores, choice
        return choice

    def plan(self, scores: Tensor, choice: Tensor) -> Plan:
        """The dispatch plan of `choice`; made once where layers share their scores (one router for all layers)."""
        if self.forced is None:
            for known, _, plan in self._plans:
                if known is scores:
                    return plan
        plan = Plan.of(choice, scores.shape[1])
        if self.shared:
            self._plans = [(scores, choice, plan)]
        return plan

    def pathway(self) -> Tensor:
        """The expert index per sample and MoE layer, (N, L); (N, L, T) where tokens are routed one by one."""
        return torch.stack([self.choices[layer] for layer in sorted(self.choices)], 1)


_active: ContextVar[Routing | None] = ContextVar("advmoe_routing", default=None)


def active_routing() -> Routing:
    """The routing of the forward pass under way; plain hard routing where no `route` is open."""
    return _active.get() or Routing()


@contextmanager
def opened(routing: Routing) -> Iterator[Routing]:
    """Make `routing` the active one."""
    token = _active.set(routing)
    try:
        yield routing
    finally:
        _active.reset(token)


@contextmanager
def forward_scope(*, shares: bool = False) -> Iterator[Routing]:
    """The active routing, emptied for a new forward pass; a fresh one where none is open. `shares`: see `Routing`."""
    routing = _active.get()
    if routing is None:
        with opened(Routing(one_pass=True, shares=shares)) as routing:
            yield routing
        return
    for record in (routing.scores, routing.choices, routing.shared, routing._plans):
        record.clear()
    before = routing.one_pass, routing.shares
    routing.one_pass, routing.shares = True, shares
    try:
        yield routing
    finally:
        routing.one_pass, routing.shares = before


@contextmanager
def route(mode: RoutingMode = "hard", *, temperature: float = 1.0, forced: Tensor | None = None) -> Iterator[Routing]:
    """Route the forward passes inside by `mode`; the value yielded holds the last pass's scores and choices.

    Raises `ValueError` for an unknown mode or a temperature that is not positive.
    """
    if mode not in get_args(RoutingMode):
        raise ValueError(f"mode must be one of {', '.join(get_args(RoutingMode))}, got {mode!r}")
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature!r}")
    with opened(Routing(mode, temperature, forced)) as routing:
        yield routing


def soft_routing(model: Callable[[Tensor], Tensor], temperature: float = 1.0) -> Callable[[Tensor], Tensor]:
    """`model` as a callable that mixes experts by softmax(scores / temperature): a surrogate for gradients, not for
    scoring.
    """

    def predict(x: Tensor) -> Tensor:
        with route("soft", temperature=temperature):
            return model(x)

    return predict


def pathway(model: nn.Module, x: Tensor) -> Tensor:
    """The expert index per sample and MoE layer, (N, L), for images `x` (N, C, H, W) in [0, 1]; (N, 0) for a plain
    model, (N, L, T) for one whose tokens are routed one by one (`route_per="token"`).

    The model is run in eval mode, and left in the mode it was in. What it computes in fp32 is not rounded to less
    (TF32), as in evaluations: between experts whose scores are close that would decide.
    """
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with full_fp32(), torch.no_grad(), route() as routing:
            model(x)
    finally:
        for module, training in was_training.items():
            module.training = training
    return routing.pathway() if routing.choices else torch.empty(len(x), 0, dtype=torch.long, device=x.device)
