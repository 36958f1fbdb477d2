"""Which forward pass a layer repeats where a backward pass runs it again (activation checkpointing).

Autograd numbers the nodes of its graph in the order in which a thread makes them, so a stretch of forward passes is a
range of numbers. A backward pass that runs a layer again, in whatever thread, does so at a node of the pass that it
repeats: a node that needs an activation which was not stored. Its number says which stretch that was.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf
from typing import Any, Generic, TypeVar, cast
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

T = TypeVar("T")
Moment = tuple[int, int]
"""A backward pass, and the node that it is at, by their numbers."""

_KEY = "advmoe_stretch"
"""Under which a node of the graph keeps the stretch that it was made in."""
_UNSEEN = 256
"""Of stretches that no node keeps, the most that are remembered."""


def moment() -> Moment | None:
    """Where the backward pass of this thread is; None outside of one."""
    backward = torch._C._current_graph_task_id()
    if backward < 0:
        return None
    node = torch._C._current_autograd_node()
    return backward, -1 if node is None else node._sequence_nr()


@dataclass(eq=False)
class Stretch(Generic[T]):
    """The nodes that a thread makes from number `first` on, before `last`."""

    what: T
    """The routing that the forward passes in it have."""
    around: Stretch[T] | None
    """The stretch that it is part of, which lives as long as this one."""
    first: int
    last: float = inf
    thread: int = field(default_factory=threading.get_ident)
    begun: int = field(default_factory=itertools.count().__next__)
    """Its place among all stretches: one within another may begin at the same node."""
    unseen: bool = False
    """Whether something ran in it without gradients, as checkpoints of the older kind do: no node of that keeps it."""

    def has_nodes(self) -> bool:
        """Whether any node has been made since it began."""
        return torch._C._autograd._get_sequence_nr() > self.first

    def keep(self, y: Any) -> None:
        """Remember this stretch for as long as the graph of `y`, made in it, is there."""
        if not isinstance(y, Tensor):  # a network of the user's that makes something else, which is told elsewhere
            return
        if y.grad_fn is not None:
            cast(dict[str, Any], y.grad_fn.metadata)[_KEY] = self
        elif not torch.is_grad_enabled():
            each: Stretch[T] | None = self
            while each is not None:
                each.unseen, each = True, each.around


_there: WeakSet[Stretch[Any]] = WeakSet()
_lock = threading.Lock()
_unseen = deque[Stretch[Any]](maxlen=_UNSEEN)


@contextmanager
def stretching(what: T, around: Stretch[T] | None, *, lasting: bool) -> Iterator[Stretch[T]]:
    """A stretch as long as the block. A `lasting` one is remembered, too, where no node keeps it."""
    stretch = Stretch(what, around, torch._C._autograd._get_sequence_nr())
    with _lock:
        _there.add(stretch)
    try:
        yield stretch
    finally:
        stretch.last = torch._C._autograd._get_sequence_nr()
        if lasting and stretch.unseen and stretch.last > stretch.first:
            _unseen.append(stretch)


def stretches_of(number: int, *, here: bool) -> list[Stretch[Any]]:
    """The innermost stretch that holds the node of this number: this thread's, or else those of other threads, each of
    which counts for itself, unless it must be `here`.
    """
    with _lock:
        there = list(_there)
    innermost = dict[int, Stretch[Any]]()
    for each in sorted(there, key=lambda stretch: stretch.begun):
        if each.first <= number < each.last:
            innermost[each.thread] = each
    own = innermost.get(threading.get_ident())
    if own is not None and number < torch._C._autograd._get_sequence_nr():
        return [own]
    return [] if here else [each for each in innermost.values() if each is not own]


@contextmanager
def unrecorded(module: nn.Module) -> Iterator[None]:
    """Batch norms of `module` in train mode take their batch's statistics inside, as always, but do not record them."""
    norms = [each for each in module.modules() if isinstance(each, _BatchNorm) and each.training]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
