"""Runs that are told to stop: by a signal, as schedulers send before they take a machine away, or at a time set ahead.

A run stops at the end of an iteration, the same for all of its processes, once it is saved; `--resume` goes on from
there.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from lightning_fabric import Fabric

from advmoe.signals import Ended, handled

REQUEUE = 85
"""The exit code of a run that stopped before its end and can go on."""
SIGNALS = ("SIGTERM", "SIGUSR1")
parent_asks: Callable[[], bool] = bool
"""Whether the process that started this one, if one of ours did, wants it to stop."""


AfterEpoch = Callable[[Mapping[str, Any]], str | None]
"""Called after each epoch, by the run's first process, with its entry of `metrics.jsonl`: why to stop there, if so."""


class Stopped(RuntimeError):
    """Training stopped before its end, as it was told to, for a `reason`, at a place (`where`); all of it is kept."""

    def __init__(self, reason: str, where: str) -> None:
        super().__init__(reason, where)
        self.reason, self.where = reason, where

    def __str__(self) -> str:
        return f"{self.reason} {self.where}"


@dataclass
class Requests:
    """What is asked of a run while it trains: to save what there is, or to stop."""

    save_every: float = math.inf
    """Seconds between checkpoints within an epoch."""
    deadline: float = math.inf
    """When to stop, of `time.monotonic`."""
    after_epoch: AfterEpoch | None = None
    enough: str | None = field(default=None, init=False)
    """What that has answered last."""
    told: int | None = field(default=None, init=False)
    """The signal that came."""
    saved: float = field(default_factory=time.monotonic, init=False)
    """When the run was last saved."""

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, SIGTERM and SIGUSR1 ask the run to stop, unless this process ignores them; a second one ends it."""

        def hear(number: int, _: FrameType | None) -> None:
            if self.told is not None:
                raise Ended(number)
            self.told = number

        with handled(SIGNALS, hear, unless=lambda handler: handler == signal.SIG_IGN):
            yield

    def hear(self, epoch: Mapping[str, Any]) -> None:
        """Ask whether the run is to stop after an epoch, of this entry of `metrics.jsonl`."""
        if self.after_epoch is not None:
            self.enough = self.after_epoch(epoch)

    def reason(self) -> str | None:
        """Why this process is to stop now; None where it may go on."""
        if self.told is not None:
            return f"stopped by {signal.Signals(self.told).name}"
        if time.monotonic() >= self.deadline:
            return "stopped at --max-hours"
        return "stopped by the process that began it" if parent_asks() else self.enough

    def agreed(self, fabric: Fabric) -> tuple[bool, str | None]:
        """Whether to save now, and why to stop after it, on every process alike."""
        reason = self.reason()
        save = reason is not None or time.monotonic() - self.saved >= self.save_every
        if fabric.world_size > 1:
            asked = torch.tensor([float(save), float(reason is not None)], device=fabric.device)
            together = fabric.all_reduce(asked, reduce_op="sum")
            assert isinstance(together, torch.Tensor)
            save, stop = (bool(number) for number in together.tolist())
            reason = (reason or "stopped with the other processes") if stop else None
        if save:
            self.saved = time.monotonic()
        return save, reason
