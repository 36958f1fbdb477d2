"""A forward pass's routing as a value: how experts are chosen, and what was chosen.

Axes: `N` batch, `L` MoE layers, `E` experts, `T` tokens.

Routing is per image, but in a model whose tokens are routed one by one: scores, choices and pathways there have one
more axis, `T`, after those named here.

MoE layers sit deep inside arbitrary backbones, whose `forward` takes only an image. So the routing of a pass travels
in a context, not in arguments or on modules:

    with route("soft", temperature=0.5) as routing:
        logits = model(x)
    routing.pathway()  # (N, L)

A backward pass that runs layers again (activation checkpointing) may do so in a thread of autograd's own, after the
context has closed or while another is open. There the context is not asked: a layer takes the routing of the forward
pass that it repeats, which is found by the node of the graph that the backward pass is at (see `repeats`).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from advmoe.errors import InputError, real
from advmoe.moe.dispatch import Plan, on_host
from advmoe.moe.repeats import Moment, Stretch, moment, stretches_of, stretching
from advmoe.precision import full_fp32
from advmoe.text import show

RoutingMode = Literal["hard", "soft", "masked", "gathered"]
_Beside = tuple["weakref.ref[Tensor]", int, Tensor | None, Tensor | None]
"""An activation and its version when it was remembered; its mean over pixels; its values for a second use."""


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
    gated: bool = True  # whether the choice has a gradient, straight through, or the pathway alone
    scores: dict[int, Tensor] = field(default_factory=dict)
    """Scores (N, E) of each MoE layer that ran, by layer index."""
    choices: dict[int, Tensor] = field(default_factory=dict)
    """Chosen expert (N,) of each MoE layer that ran, by layer index."""
    shared: list[Tensor] = field(default_factory=list)
    """Scores made from the image ahead of all layers, one entry per layer; empty with a router in each layer."""
    one_pass: bool = False
    """Whether a model's forward pass is under way, in which a layer that runs again keeps its choice."""
    shares: bool = False
    """Whether that pass may split the gradient of an activation among several tensors (see `keep_beside`)."""
    again: dict[int, Tensor] = field(default_factory=dict)
    """Scores (N, E), without their graph, of each layer that ran more than once in the pass, by layer index."""
    repeats: Routing | None = None
    """The finished pass of which this one repeats a part in a backward pass, recording nothing twice."""
    _plans: list[tuple[Tensor, Tensor, Plan]] = field(default_factory=list)
    _beside_of: dict[int, _Beside] = field(default_factory=dict)
    """What is known beside an activation, by its id, for as long as it lives."""
    _ends: list[tuple[int, int]] | None = None
    """The least and the largest expert that `forced` holds for each layer, on an accelerator, once they are known."""
    _unseen: dict[int, int] = field(default_factory=dict)
    """The number of experts of each layer that has run before they are."""

    def settings(self) -> Routing:
        """How a pass is to be routed, without what one recorded."""
        return Routing(self.mode, self.temperature, self.forced, self.gated)

    def choose(self, layer: int, scores: Tensor) -> Tensor:
        """Record `scores` of `layer`, (N, E) or (N, T, E), and return the choice, (N,) or (N, T)."""
        first = None if self.repeats is None else self.repeats.choices.get(layer)
        if first is not None and first.shape == scores.shape[:-1]:
            choice = first
        elif self.forced is None:
            choice = scores.argmax(-1)
        else:
            choice = self._forced(layer, scores)
        self.choices[layer] = choice
        if self.repeats is None or not self.repeats.one_pass or layer in self.repeats.again:
            self.scores[layer] = scores
        return choice

    def _forced(self, layer: int, scores: Tensor) -> Tensor:
        """The choice that `forced` holds for `layer`, (N,) or (N, T)."""
        assert self.forced is not None
        shape, experts = tuple(self.forced.shape), scores.shape[-1]
        if len(shape) < 2 or shape[0] != len(scores) or shape[2:] not in ((), scores.shape[1:-1]):
            rule = f"(N, L) with N = {len(scores)}"
            if scores.dim() == 3:
                rule = f"(N, L) or (N, L, T) with N = {len(scores)}, T = {scores.shape[1]}"
            raise InputError(f"forced must be {rule}, got shape {shape}")
        if layer >= shape[1]:
            raise InputError(f"forced must be (N, L) with L > {layer}, as MoE layer {layer} runs, got shape {shape}")
        if self.forced.is_floating_point() or self.forced.is_complex():
            raise InputError(f"forced must hold whole numbers, got {self.forced.dtype}")
        choice = self.forced[:, layer]
        if torch.compiler.is_dynamo_compiling():
            choice = choice.clamp(0, experts - 1)  # looked at behind the graph (`record`)
        elif on_host(choice):
            if not bool(((choice >= 0) & (choice < experts)).all()):
                raise InputError(f"forced must hold experts from 0 to {experts - 1}, got {choice.unique().tolist()}")
        elif self._ends is not None:
            self._require(layer, experts)
        else:  # looked at when the device is waited for anyway; until then nothing may be read beyond a bank's end
            self._unseen[layer] = experts
            choice = choice.clamp(0, experts - 1)
        choice = choice.to(scores.device, torch.long)
        return choice[:, None].expand(scores.shape[:-1]) if choice.dim() < scores.dim() - 1 else choice

    def _beside(self) -> Tensor | None:
        """The least and the largest expert that `forced` holds for each layer, (2 L,), where nobody has looked yet."""
        if not self._unseen or self.forced is None or self.forced.numel() == 0:
            return None
        each = self.forced.long().movedim(1, 0).flatten(1)
        return torch.cat([each.amin(1), each.amax(1)])

    def _look(self, ends: Sequence[int]) -> None:
        """Raise `InputError` where `forced` names an expert that there is not; `ends` are the values of `_beside`."""
        if ends:
            layers = len(ends) // 2
            self._ends = list(zip(ends[:layers], ends[layers:], strict=True))
            for layer, experts in self._unseen.items():
                self._require(layer, experts)
            self._unseen.clear()

    def _require(self, layer: int, experts: int) -> None:
        assert self._ends is not None
        least, largest = self._ends[layer]
        if least < 0 or largest >= experts:
            raise InputError(f"forced must hold experts from 0 to {experts - 1}, got {least} to {largest}")

    def record(self, scores: dict[int, Tensor], choices: dict[int, Tensor], shared: list[Tensor]) -> None:
        """Take in a pass that was computed elsewhere by this routing's settings (`models.compiled`): what its layers
        scored and chose, by index. Raises `InputError` where `forced` names an expert that there is not.
        """
        self.scores, self.choices, self.shared, self.again, self._plans = scores, choices, shared, {}, []
        if self.forced is not None:
            self._unseen = {layer: each.shape[-1] for layer, each in scores.items()}
            self.settle()

    def settle(self) -> None:
        """Check what is `forced` where no layer's dispatch has waited for the device, which the check needs."""
        beside = self._beside()
        if beside is not None:
            self._look(beside.tolist())

    def part(self) -> Routing:
        """The routing of the part of this finished pass that a backward pass runs again."""
        leaves = {id(scores): _leaf(scores) for scores in self.shared}
        shared = [leaves[id(scores)] for scores in self.shared]
        return replace(self, scores={}, choices={}, shared=shared, repeats=self, _plans=[], _beside_of={})

    def plan(self, scores: Tensor, choice: Tensor) -> Plan:
        """The dispatch plan of `choice`; made once where layers share their scores (one router for all layers)."""
        if self.forced is None:
            for known, _, plan in self._plans:
                if known is scores:
                    return plan
        plan = Plan.of(choice, scores.shape[1], self._beside())
        self._look(plan.beside)
        if self.shared:
            self._plans = [(scores, choice, plan)]
        return plan

    def keep_beside(self, x: Tensor, pooled: Tensor | None, again: Tensor | None) -> None:
        """Remember for the rest of this pass the mean of `x` (N, C, H, W) over its pixels, `pooled` (N, C), and another
        tensor of the values of `x` for its second use, `again`. Not where somebody may ask for the gradient of `x`
        itself: what flows through the other two would be missing in it.
        """
        if self.shares and not x.is_inference():
            key, known = id(x), self._beside_of
            known[key] = weakref.ref(x, partial(known.pop, key)), x._version, pooled, again

    def pooled(self, x: Tensor) -> Tensor | None:
        """The mean of `x` (N, C, H, W) over its pixels, (N, C), where this pass knows it."""
        return None if torch.compiler.is_dynamo_compiling() else self._known(x)[0]

    def fork(self, x: Tensor) -> Tensor:
        """`x` for a second use. Its gradient is added to that of the first use by the operation that made `x`."""
        again = self._known(x)[1]
        return x if again is None else again

    def _known(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What is remembered of `x`, each None where there is none, it is out of date, or lacks a gradient it needs."""
        known = self._beside_of.get(id(x))
        if known is None or known[0]() is not x or known[1] != x._version:
            return None, None
        if not self.shares or x.retains_grad or x._backward_hooks:
            return None, None
        wanted = torch.is_grad_enabled() and x.requires_grad
        pooled, again = (None if each is None or (wanted and not each.requires_grad) else each for each in known[2:])
        return pooled, again

    def pathway(self) -> Tensor:
        """The expert index per sample and MoE layer, (N, L); (N, L, T) where tokens are routed one by one. Raises
        `ValueError` where no MoE layer has run.
        """
        if not self.choices:
            raise InputError("a pathway must be of a pass that ran an MoE layer, got none")
        return torch.stack([self.choices[layer] for layer in sorted(self.choices)], 1)


def _leaf(scores: Tensor) -> Tensor:
    """`scores` as a leaf of another graph; its gradient is passed on to the graph that made them."""
    leaf = scores.detach()
    if scores.requires_grad:
        # More than one part of a pass may be run again, each with a gradient of its own.
        leaf.requires_grad_().register_hook(lambda grad: torch.autograd.backward(scores, grad, retain_graph=True))
    return leaf


@dataclass(frozen=True)
class _Open:
    """An open routing. It counts while the backward pass, if there is one, is `at` the node where it was opened."""

    routing: Routing
    at: Moment | None
    stretch: Stretch[Routing] | None


_active: ContextVar[_Open | None] = ContextVar("advmoe_routing", default=None)
_repeated: dict[tuple[int, Moment], Routing] = {}
"""The routings of what backward passes are running again, by thread and moment."""


_traced: Routing | None = None
"""The routing of the pass that `torch.compile` traces: its graph can hold neither a context nor a node of autograd."""


def active_routing() -> Routing:
    """The routing of the forward pass under way, or that a backward pass runs again; plain hard routing where there is
    none.
    """
    if torch.compiler.is_dynamo_compiling():
        return _traced or Routing()
    current, at = _active.get(), moment()
    if current is not None and current.at == at:
        return current.routing
    return (None if at is None else _repeated_at(at)) or Routing()


def _repeated_at(at: Moment) -> Routing | None:
    """The routing of the layer that a backward pass runs again at this moment; None where it runs none again."""
    thread = threading.get_ident()
    known = _repeated.get((thread, at))
    if known is not None:
        return known
    # What runs again may itself hold checkpoints, whose own backward passes run within this one.
    around = [each for (other, (backward, _)), each in list(_repeated.items()) if other == thread and backward < at[0]]
    routings = [stretch.what for stretch in stretches_of(at[1], here=bool(around))]
    if around and not routings:
        routings = [around[-1].repeats or around[-1]]
    if not routings:
        return None
    known = _repeated[thread, at] = _common(routings).part()
    torch.autograd.Variable._execution_engine.queue_callback(lambda: _forget(at[0]))
    return known


def _common(routings: list[Routing]) -> Routing:
    """What the routings of passes have in common that several threads made at once: which of the passes is repeated
    cannot be told in another thread. Raises `RuntimeError` where they differ.
    """
    first = routings[0]
    if len(routings) == 1:
        return first
    modes = {(each.mode, each.temperature, each.gated) for each in routings}
    if len(modes) > 1 or any(each.forced is not first.forced or each.shared for each in routings):
        raise RuntimeError("passes of several threads must have one routing where a backward pass runs layers again")
    return replace(first.settings(), one_pass=first.one_pass, shares=first.shares)


def _forget(backward: int) -> None:
    for key in [key for key in list(_repeated) if key[1][0] == backward]:
        _repeated.pop(key, None)


def _forget_here() -> None:
    """Forget what backward passes of this thread left behind that ended in an error; none is under way."""
    for key in list(_repeated):
        if key[0] == threading.get_ident():
            _repeated.pop(key, None)


def keep(y: Tensor) -> None:
    """Remember the routing under way for as long as the graph of `y`, an output of its pass, exists."""
    if torch.compiler.is_dynamo_compiling():
        return
    current = _active.get()
    if current is not None and current.stretch is not None and current.at == moment():
        current.stretch.keep(y)


@contextmanager
def opened(routing: Routing) -> Iterator[Routing]:
    """Make `routing` the active one."""
    settings, at = routing.settings(), moment()
    if at is None:
        _forget_here()
    with stretching(settings, None, lasting=True) as stretch:
        token = _active.set(_Open(routing, at, stretch))
        try:
            yield routing
        finally:
            _active.reset(token)


@contextmanager
def in_graph(routing: Routing) -> Iterator[None]:
    """Make `routing` that of the pass inside, which `torch.compile` traces: a graph takes no context from outside."""
    global _traced
    _traced = routing
    try:
        yield
    finally:
        _traced = None


@contextmanager
def forward_scope(*, shares: bool = False) -> Iterator[Routing]:
    """The active routing, emptied for a new forward pass; a fresh one where none is open. `shares`: see `Routing`."""
    current, at = _active.get(), moment()
    if current is None or current.at != at:
        repeated = None if at is None else _repeated_at(at)
        settings = Routing() if repeated is None else repeated.settings()
        if at is None:
            _forget_here()
        current = _Open(replace(settings, repeats=None if repeated is None else settings), at, None)
    routing = current.routing
    # New dictionaries and lists: those of a finished pass may be remembered.
    routing.scores, routing.choices, routing.again, routing.shared, routing._plans = {}, {}, {}, [], []
    before = routing.one_pass, routing.shares, routing._beside_of
    routing.one_pass, routing.shares, routing._beside_of = True, shares, {}
    with stretching(routing, current.stretch, lasting=False) as stretch:
        token = _active.set(_Open(routing, at, stretch))
        try:
            yield routing
        finally:
            _active.reset(token)
            if stretch.has_nodes():  # remembered without the graph
                stretch.what = replace(routing, scores={}, repeats=None, _plans=[], _beside_of={})
            routing.one_pass, routing.shares, routing._beside_of = before


_LEAST_TEMPERATURE = 1e-6


@contextmanager
def route(
    mode: RoutingMode = "hard", *, temperature: float = 1.0, forced: Tensor | None = None, gated: bool = True
) -> Iterator[Routing]:
    """Route the forward passes inside by `mode`; the value yielded holds the last pass's scores and choices. `forced`,
    `gated`: as of `Routing`.

    It holds in this thread, as PyTorch's modes do: another that is to compute inside has to open its own.
    Raises `ValueError` for an unknown mode, a temperature below 1e-6 (there the mixture is hard routing in all but its
    gradient, and scores divided by less overflow), and choices that nothing could follow.
    """
    if mode not in get_args(RoutingMode):
        raise InputError(f"mode must be one of {', '.join(get_args(RoutingMode))}, got {mode!r}")
    if not real(temperature) or not float(temperature) >= _LEAST_TEMPERATURE:
        raise InputError(f"temperature must be a number >= {_LEAST_TEMPERATURE:g}, got {show(temperature)}")
    if forced is not None and mode == "soft":
        raise InputError("forced must be left out with mode soft, which mixes every expert, got choices")
    if forced is not None and not isinstance(forced, Tensor):
        raise InputError(f"forced must be a tensor (N, L), an expert for each image and layer, got {show(forced)}")
    with opened(Routing(mode, float(temperature), forced, gated)) as routing:
        yield routing


def soft_routing(model: Callable[[Tensor], Tensor], temperature: float = 1.0) -> Callable[[Tensor], Tensor]:
    """`model` as a callable that mixes experts by softmax(scores / temperature): a surrogate for gradients, not for
    scoring.
    """

    def predict(x: Tensor) -> Tensor:
        with route("soft", temperature=temperature):
            return model(x)

    return predict


def require_numbered(module: nn.Module) -> None:
    """Raise `InputError` unless the MoE layers in a module are numbered 0, 1, 2, ..., by which pathways are told."""
    from advmoe.moe.layer import moe_layers  # which imports this module

    if not isinstance(module, nn.Module):
        raise InputError(f"model must be a torch.nn.Module, got {show(module)}")
    numbers = [each.layer for each in moe_layers(module)]
    if numbers != list(range(len(numbers))):
        rule = "numbered 0, 1, 2, ... (`layer`), each number once"
        raise InputError(f"the MoE layers of a network must be {rule}, got {', '.join(map(str, numbers))}")


def pathway(model: nn.Module, x: Tensor) -> Tensor:
    """The expert index per sample and MoE layer, (N, L), for images `x` (N, C, H, W) in [0, 1]; (N, 0) for a plain
    model, (N, L, T) for one whose tokens are routed one by one (`route_per="token"`).

    The model is run in eval mode, and left in the mode it was in. What it computes in fp32 is not rounded to less
    (TF32), as in evaluations: between experts whose scores are close that would decide.
    """
    require_numbered(model)
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with full_fp32(), torch.no_grad(), route() as routing:
            model(x)
    finally:
        for module, training in was_training.items():
            module.training = training
    return routing.pathway() if routing.choices else torch.empty(len(x), 0, dtype=torch.long, device=x.device)
