"""Tasks as tasks of Ray (extra `ray`), on a cluster that runs or on one that is started on this machine.

Ray ends the tasks of a process that is gone; what they have done so far is kept, and they go on with the next one.
"""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from advmoe.engines.remote import RETRIES, Call, answer, lost
from advmoe.errors import InputError, lacking
from advmoe.pool import Answer
from advmoe.text import one_line

if TYPE_CHECKING:
    from advmoe.engines.choice import EngineOptions


def require_ray() -> Any:
    """Ray. Raises `InputError` where it is not installed."""
    try:
        import ray
    except ImportError as error:
        raise lacking("--engine ray", "ray", error) from error
    return ray


class Ray:
    """Ray as an engine: see `schedule.Engine`. It has at most `most` tasks at once."""

    given: str = "queued"
    retries: int = RETRIES

    def __init__(self, call: Call, options: EngineOptions, *, most: int) -> None:
        self._ray, self._ledger, self._most = require_ray(), call.ledger, most
        self._begun = not self._ray.is_initialized()
        if self._begun:
            _connect(self._ray, options.ray_address or os.environ.get("RAY_ADDRESS") or "local", call.environment)
        cpus = options.cpus or call.threads or 1
        self._require({"CPU": cpus, "GPU": options.gpus})
        # It is tried again by who wants it: Ray would know nothing of what it needs, nor of its errors.
        remote = self._ray.remote(max_retries=0, num_cpus=cpus, num_gpus=options.gpus)
        self._do, self._call = remote(_do), self._ray.put(call)
        self._tasks: dict[Any, tuple[Any, str]] = {}

    def _require(self, asked: dict[str, int]) -> None:
        there = self._ray.cluster_resources()
        for name, number in asked.items():
            if number > (most := int(there.get(name, 0))):
                self.close()
                option = f"--task-{name.lower()}s"
                raise InputError(f"{option} must be <= {most}, all that the Ray cluster has, got {number}")

    def ready(self, number: int) -> None:
        """Nothing: Ray starts processes."""

    def give(self, order: Any) -> bool:
        """Take an order."""
        if len(self._tasks) >= self._most:
            return False
        job = uuid.uuid4().hex[:12]
        self._ledger.submitted(order.id, job)
        self._tasks[self._do.remote(self._call, order, job)] = order, job
        return True

    def answers(self, seconds: float) -> Iterator[Answer]:
        """What became of tasks that have ended."""
        if not self._tasks:
            time.sleep(seconds)
            return
        ended, _ = self._ray.wait(list(self._tasks), num_returns=len(self._tasks), timeout=seconds)
        for ref in ended:
            order, job = self._tasks.pop(ref)
            why = "it ended without an answer"
            try:
                self._ray.get(ref)
            except Exception as error:  # its process died, or its node; or it could not begin
                why = one_line(error, 300)
            yield answer(self._ledger, order, job) or lost(order, f"{why} (see {self._ledger.log(order.id)})")

    def close(self) -> None:
        """End what still runs; a Ray that was started here ends too."""
        with suppress(Exception):
            for ref in getattr(self, "_tasks", {}):
                self._ray.cancel(ref, force=True)
        if self._begun:
            self._ray.shutdown()


def _connect(ray: Any, address: str, environment: Mapping[str, str]) -> None:
    """Connect to a Ray cluster, or start one here (`local`). Raises `InputError` where that fails."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    here = {"include_dashboard": False} if address == "local" else {}
    try:
        if host and port.isdigit():  # where nobody listens Ray itself would wait for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(
            address=address, log_to_driver=False, logging_level="ERROR", runtime_env={"env_vars": dict(environment)},
            **here,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError) as error:
        rule = "be that of a Ray cluster that runs"
        raise InputError(f"--ray-address must {rule}, got {address!r}: {one_line(error)}") from error


def _do(call: Call, order: Any, job: str) -> None:  # pragma: no cover - runs in a process of Ray's
    call(order, job)
