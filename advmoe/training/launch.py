"""The processes of a run: started here, heard one by one, ended together; or started by torchrun or srun.

Whoever calls says how many there are. What schedulers and other launchers leave in the environment (of SLURM, LSF, MPI,
torchrun) says nothing of this run, unless they started this very process for it (`launchers`): Fabric, which would
adopt it, is told its place instead.
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
from advmoe.training import preemption
from advmoe.training.launchers import Member, launched
from advmoe.training.preemption import Requests, Stopped
from advmoe.training.trainer import TrainingDiverged

_LEFT = (
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR",
    "MASTER_PORT", "STANDALONE_PORT",
)  # fmt: skip
_LEFT_PREFIXES = ("LT_", "TORCHELASTIC_")
"""Variables by which PyTorch and Fabric would still be led, though Fabric is told its place."""
_STORE = "TORCHELASTIC_USE_AGENT_STORE"
_GLANCE = 0.5
"""Seconds after which a signal that came is passed on to the children, at most."""


class _Place(ClusterEnvironment):
    """One of the processes of a run, which others start."""

    creates_processes_externally = True
    main_address = "127.0.0.1"
    main_port = 0

    def __init__(self, member: Member) -> None:
        super().__init__()
        self.member, self.main_address, self.main_port = member, member.address, member.port

    @staticmethod
    def detect() -> bool:
        """Whether the environment asks for it: it never does."""
        return False

    def world_size(self) -> int:
        """Number of processes."""
        return self.member.world

    def set_world_size(self, size: int) -> None:
        """Ignored: it is known."""

    def global_rank(self) -> int:
        """Number of this process."""
        return self.member.rank

    def set_global_rank(self, rank: int) -> None:
        """Ignored: it is known."""

    def local_rank(self) -> int:
        """Number of this process on its machine, and of its device."""
        return self.member.local_rank

    def node_rank(self) -> int:
        """Number of its machine."""
        return self.member.node


@dataclass(frozen=True)
class Engine:
    """The settings of Fabric, the same in every process."""

    accelerator: str
    devices: int
    """Of all machines together."""
    precision: Any

    def fabric(self, member: Member | None = None) -> Fabric:
        """Fabric of one process of several, `member`; or of the only one."""
        member = member or Member(0, 1, 0, 1, 0, "127.0.0.1", 0, "advmoe")
        with undisturbed(member):
            return Fabric(
                accelerator=self.accelerator, devices=member.local_world, num_nodes=member.nodes,
                precision=self.precision, strategy="ddp" if self.devices > 1 else "auto", plugins=[_Place(member)],
            )  # fmt: skip


@contextmanager
def undisturbed(member: Member | None = None) -> Iterator[None]:
    """Inside, no other launcher's variables are seen, and Fabric's hints are not shown. torchrun's processes meet at a
    store that torchrun keeps, which one of its variables says.
    """
    kept = _STORE if member is not None and member.launcher == "torchrun" else None
    log = logging.getLogger("lightning_fabric")
    level, environment = log.level, dict(os.environ)
    for name in environment:
        if name != kept and (name in _LEFT or name.startswith(_LEFT_PREFIXES)):
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
    """Do `work` in every process of `engine`; where there is one, here. A process that torchrun or srun started for it
    does its own part.

    Raises what one of them raised first, and `ChildProcessError` for one that died. None is left after, and none
    outlives this process, however that ends.
    """
    member = launched()
    with undisturbed(member):
        if member is not None:
            engine.fabric(member).launch(work)
            return
        if engine.devices == 1:
            engine.fabric().launch(work)
            return
        context, port = multiprocessing.get_context("spawn"), _free_port()
        children: dict[Connection, Any] = {}
        asked, requests = context.Event(), Requests()
        try:
            for rank in range(engine.devices):
                ours, theirs = context.Pipe(duplex=False)
                member = Member(rank, engine.devices, rank, engine.devices, 0, "127.0.0.1", port, "advmoe")
                children[ours] = context.Process(target=_child, args=(work, engine, member, theirs, asked))
                children[ours].start()
                theirs.close()
            with requests.listening():
                _hear(children, lambda: asked.set() if requests.reason() is not None else None)
        except Stopped as error:  # the children know no more than that this process asked for it
            raise Stopped(requests.reason() or error.reason, error.where) from None
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


def _hear(children: dict[Connection, Any], meanwhile: Callable[[], None]) -> None:
    """Wait until all have done their work; `meanwhile` is called every now and then. Raises what the first one that
    failed raised.
    """
    busy = list(children)
    while busy:
        meanwhile()
        for pipe in wait(busy, _GLANCE):
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
    work: Callable[[Fabric], None], engine: Engine, member: Member, pipe: Connection, asked: Any
) -> None:  # pragma: no cover - runs in a process of its own
    leave_to_parent()
    unshared()
    preemption.parent_asks = asked.is_set
    error = None
    try:
        with undisturbed():
            engine.fabric(member).launch(work)
    except Exception as problem:
        error = portable(problem, TrainingDiverged, Stopped)
    pipe.send(error)
    if error is not None:  # the others would fail too if this one left: the parent ends all
        threading.Event().wait()
