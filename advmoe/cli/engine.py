"""The options of commands whose tasks can be done elsewhere: by SLURM, or by Ray."""

from __future__ import annotations

from typing import Annotated, Any

from advmoe.cli.arguments import Parser, number
from advmoe.config import Hours, Within
from advmoe.engines import ENGINES, EngineOptions

USUAL_JOBS = "100"
"""Tasks that a cluster has at once, unless the user says otherwise."""


def add_engines(parser: Parser) -> None:
    """Add the options that `engine_of` reads."""
    add = parser.add_argument
    add("--engine", metavar=f"{{{','.join(ENGINES)}}}", help="who does the tasks (default: local, processes here)")
    add("--task-gpus", metavar="G", help="slurm, ray: GPUs of each task (default: 1 with --accelerator cuda, else 0)")
    add("--task-cpus", metavar="C", help="slurm, ray: cores of each task (default: its threads)")
    add("--task-hours", metavar="H", help="slurm: after H hours a task is stopped, and goes on in a new job (24)")
    add("--partition", metavar="NAME", help="slurm: where its jobs run (default: the cluster's)")
    add("--ray-address", metavar="ADDRESS", help="ray: of a cluster (default: RAY_ADDRESS, else one on this machine)")


def engine_of(args: dict[str, Any], accelerator: str) -> EngineOptions:
    """Where tasks are done. Raises `InputError` for what does not go together."""
    gpus = number("--task-gpus", Annotated[int, Within(0, 64)], args.get("task_gpus"))
    engine = args.get("engine", "local")
    if gpus is None:
        gpus = int(accelerator == "cuda" and engine != "local")
    hours = number("--task-hours", Hours, args.get("task_hours"))
    return EngineOptions(
        engine=engine, gpus=gpus,
        cpus=number("--task-cpus", Annotated[int, Within(1, 1024)], args.get("task_cpus")),
        partition=args.get("partition"), ray_address=args.get("ray_address"),
        **({} if hours is None else {"hours": hours}),
    )  # fmt: skip
