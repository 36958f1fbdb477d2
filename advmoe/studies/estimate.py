"""About how long a study takes on two cores: its forward passes, times what one costs there. Imports no torch.

A forward pass of one image is the unit; a backward pass counts as one for the input and one for the weights.
"""

from __future__ import annotations

from collections.abc import Mapping

from advmoe.config import Config
from advmoe.studies.plan import PlannedMeasure, PlannedRun, Planner
from advmoe.studies.results import Results
from advmoe.studies.scales import Scale, scale_named
from advmoe.studies.study import Study
from advmoe.text import duration

SECONDS: Mapping[str, float] = {"smoke": 1.7e-4, "cpu": 6e-4}
"""Of a pass of one image of the first backbone's S-Dense form, one thread of an EPYC core beside another, measured."""
_OVERHEAD: Mapping[str, float] = {"smoke": 1.5, "cpu": 5.0}
"""Seconds of a task besides."""
_TRAIN_IMAGES: Mapping[str, int] = {"smoke": 1_300, "cpu": 50_000}
_ROUTED_ATTACKS = 14
"""Attacks that `routed` is made of, each about as long as PGD."""


def about(study: Study) -> str:
    """`M min / H h`: the time at the scales `smoke` and `cpu`, two processes."""
    return " / ".join(duration(seconds(study, scale_named(name))) for name in ("smoke", "cpu"))


def seconds(study: Study, scale: Scale, processes: int = 2) -> float:
    """Of a study's first stage, where nothing of it is there yet."""
    from pathlib import Path

    planner = Planner(Path("."), range(scale.seeds))
    tasks = planner.tasks(planner.rows(study.stages[0](scale, Results())))
    each = [_train(t, scale) if isinstance(t, PlannedRun) else _measure(t, scale) for t in tasks.values()]
    return sum(each) / processes


def _wide(run: PlannedRun) -> float:
    """What a pass costs in those of a model of half the channels."""
    model = run.config["model"]
    r = 1.0 if model["kind"] in ("dense", "sparse") else float(model["scale"])
    return float(max(0.4, (2 * r) ** 1.5)) * (1.7 if model["kind"] == "moe" else 1.0)


def _train(run: PlannedRun, scale: Scale) -> float:
    t = Config.from_dict(run.config).training
    attack = 1 + 2 * t.attack_steps
    level = {"standard": 3, "at": attack + 6, "at-routers": attack + 4, "at-experts": attack + 6, "sparse": attack + 6}
    passes = level.get(t.method, 2 * attack + 10)
    images = run.config["data"].get("train_examples") or _TRAIN_IMAGES[scale.name]
    return _OVERHEAD[scale.name] + passes * t.epochs * images * _wide(run) * SECONDS[scale.name]


def _measure(task: PlannedMeasure, scale: Scale) -> float:
    examples = task.options.get("num_examples") or 0
    attacks = task.options.get("attacks", ())
    steps = int(task.run.config["attack"]["steps"])
    number = sum(_ROUTED_ATTACKS if name == "routed" else 1 for name in attacks)
    passes = number * 2 * steps * examples * max(1, len(task.options.get("epsilons", (1,))))
    return _OVERHEAD[scale.name] + passes * _wide(task.run) * SECONDS[scale.name]
