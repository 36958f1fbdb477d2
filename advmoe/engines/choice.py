"""Which engine does tasks, and what it asks for each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from advmoe.engines.ledger import Ledger
from advmoe.engines.schedule import Engine
from advmoe.errors import InputError
from advmoe.pool import Place, Pool, Prepare

ENGINES = ("local", "slurm", "ray")


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Where tasks are done. Raises `InputError`, which names the command's option, for what does not go together."""

    engine: str = "local"
    """One of `ENGINES`."""
    gpus: int = 0
    """GPUs of each task."""
    cpus: int | None = None
    """CPU cores of each; None: as many as it has threads."""
    hours: float = 24.0
    """SLURM: the longest that a task may take until it is stopped, and tried again."""
    partition: str | None = None
    """SLURM: where its jobs run; None: the cluster's usual one."""
    ray_address: str | None = None
    """Of a Ray cluster, as `ray.init` takes it; None: the one that RAY_ADDRESS names, or one of this machine alone."""

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise InputError(f"--engine must be one of {', '.join(ENGINES)}, got {self.engine!r}")
        usual, slurm, ray = EngineOptions.__dataclass_fields__, ("slurm",), ("ray",)
        belongs = {"gpus": slurm + ray, "cpus": slurm + ray, "hours": slurm, "partition": slurm, "ray_address": ray}
        for name, engines in belongs.items():
            if (value := getattr(self, name)) != usual[name].default and self.engine not in engines:
                option = f"--{name.replace('_', '-')}" if name in ("partition", "ray_address") else f"--task-{name}"
                raise InputError(
                    f"{option} must go with --engine {' or '.join(engines)}, got {value!r} with {self.engine}"
                )

    @property
    def local(self) -> bool:
        """Whether this machine's processes do the tasks."""
        return self.engine == "local"

    def require(self) -> None:
        """Raise `InputError` where the engine cannot be had here."""
        if self.engine == "slurm":
            from advmoe.engines.slurm import require_slurm

            require_slurm()
        elif self.engine == "ray":
            from advmoe.engines.ray import require_ray

            require_ray()

    def open(
        self, prepare: Prepare, arguments: Sequence[Any], *, places: Sequence[Place], ledger: Ledger,
        alone: bool = False,
    ) -> Engine:  # fmt: skip
        """The engine, whose processes do tasks by what `prepare` yields for these arguments (see `pool.Prepare`).

        Args:
            places: the processes: as many tasks are done at once at most. Of a cluster's only the threads count.
            ledger: what a cluster's tasks tell of themselves. alone: whether nothing else may run on the same node.
        """
        if self.engine == "local":
            return Pool(prepare, arguments, places)
        from advmoe.engines.remote import Call

        threads = places[0].threads
        call = Call(prepare=prepare, arguments=tuple(arguments), threads=threads, ledger=ledger)
        if self.engine == "slurm":
            from advmoe.engines.slurm import Slurm

            return Slurm(call, self, most=len(places), alone=alone)
        from advmoe.engines.ray import Ray

        return Ray(call, self, most=len(places))
