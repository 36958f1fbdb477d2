"""Measuring a run directory, or a user's own classifier, and keeping what was found beside it.

Axes: `N` examples, `L` MoE layers. Fractions, not percent.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from advmoe.attacks.pgd import Predict
from advmoe.evaluation import sweep as sweeps
from advmoe.evaluation.accuracy import (
    Plan,
    applicable,
    assess,
    classified,
    masking_gap,
    measured,
    positive,
)  # fmt: skip
from advmoe.evaluation.cost import cost
from advmoe.evaluation.dissection import Dissection, dissect
from advmoe.evaluation.harness import Job, Journal
from advmoe.evaluation.subject import Options, options_of, subject
from advmoe.evaluation.suite import build, stretched
from advmoe.files import write_arrays, write_text
from advmoe.models import Classifier
from advmoe.pool import threads_set
from advmoe.rundir import (
    DISSECTION,
    EVALUATION,
    EXAMPLES,
    JOURNAL,
    SWEEP,
    sealed,
    write_result,
)


def evaluate_run(
    target: str | Path,
    options: Options | None = None,
    *,
    workers: int | None = None,
    resume: bool = False,
    **keywords: Any,
) -> dict[str, Any]:
    """Evaluate a run, or a user's `FILE.py:FACTORY`, on its test set; write `evaluation.json` and
    `evaluation-examples.npz`.

    Args:
        options: of one CPU thread, unless it says otherwise. keywords: `Options` by name.
        workers: processes that share the images, by default one per GPU or, without, per core, but no more than there
            are batches; their number changes no result.
        resume: continue an interrupted evaluation, whose finished batches lie in `.evaluation` beside the results.

    Raises `InputError` for whatever cannot be used; what was written before stays as it was.
    """
    given = subject(target, options := options_of(options, keywords, threads=1))
    threads, accelerator = options.threads, options.accelerator
    if workers is None:
        workers = _processes(-(-len(given.data) // positive("batch_size", options.batch_size)), accelerator)
    plan = Plan(
        workers=positive("workers", workers),
        threads=threads and positive("threads", threads), accelerator=accelerator,
        journal=given.home / JOURNAL, resume=resume,
    )  # fmt: skip
    found = assess(
        given.load, given.data, threat=given.threat, attack=given.config.attack, attacks=options.attacks,
        batch_size=options.batch_size, seed=given.seed, allow=options.allow, plan=plan,
    )  # fmt: skip
    result = found.result | given.described
    model = found.predict
    if isinstance(model, Classifier) and model.spec["input_size"] is not None:
        with threads_set(threads):
            result["cost"] = cost(model)
    written = save(given.home, result, {"index": given.index.numpy(), **found.examples})
    Journal(plan.journal).remove()
    return written


def _processes(batches: int, accelerator: str) -> int:
    """One process per GPU or, on the CPU, per core, where there are batches for all; starting one takes seconds."""
    devices = Plan(accelerator=accelerator).devices()
    most = len(devices) if devices[0].type == "cuda" else os.cpu_count() or 1
    return max(1, min(most, batches))


def save(home: Path, result: dict[str, Any], examples: dict[str, np.ndarray[Any, Any]]) -> dict[str, Any]:
    """Write `evaluation.json` and `evaluation-examples.npz` into `home`, each whole or not at all; what the former
    holds.
    """
    home.mkdir(parents=True, exist_ok=True)
    write_arrays(home / EXAMPLES, examples)
    return write_result(home / EVALUATION, result)


class _Radii:
    """What attacks do at one radius after another, each measured once."""

    def __init__(self, predict: Predict, job: Job, names: Sequence[str], device: torch.device) -> None:
        self.predict, self.job, self.names, self.device = predict, job, names, device
        self.clean = classified(predict, job, device)
        self.found: dict[float, tuple[dict[str, Tensor], dict[str, dict[str, Any]]]] = {}

    def held(self, eps: float) -> dict[str, Tensor]:
        """Whether each example is still right, (N,) booleans by attack, and under `worst case`."""
        if eps not in self.found:
            held: dict[str, Tensor] = {}
            details: dict[str, dict[str, Any]] = {}
            for name in self.names:
                job = replace(self.job, setting=stretched(name, self.job.setting, eps))
                outcome, reports = measured(self.predict, job, [name], self.clean, self.device)
                held |= outcome
                details[name] = {key: reports[name][key] for key in ("settings", "flags")}
            details["worst case"] = {"masking_gap": masking_gap({"clean": self.clean.correct, **held})}
            held["worst case"] = torch.stack([self.clean.correct, *held.values()]).all(0)
            self.found[eps] = held, details
        return self.found[eps][0]

    def details(self, name: str, eps: float) -> dict[str, Any]:
        """What else a point of the curve `name` holds, at a radius that was measured."""
        return self.found[eps][1][name]


def sweep_run(
    target: str | Path, options: Options | None = None, *, epsilons: Sequence[float], **keywords: Any
) -> tuple[Path, dict[str, Any]]:
    """Robust accuracy against the attack's radius, for each attack and in the worst case over them.

    Each attack's step is as of `suite.stretched`, so that every radius can be crossed. Writes `sweep.json` beside the
    run's other results and returns where that is, and its content: a `sweep.sweep` by attack, whose points hold the
    attack's `settings` and `flags` at that radius, and one under `worst case`, whose points hold `masking_gap`. Raises
    `InputError` for whatever cannot be used. keywords: `Options` by name.
    """
    given = subject(target, options := options_of(options, keywords))
    opened = given.under_attack()
    names = applicable(opened.names, opened.job)
    norm, attack = given.config.threat.norm, given.config.attack
    probe = None if norm == "linf" else math.sqrt(math.prod(given.data.shape))
    with threads_set(options.threads):
        opened.check(options.allow, names)
        at = _Radii(opened.predict, opened.job, names, opened.device)
        curves = {
            name: sweeps.sweep(lambda eps, name=name: at.held(eps)[name], epsilons, norm=norm, probe=probe)  # type: ignore[misc]
            for name in (*names, "worst case")
        }
    for name, curve in curves.items():
        for point in (*curve["points"], curve["probe"]):
            point |= at.details(name, point["eps"])
    settings = {
        "steps": attack.steps, "step_size": float(attack.step_size), "restarts": attack.restarts, "seed": given.seed,
    }  # fmt: skip
    result = {"curves": curves, "threat": {"norm": norm}, "attack": settings, **given.described}
    return given.home, write_result(given.home / SWEEP, result)


def dissect_run(
    target: str | Path, options: Options | None = None, **keywords: Any
) -> tuple[Path, dict[str, Dissection]]:
    """Dissect PGD on a routed run: which predictions and which choices of experts survive it.

    Every image is attacked, those that are wrong without an attack too. The options' `attacks` are PGD's names as in
    `suite`, one dissection each; keywords: `Options` by name. Writes `dissection.json`, with each one's settings,
    flags, threat, seed and data, and with the `masking_gap` of all; returns where that is, and the dissections. Raises
    `InputError` for a model without MoE layers and whatever else cannot be used.
    """
    given = subject(target, options := options_of(options, keywords))
    opened = given.routed_under_pgd("dissect")
    predict, job, names = opened.predict, opened.job, opened.names
    found: dict[str, Dissection] = {}
    with threads_set(options.threads):
        opened.check(options.allow)
        for name in names:
            batches = [dissect(predict, *batch, batch_size=options.batch_size) for batch in opened.images(name)]
            found[name] = Dissection.merge(batches)
    held = {name: each.survived for name, each in found.items()}
    gap = masking_gap({"clean": found[names[0]].clean_correct.bool(), **held})
    result = {}
    for name, each in found.items():
        attack = build(name, predict, job.setting, None)
        flags = dict.fromkeys(attack.flags, len(list(job.tasks([name]))))
        result[name] = sealed(each.to_dict() | {
            "masking_gap": gap, "threat": asdict(job.setting.threat),
            "attack": {**attack.settings, "seed": given.seed}, "flags": flags, **given.described,
        })  # fmt: skip
    given.home.mkdir(parents=True, exist_ok=True)
    write_text(given.home / DISSECTION, json.dumps(result, indent=2) + "\n")
    return given.home, found
