"""The processes of a run: started here, heard one by one, ended together.

Whoever calls says how many there are. What schedulers and other launchers leave in the environment (of SLURM, LSF, MPI,
torchrun) says nothing of this run: Fabric, which would adopt it, is told its place instead.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment

from advmoe.errors import portable
from advmoe.progress import unshared
from advmoe.signals import leave_to_parent
from advmoe.training.trainer import TrainingDiverged

_LEFT = (
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR",
    "MASTER_PORT", "STANDALONE_PORT",
)  # fmt: skip
_LEFT_PREFIXES = ("LT_", "TORCHELASTIC_")
"""Variables by which PyTorch and Fabric would still be led, though Fabric is told its place."""


class _Place(ClusterEnvironment):
    """One of `world` processes on this machine, which we start."""

    creates_processes_externally = True
    main_address = "127.0.0.1"
    main_port = 0

    def __init__(self, rank: int, world: int, port: int) -> None:
        super().__init__()
        self.rank, self.world, self.main_port = rank, world, port

    @staticmethod
    def detect() -> bool:
        """Whether the environment asks for it: it never does."""
        return False

    def world_size(self) -> int:
        """Number of processes."""
        return self.world

    def set_world_size(self, size: int) -> None:
        """Ignored: it is known."""

    def global_rank(self) -> int:
        """Number of this process."""
        return self.rank

    def set_global_rank(self, rank: int) -> None:
        """Ignored: it is known."""

    def local_rank(self) -> int:
        """Number of this process, and of its device."""
        return self.rank

    def node_rank(self) -> int:
        """There is one machine."""
        return 0


@dataclass(frozen=True)
class Engine:
    """The settings of Fabric, the same in every process."""

    accelerator: str
    devices: int
    precision: Any

    def fabric(self, rank: int = 0, port: int = 0) -> Fabric:
        """Fabric of the process `rank`; several meet at `port` of this machine."""
        with undisturbed():
            return Fabric(
                accelerator=self.accelerator, devices=self.devices, precision=self.precision,
                strategy="ddp" if self.devices > 1 else "auto", plugins=[_Place(rank, self.devices, port)],
            )  # fmt: skip


@contextmanager
def undisturbed() -> Iterator[None]:
    """Inside, no other launcher's variables are seen, and Fabric's hints are not shown."""
    log = logging.getLogger("lightning_fabric")
    level, environment = log.level, dict(os.environ)
    for name in environment:
        if name in _LEFT or name.startswith(_LEFT_PREFIXES):
            del os.environ[name]
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
        for name in _LEFT:
            os.environ.pop(name, None)
        os.environ.update({name: environment[name] for name in environment if name not in os.environ})


def launch(work: Callable[[Fabric], None], engine: Engine) -> None:
    """Do `work` in every process of `engine`; where there is one, here.

    Raises what one of them raised first, and `ChildProcessError` for one that died. None is left after, and none
    outlives this process, however that ends.
    """
    with undisturbed():
        if engine.devices == 1:
            engine.fabric().launch(work)
            return
        context, port = multiprocessing.get_context("spawn"), _free_port()
        children: dict[Connection, Any] = {}
        try:
            for rank in range(engine.devices):
                ours, theirs = context.Pipe(duplex=False)
                children[ours] = context.Process(target=_child, args=(work, engine, rank, port, theirs))
                children[ours].start()
                theirs.close()
            _hear(children)
        finally:
            for pipe, process in children.items():
                pipe.close()
                if process.pid is not None:
                    process.kill()
                    process.join()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def _hear(children: dict[Connection, Any]) -> None:
    """Wait until all have done their work. Raises what the first one that failed raised."""
    busy = list(children)
    while busy:
        for pipe in wait(busy):
            assert isinstance(pipe, Connection)
            try:
                error = pipe.recv()
            except (EOFError, OSError):  # the latter in the middle of a message
                children[pipe].join()
                raise ChildProcessError(f"a process of the run {_end(children[pipe].exitcode)}") from None
            if error is not None:
                raise error
            busy.remove(pipe)
    for process in children.values():
        process.join()


def _end(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _child(
    work: Callable[[Fabric], None], engine: Engine, rank: int, port: int, pipe: Connection
) -> None:  # pragma: no cover - runs in a process of its own
    leave_to_parent()
    unshared()
    error = None
    try:
        with undisturbed():
            engine.fabric(rank, port).launch(work)
    except Exception as problem:
        error = portable(problem, TrainingDiverged)
    pipe.send(error)
    if error is not None:  # the others would fail too if this one left: the parent ends all
        threading.Event().wait()
