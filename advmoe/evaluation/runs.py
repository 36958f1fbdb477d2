"""Measure a run directory, or a user's own classifier, and write the results beside it.

Axes: `N` examples. Accuracies are fractions, not percent.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from advmoe.engines import EngineOptions
from advmoe.evaluation import sweep as sweeps
from advmoe.evaluation.accuracy import Execution, assess, positive
from advmoe.evaluation.cost import cost
from advmoe.evaluation.dissection import Dissection, dissect
from advmoe.evaluation.harness import Journal, tell_attack
from advmoe.evaluation.outcomes import applicable, classified, gradient_passes, masking_gap, measured
from advmoe.evaluation.shards import USUAL, Shards
from advmoe.evaluation.subject import Options, UnderAttack, open_subject, options_of
from advmoe.evaluation.suite import build, stretched
from advmoe.files import write_arrays, write_text
from advmoe.models import Classifier
from advmoe.pool import threads_set
from advmoe.progress import outermost
from advmoe.rundir import DISSECTION, EVALUATION, EXAMPLES, JOURNAL, SWEEP, SWEPT, TASKS, sealed, write_result


def evaluate_run(
    target: str | Path,
    options: Options | None = None,
    *,
    workers: int | None = None,
    resume: bool = False,
    engine: EngineOptions | None = None,
    **keywords: Any,
) -> dict[str, Any]:
    """Evaluate a run, or a user's `FILE.py:FACTORY`, on its test set; write `evaluation.json` and
    `evaluation-examples.npz`.

    Args:
        options: of one CPU thread, unless it says otherwise. keywords: `Options` by name.
        workers: processes that share the images, by default one per GPU or, without, per core, but no more than there
            are batches; their number changes no result.
        resume: continue an interrupted evaluation, whose finished batches lie in `.evaluation` beside the results.
        engine: who makes the attacks, if not processes of this machine: `workers` (by default 8) tasks of each, done at
            the same time; what they print lies in `.evaluation-tasks` until the end.

    Raises `InputError` for whatever cannot be used; what was written before stays as it was.
    """
    options, shards = options_of(options, keywords, threads=1), None
    if engine is not None and engine.local:
        engine = None
    if engine is not None:  # this process need not have what the tasks are given
        options = replace(options, accelerator="auto" if engine.gpus else "cpu")
    subject = open_subject(target, options)
    if workers is None:
        batches = -(-len(subject.data) // positive("batch_size", options.batch_size))
        workers = _processes(batches, options.accelerator) if engine is None else USUAL
    if engine is not None:
        number, workers = positive("workers", workers), 1
        folder = subject.home / TASKS
        shards = Shards(target=str(target), options=options, engine=engine, number=number, folder=folder)
    execution = Execution(
        workers=positive("workers", workers), threads=options.threads and positive("threads", options.threads),
        accelerator=options.accelerator, journal=subject.home / JOURNAL, resume=resume, elsewhere=shards,
    )  # fmt: skip
    evaluation = assess(subject.load, subject.data, subject.measurement(), allow=options.allow, execution=execution)
    result = evaluation.result | subject.described
    model = evaluation.predict
    if isinstance(model, Classifier) and model.spec["input_size"] is not None:
        with threads_set(options.threads):
            result["cost"] = cost(model)
    written = save(subject.home, result, {"index": subject.index.numpy(), **evaluation.examples})
    Journal(execution.journal).remove()
    if shards is not None:
        shutil.rmtree(shards.folder, ignore_errors=True)
    return written


def _processes(batches: int, accelerator: str) -> int:
    """One process per GPU or, on the CPU, per core, where there are batches for all; starting one takes seconds."""
    devices = Execution(accelerator=accelerator).devices()
    most = len(devices) if devices[0].type == "cuda" else os.cpu_count() or 1
    return max(1, min(most, batches))


def save(home: Path, result: dict[str, Any], examples: dict[str, np.ndarray[Any, Any]]) -> dict[str, Any]:
    """Write `evaluation.json` and `evaluation-examples.npz` into `home`, each whole or not at all.

    Returns what the former holds.
    """
    home.mkdir(parents=True, exist_ok=True)
    write_arrays(home / EXAMPLES, examples)
    return write_result(home / EVALUATION, result)


class _Radii:
    """What attacks do at one radius after another, each measured once."""

    def __init__(self, attacked: UnderAttack, names: Sequence[str]) -> None:
        self.attacked, self.names = attacked, names
        self.clean = classified(attacked.predict, attacked.job, attacked.device)
        self.measured: dict[float, tuple[dict[str, Tensor], dict[str, dict[str, Any]]]] = {}

    def robust(self, eps: float) -> dict[str, Tensor]:
        """Whether each example is still right, (N,) booleans by attack, and under `worst case`."""
        if eps not in self.measured:
            predict, job, device = self.attacked.predict, self.attacked.job, self.attacked.device
            robust: dict[str, Tensor] = {}
            details, made = dict[str, dict[str, Any]](), dict[str, dict[str, Any]]()
            for name in self.names:
                at_radius = replace(job, setting=stretched(name, job.setting, eps))
                outcome, entries = measured(predict, at_radius, [name], self.clean, device)
                robust |= outcome
                details[name] = {key: entries[name][key] for key in ("settings", "flags", "gradient_passes")}
                made |= entries
            gap = masking_gap({"clean": self.clean.correct, **robust})
            details["worst case"] = {"masking_gap": gap, "gradient_passes": gradient_passes(made)}
            robust["worst case"] = torch.stack([self.clean.correct, *robust.values()]).all(0)
            self.measured[eps] = robust, details
        return self.measured[eps][0]

    def examples(self) -> dict[str, np.ndarray[Any, Any]]:
        """Whether each example was still right, by attack and radius."""
        return {
            f"{name}/{eps!r}": right.cpu().numpy()
            for eps, (robust, _) in self.measured.items()
            for name, right in robust.items()
        }

    def details(self, name: str, eps: float) -> dict[str, Any]:
        """What else a point of the curve `name` holds, at a radius that was measured."""
        return self.measured[eps][1][name]


def sweep_run(
    target: str | Path, options: Options | None = None, *, epsilons: Sequence[float], **keywords: Any
) -> tuple[Path, dict[str, Any]]:
    """Robust accuracy against the attack's radius, for each attack and in the worst case over them.

    Each attack's step is that of `suite.stretched`, which crosses every radius. keywords: `Options` by name.

    Writes `sweep.json` and `sweep-examples.npz` (by `ATTACK/EPS` whether each image of `index` is still right) beside
    the run's other results, and returns its folder and the former's content: a `sweep.sweep` by
    attack, whose points hold the attack's `settings`, `flags` and `gradient_passes` at that radius, and one under
    `worst case`, whose points hold `masking_gap` and `outcomes.gradient_passes`. Raises
    `InputError` for whatever cannot be used.
    """
    subject = open_subject(target, options := options_of(options, keywords))
    attacked = subject.under_attack()
    names = applicable(attacked.names, attacked.job)
    norm, attack = subject.config.threat.norm, subject.config.attack
    probe = None if norm == "linf" else math.sqrt(math.prod(subject.data.shape))
    with threads_set(options.threads):
        attacked.check(options.allow, names)
        radii = _Radii(attacked, names)
        curves = {
            name: sweeps.sweep(lambda eps, name=name: radii.robust(eps)[name], epsilons, norm=norm, probe=probe)  # type: ignore[misc]
            for name in (*names, "worst case")
        }
    for name, curve in curves.items():
        for point in (*curve["points"], curve["probe"]):
            point |= radii.details(name, point["eps"])
    settings = {
        "steps": attack.steps, "step_size": float(attack.step_size), "restarts": attack.restarts, "seed": subject.seed,
    }  # fmt: skip
    result = {"curves": curves, "threat": {"norm": norm}, "attack": settings, **subject.described}
    subject.home.mkdir(parents=True, exist_ok=True)
    write_arrays(subject.home / SWEPT, {"index": subject.index.numpy(), **radii.examples()})
    return subject.home, write_result(subject.home / SWEEP, result)


def dissect_run(
    target: str | Path, options: Options | None = None, **keywords: Any
) -> tuple[Path, dict[str, Dissection]]:
    """Dissect PGD on a routed run: which predictions and which choices of experts survive it.

    Every image is attacked, those that are wrong without an attack too. The options' `attacks` are PGD's names as in
    `suite`, one dissection each; keywords: `Options` by name.

    Writes `dissection.json`, with each one's settings, flags, threat, seed and data, the names of the `classes` that
    its `per_class` numbers, and the `masking_gap` of all; returns its folder, and the dissections by attack. Raises
    `InputError` for a model without MoE layers and whatever else cannot be used.
    """
    subject = open_subject(target, options := options_of(options, keywords))
    attacked = subject.routed_under_pgd("dissect")
    predict, job, names = attacked.predict, attacked.job, attacked.names
    dissections: dict[str, Dissection] = {}
    with threads_set(options.threads):
        attacked.check(options.allow)
        started = time.perf_counter()
        for name in names:
            batches = [dissect(predict, *batch, batch_size=options.batch_size) for batch in attacked.images(name)]
            dissections[name] = Dissection.merge(batches)
            if outermost():
                share = dissections[name].survived.double().mean().item()
                tell_attack(name, share, job.setting.threat, time.perf_counter() - started)
    robust = {name: each.survived for name, each in dissections.items()}
    gap = masking_gap({"clean": dissections[names[0]].clean_correct.bool(), **robust})
    result = {}
    for name, each in dissections.items():
        attack = build(name, predict, job.setting, None)
        flags = dict.fromkeys(attack.flags, len(list(job.tasks([name]))))
        result[name] = sealed(each.to_dict() | {
            "masking_gap": gap, "threat": asdict(job.setting.threat),
            "attack": {**attack.settings, "seed": subject.seed}, "flags": flags, "classes": list(subject.classes),
            **subject.described,
        })  # fmt: skip
    subject.home.mkdir(parents=True, exist_ok=True)
    write_text(subject.home / DISSECTION, json.dumps(result, indent=2) + "\n")
    return subject.home, dissections
