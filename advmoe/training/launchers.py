"""Processes of a run that somebody else started: torchrun, or SLURM's srun.

Each of them is told by its environment which it is. What is left there by a launcher of something else says nothing:
only what a launcher sets for the very processes that it starts counts, and all of it must be there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from advmoe.errors import InputError
from advmoe.text import show

_TORCHRUN = (
    "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE",
    "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip
_SRUN = (
    "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES", "SLURM_STEP_NODELIST",
    "SLURM_STEP_TASKS_PER_NODE", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID",
)  # fmt: skip
_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
"""What Lightning reads when it is imported, whoever has set it."""
_FIRST_PORT, _PORTS = 20_000, 10_000


@dataclass(frozen=True)
class Member:
    """One of the processes of a run: its number among all (`rank` of `world`) and on its node, and where they meet."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    node: int
    address: str
    port: int
    launcher: str

    @property
    def nodes(self) -> int:
        """How many machines take part."""
        return self.world // self.local_world


def launched(environment: Mapping[str, str] = os.environ) -> Member | None:
    """This process among those that torchrun or srun started together; None where it was started alone.

    Raises `InputError` for nodes with unequal numbers of processes, and for what is no number.
    """
    for names, read in ((_TORCHRUN, _by_torchrun), (_SRUN, _by_srun)):
        values = {name: environment.get(name, "") for name in names}
        if all(values.values()):
            member = read(values, environment)
            if member.world > 1:
                return member
    return None


def rank() -> int:
    """This process's number among those that were started together; 0 where it is alone."""
    try:
        member = launched()
    except InputError:
        number = os.environ.get("SLURM_PROCID", "")
        return int(number) if number.isdecimal() else 0
    return 0 if member is None else member.rank


def require_ranks(environment: Mapping[str, str] = os.environ) -> None:
    """Raise `InputError` for a rank in the environment that is no number: Lightning could not be imported."""
    for name in _RANKS:
        if name in environment:
            _whole(name, environment[name])


def _by_torchrun(values: Mapping[str, str], _: Mapping[str, str]) -> Member:
    texts = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR")
    number = {name: _whole(name, text) for name, text in values.items() if name not in texts}
    _require_equal(number["WORLD_SIZE"], number["LOCAL_WORLD_SIZE"], values["WORLD_SIZE"])
    return Member(
        number["RANK"], number["WORLD_SIZE"], number["LOCAL_RANK"], number["LOCAL_WORLD_SIZE"], number["GROUP_RANK"],
        values["MASTER_ADDR"], number["MASTER_PORT"], "torchrun",
    )  # fmt: skip


def _by_srun(values: Mapping[str, str], environment: Mapping[str, str]) -> Member:
    texts = ("SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE")
    number = {name: _whole(name, text) for name, text in values.items() if name not in texts}
    world, nodes = number["SLURM_STEP_NUM_TASKS"], number["SLURM_STEP_NUM_NODES"]
    tasks = values["SLURM_STEP_TASKS_PER_NODE"]
    local = re.fullmatch(r"(\d+)(\(x\d+\))?", tasks)
    if local is None:
        raise InputError(f"srun must start as many processes on each node as on the others, got {tasks}")
    _require_equal(world, int(local[1]), tasks)
    # Steps of one job may run side by side.
    port = _FIRST_PORT + (31 * number["SLURM_JOB_ID"] + number["SLURM_STEP_ID"]) % _PORTS
    return Member(
        number["SLURM_PROCID"], world, number["SLURM_LOCALID"], world // nodes, number["SLURM_NODEID"],
        first_host(values["SLURM_STEP_NODELIST"]), _whole("MASTER_PORT", environment.get("MASTER_PORT") or str(port)),
        "srun",
    )  # fmt: skip


def _whole(name: str, text: str) -> int:
    """A number from the environment. Raises `InputError` for another text."""
    if not text.isdecimal():
        raise InputError(f"{name} must be a whole number, or not in the environment, got {show(text)}")
    return int(text)


def _require_equal(world: int, local: int, got: str) -> None:
    if local < 1 or world % local:
        raise InputError(f"a run must have as many processes on each node as on the others, got {got}")


def first_host(nodes: str) -> str:
    """The first of the hosts that SLURM names in short: `node[07-09,12],login` is node07 and more."""
    prefix, bracket, rest = nodes.partition("[")
    if not bracket or "," in prefix:
        return nodes.split(",")[0]
    inside, _, after = rest.partition("]")
    return prefix + re.split("[-,]", inside)[0] + after.split(",")[0]
