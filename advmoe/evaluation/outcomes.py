"""Whether a classifier is right about each example: as it is, and under each attack.

Axes: `N` examples, `L` MoE layers, `T` tokens. Accuracies are fractions, not percent.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from advmoe.attacks.pgd import Predict
from advmoe.attacks.routed import RoutedPlan, RoutedTarget, plan_attack
from advmoe.config import AttackConfig
from advmoe.errors import InputError, require_whole
from advmoe.evaluation.halfspaces import halfspaces_of
from advmoe.evaluation.harness import Job, Journal, run_tasks
from advmoe.evaluation.intervals import wilson
from advmoe.evaluation.randomised import averaged
from advmoe.evaluation.scoring import (
    EvaluationData,
    OpenRouting,
    correct,
    device_of,
    is_routed,
    measuring,
    size,
    stream,
    take,
)
from advmoe.evaluation.suite import ATTACKS, Setting, default_attacks, named
from advmoe.moe.routing import route
from advmoe.progress import BRIEF, tracked
from advmoe.seeding import seed_for
from advmoe.threat import ThreatModel


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Under which attacks accuracy is measured. Raises `ValueError` for a batch size or `eot` below 1, and for a seed
    that is no whole number.
    """

    threat: ThreatModel
    attack: AttackConfig
    """What `pgd` and `routed` take their steps from."""
    attacks: Sequence[str] | None = None
    """Names as in `suite`; None: PGD, and as many steps through soft routing or, of a plain model, on the margin."""
    batch_size: int = 250
    """Images per attack call. With another one an attack is as strong, but a few single images end otherwise."""
    seed: int = 0
    """Every random draw follows from it, the position of a batch and that of an image in it."""
    eot: int | None = None
    """Draws that a randomised model is averaged over (see `randomised`); None for any other, which is checked."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        require_whole("batch_size", self.batch_size, 1)
        seed_for(self.seed)  # raises, also where no image is left to be attacked
        if self.eot is not None:
            require_whole("eot", self.eot, 1)


@dataclass(frozen=True)
class Clean:
    """What a classifier does with the images as they are."""

    correct: Tensor
    """(N,) booleans."""
    predicted: Tensor
    """(N,) classes."""
    pathways: Tensor
    """(N, L) expert indices, (N, L, T) where tokens are routed one by one; (N, 0) for a plain model."""
    finite: Tensor
    """Whether no logit is NaN or infinite, (N,) booleans."""


def outcomes(
    predict: Predict,
    data: EvaluationData,
    measurement: Measurement,
    *,
    device: torch.device | str | None = None,
    accept: Callable[[Clean], object] = lambda clean: None,
) -> dict[str, Tensor]:
    """Per example, whether it is classified correctly: `clean`, and under each attack by name; (N,) booleans.

    No checks are made: this is what `evaluate` and training count with. `accept` is called with what the model does
    without an attack, before any is made. `device` is by default the module's own, the CPU for any other callable.
    Raises `ValueError` for empty data.
    """
    device = device_of(predict) if device is None else torch.device(device)
    job, wanted = make_job(predict, data, measurement, device)
    names = applicable(wanted, job)
    clean = classified(predict, job, device)
    accept(clean)
    robust, _ = measured(predict, job, names, clean, device)
    return {"clean": clean.correct, **robust}


def measured(
    predict: Predict, job: Job, names: Sequence[str], clean: Clean, device: torch.device
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Make the attacks of these full names in this process, and collect what came of them, as `collected` does."""
    journal = Journal()
    if "routed" in names:
        job = replace(job, plan=routed_plan(predict, job, clean, device))
    run_tasks(job, names, predict, journal, device)
    return collected(job, journal, names)


def make_job(
    predict: Predict, data: EvaluationData, measurement: Measurement, device: torch.device
) -> tuple[Job, tuple[str, ...]]:
    """The job, but for what `routed` has to plan, and the full names of the attacks asked for."""
    routed = is_routed(predict, data, device)
    x, _ = take(data, slice(0, 1), device)
    setting = Setting(
        threat=measurement.threat, attack=measurement.attack, routed=routed, halfspaces=halfspaces_of(predict, x),
        eot=measurement.eot,
    )  # fmt: skip
    attacks = default_attacks(setting) if measurement.attacks is None else measurement.attacks
    job = Job(data=data, setting=setting, batch_size=measurement.batch_size, seed=measurement.seed)
    return job, named(attacks, setting)


def applicable(wanted: Sequence[str], job: Job) -> tuple[str, ...]:
    """The attacks that can add something: all, but `routed` for a plain model. Raises `ValueError` if none is left."""
    names = tuple(name for name in wanted if job.setting.routed or not ATTACKS.find(name).for_routed)
    if not names:
        raise InputError("attacks must hold more than routed for a model without MoE layers (routed adds nothing)")
    return names


def classified(predict: Predict, job: Job, device: torch.device) -> Clean:
    """What the classifier does with a job's images as they are."""
    batches: list[tuple[Tensor, ...]] = []
    slices = [slice(first, first + job.batch_size) for first in range(0, size(job.data), job.batch_size)]
    with measuring(predict, device), torch.no_grad(), closing(stream(job.data, slices, device)) as examples:
        for index, (x, y) in zip(slices, tracked(examples, "clean", total=len(slices), delay=BRIEF), strict=True):
            with averaged(predict, job.setting.eot, job.seed, index.start, "clean") as asked, route() as routing:
                logits = asked(x)
            pathways = routing.pathway() if routing.choices else torch.empty(len(x), 0, dtype=torch.long)
            finite = logits.isfinite().all(1)
            batches.append((correct(logits, y).cpu(), logits.argmax(1).cpu(), pathways.cpu(), finite.cpu()))
    return Clean(*(torch.cat(column) for column in zip(*batches, strict=True)))


def routed_plan(predict: Predict, job: Job, clean: Clean, device: torch.device) -> RoutedPlan:
    """Search on the first correctly classified images, and count the pathways that all of them take."""
    budget = job.setting.budget
    chosen = clean.correct.nonzero()[:, 0][: budget.search_examples].tolist()
    x, y = zip(*(take(job.data, slice(i, i + 1), device) for i in chosen), strict=True) if chosen else ((), ())
    with measuring(predict, device), averaged(predict, job.setting.eot, job.seed, "search") as asked:
        empty = take(job.data, slice(0, 0), device)
        return plan_attack(
            RoutedTarget(OpenRouting(asked), asked, job.setting.threat),
            torch.cat([*x, empty[0]]).contiguous(memory_format=torch.channels_last), torch.cat([*y, empty[1]]),
            clean.pathways, budget=budget, seed=seed_for(job.seed, "search"),
        )  # fmt: skip


def collected(job: Job, journal: Journal, names: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """By full name of an attack: which examples are still right, (N,) booleans; and its entry in `evaluation.json`."""
    robust = {name: column(job, journal, name, "robust").bool() for name in names}
    return robust, {name: _entry(job, journal, name, robust[name]) for name in names}


def column(job: Job, journal: Journal, name: str, key: str) -> Tensor:
    """One column, `robust` or `predicted`, of an attack's results over all batches, (N,)."""
    results = [journal.get(task) for task in job.tasks([name])]
    return torch.cat([torch.tensor(result[key]) for result in results if result is not None])


def _entry(job: Job, journal: Journal, name: str, robust: Tensor) -> dict[str, Any]:
    """One attack's entry in `evaluation.json`."""
    results = [result for task in job.tasks([name]) if (result := journal.get(task)) is not None]
    parts: dict[str, dict[str, int]] = {}
    for part in (part for result in results for part in result["parts"]):
        total = parts.setdefault(part["name"], {"attempted": 0, "broken": 0})
        for count in total:
            total[count] += part[count]
    flags = [flag for result in results for flag in result["flags"]]
    calls = [result["model_calls"] for result in results]
    passes: list[Any] = [result.get("gradient_passes") for result in results]  # None of an earlier version
    return {
        "robust_accuracy": robust.double().mean().item(),
        "interval": list(wilson(int(robust.sum()), len(robust))),
        "examples": len(robust),
        "seconds": round(sum(result["seconds"] for result in results), 3),
        "model_calls": {kind: sum(each[kind] for each in calls) for kind in ("forward", "gradient")},
        "gradient_passes": None if None in passes else max(passes),  # of images that withstood it
        "seed": job.seed,
        "flags": {flag: flags.count(flag) for flag in dict.fromkeys(flags)},
        "parts": parts,
        "settings": results[0]["settings"],
    }


def summary(robust: dict[str, Tensor]) -> dict[str, Any]:
    """Accuracies of `outcomes`: clean, per attack, and `worst_case`: robust only if every attack failed."""
    attacks = {name: each for name, each in robust.items() if name != "clean"}
    return {
        "clean_accuracy": robust["clean"].double().mean().item(),
        "robust_accuracy": {name: each.double().mean().item() for name, each in attacks.items()},
        "worst_case": torch.stack([robust["clean"], *attacks.values()]).all(0).double().mean().item(),
        "num_examples": len(robust["clean"]),
    }


def masking_gap(robust: dict[str, Tensor]) -> float | None:
    """Of `outcomes`: the accuracy under the strongest straight-through PGD (`pgd-N`) less the worst case.

    None where there is no such attack. Two models' gaps compare where their attacks made as many gradient passes: part
    of a gap is what more passes find on any model (`gradient_passes`).
    """
    numbers = summary(robust)
    usual = straight_through(numbers["robust_accuracy"])
    return None if usual is None else float(numbers["robust_accuracy"][usual] - numbers["worst_case"])


def straight_through(shares: Mapping[str, float]) -> str | None:
    """The strongest of the attacks `pgd-N`, from which the masking gap is measured; None where there is none.

    shares: robust accuracy by attack.
    """
    return min((name for name in shares if re.fullmatch(r"pgd-\d+", name)), key=lambda name: shares[name], default=None)


def gradient_passes(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, int | None]:
    """How many passes with a gradient an image goes through that withstands them: `straight_through`, of the PGD that
    the masking gap starts from, and `worst_case`, of all attacks that were made.

    Where no image withstands an attack it is the most that any went through. entries: those of `collected`, by attack.
    None where a number is not known, or there is no such PGD.
    """
    made = {name: entry["gradient_passes"] for name, entry in entries.items() if "skipped" not in entry}
    usual = straight_through({name: entries[name]["robust_accuracy"] for name in made})
    worst = None if None in made.values() else sum(made.values())
    return {"straight_through": None if usual is None else made[usual], "worst_case": worst}
