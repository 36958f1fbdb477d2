"""Clean and robust accuracy of any classifier of [0, 1] pixels, under one attack or many, and in the worst case.

Axes: `N` examples, `C` channels, `H W` size, `K` classes, `L` MoE layers. Fractions, not percent.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from advmoe.attacks.pgd import Predict
from advmoe.attacks.routed import RoutedPlan, RoutedTarget, plan_attack
from advmoe.config import AttackConfig, Pixels
from advmoe.data import FileSet
from advmoe.errors import InputError
from advmoe.evaluation.checks import Check, check, check_data, check_labels, require_passed
from advmoe.evaluation.harness import Helpers, Job, Journal, Load, run_tasks
from advmoe.evaluation.intervals import wilson
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
from advmoe.evaluation.suite import ATTACKS, Setting, default_attacks, named, require_classes
from advmoe.models.state import digest
from advmoe.moe.routing import route
from advmoe.ops import kernels_used
from advmoe.pool import Place, threads_set
from advmoe.progress import BRIEF, shown, tell, tracked
from advmoe.rundir import DIGEST
from advmoe.seeding import seed_for
from advmoe.threat import ThreatModel

CHECKED = 128
"""Images that the checks before an attack look at."""


def outcomes(
    predict: Predict,
    data: EvaluationData,
    *,
    threat: ThreatModel,
    attack: AttackConfig,
    attacks: Sequence[str] | None = None,
    batch_size: int = 250,
    seed: int = 0,
    device: torch.device | str | None = None,
    accept: Callable[[Clean], object] = lambda clean: None,
) -> dict[str, Tensor]:
    """Per example, whether it is classified correctly: clean, and under each attack, (N,) booleans by name.

    `attacks` are names as in `suite`; by default PGD, and for a routed model PGD through soft routing. No checks are
    made: this is what `evaluate` and training count with. `accept` sees what the model does without an attack, before
    any is made. `device` is the module's own unless given, the CPU for any other callable. Raises `ValueError` for
    empty data.
    """
    device = device_of(predict) if device is None else torch.device(device)
    job, wanted = make_job(predict, data, device, threat, attack, attacks, batch_size, seed)
    names = applicable(wanted, job)
    clean = classified(predict, job, device)
    accept(clean)
    held, _ = measured(predict, job, names, clean, device)
    return {"clean": clean.correct, **held}


def measured(
    predict: Predict, job: Job, names: Sequence[str], clean: Clean, device: torch.device
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """By full name of an attack, whether each example is still right, (N,) booleans, and its `evaluation.json` entry.

    As of `outcomes`, in this process. `clean` is what `classified` found.
    """
    journal = Journal()
    if "routed" in names:
        job = replace(job, plan=_routed_plan(predict, job, clean, device))
    run_tasks(job, names, predict, journal, device)
    held = {name: _joined(job, journal, name, "robust").bool() for name in names}
    return held, {name: _report(job, journal, name, held[name]) for name in names}


def make_job(
    predict: Predict, data: EvaluationData, device: torch.device, threat: ThreatModel, attack: AttackConfig,
    attacks: Sequence[str] | None, batch_size: int, seed: int,
) -> tuple[Job, tuple[str, ...]]:  # fmt: skip
    """The job, but for what `routed` has to plan, and the full names of the attacks asked for (by default PGD's)."""
    setting = Setting(threat=threat, attack=attack, routed=is_routed(predict, data, device))
    wanted = named(attacks if attacks is not None else default_attacks(setting), setting)
    return Job(data=data, setting=setting, batch_size=positive("batch_size", batch_size), seed=seed), wanted


def applicable(wanted: Sequence[str], job: Job) -> tuple[str, ...]:
    """The attacks that can add something: all, but `routed` for a plain model. Raises `ValueError` if none is left."""
    names = tuple(name for name in wanted if job.setting.routed or not ATTACKS.find(name).for_routed)
    if not names:
        raise InputError("attacks must hold more than routed for a model without MoE layers (routed adds nothing)")
    return names


def summary(found: dict[str, Tensor]) -> dict[str, Any]:
    """Accuracies of `outcomes`: clean, per attack, and `worst_case`: robust only if every attack failed."""
    attacks = {name: held for name, held in found.items() if name != "clean"}
    worst = torch.stack([found["clean"], *attacks.values()]).all(0)
    return {
        "clean_accuracy": found["clean"].double().mean().item(),
        "robust_accuracy": {name: held.double().mean().item() for name, held in attacks.items()},
        "worst_case": worst.double().mean().item(),
        "num_examples": len(found["clean"]),
    }


def masking_gap(found: dict[str, Tensor]) -> float | None:
    """Of `outcomes`: the accuracy under the strongest straight-through PGD (`pgd-N`) less the worst case.

    None where there is no such attack.
    """
    numbers = summary(found)
    usual = [share for name, share in numbers["robust_accuracy"].items() if re.fullmatch(r"pgd-\d+", name)]
    return float(min(usual) - numbers["worst_case"]) if usual else None


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


def classified(predict: Predict, job: Job, device: torch.device) -> Clean:
    """What the classifier does with a job's images as they are."""
    found: list[tuple[Tensor, ...]] = []
    slices = [slice(first, first + job.batch_size) for first in range(0, size(job.data), job.batch_size)]
    with measuring(predict, device), torch.no_grad(), closing(stream(job.data, slices, device)) as batches:
        for x, y in tracked(batches, "clean", total=len(slices), delay=BRIEF):
            with route() as routing:
                logits = predict(x)
            chosen = routing.pathway() if routing.choices else torch.empty(len(x), 0, dtype=torch.long)
            finite = logits.isfinite().all(1)
            found.append((correct(logits, y).cpu(), logits.argmax(1).cpu(), chosen.cpu(), finite.cpu()))
    return Clean(*(torch.cat(column) for column in zip(*found, strict=True)))


def _joined(job: Job, journal: Journal, name: str, column: str) -> Tensor:
    """One column of an attack's results over all batches, (N,)."""
    results = [journal.get(task) for task in job.tasks([name])]
    return torch.cat([torch.tensor(result[column]) for result in results if result is not None])


@dataclass(frozen=True)
class Evaluation:
    """An evaluation's numbers, and the outcome of every example behind them."""

    result: dict[str, Any]
    """What `evaluation.json` holds."""
    examples: dict[str, np.ndarray[Any, Any]]
    """What `evaluation-examples.npz` holds: label, clean_correct, clean_predicted, pathway, and for each attack
    `robust/NAME` and `predicted/NAME`, all in the order of the images.
    """
    predict: Predict
    """The classifier, on the first device."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How an evaluation is run: where, by how many processes, kept in what place."""

    workers: int = 1
    threads: int | None = None
    """CPU threads of each process; None leaves PyTorch's number, and then results of different machines may differ."""
    accelerator: str = "cpu"
    """`auto`, `cpu` or `cuda`, or one device such as `cuda:1`."""
    journal: Path | None = None
    """Where finished batches are kept until the end."""
    resume: bool = False

    def devices(self) -> list[torch.device]:
        """The device of each process, repeated if there are more processes. Raises `ValueError` without CUDA."""
        if self.accelerator not in ("auto", "cpu", "cuda"):
            return [torch.device(self.accelerator)]
        present = torch.cuda.device_count() if self.accelerator != "cpu" else 0
        if self.accelerator == "cuda" and not present:
            raise InputError("accelerator must be auto or cpu where no CUDA device is present, got 'cuda'")
        return [torch.device("cuda", i) for i in range(present)] or [torch.device("cpu")]


def assess(
    load: Load,
    data: EvaluationData,
    *,
    threat: ThreatModel,
    attack: AttackConfig,
    attacks: Sequence[str] | None = None,
    batch_size: int = 250,
    seed: int = 0,
    allow: Collection[str] = (),
    plan: Plan | None = None,
) -> Evaluation:
    """Check a classifier, attack it in every way that `attacks` names, and count.

    Args:
        load: makes the classifier, `x -> logits` on [0, 1] pixels, for a device; each process calls it once.
        attacks: names as in `suite`. attack: what `pgd` and `routed` take their steps from.
        batch_size: images per attack call. seed: every random draw follows from it, the position of a batch and that
            of an image in it. With another `batch_size` an attack is as strong, but a few single images end otherwise.
        allow: checks that may fail (see `checks`).
        plan: processes, devices, and where finished batches are kept.

    Raises `ValueError` for a failed check, an unknown attack or data that cannot be used; nothing has run then.
    """
    plan = plan or Plan()
    devices = plan.devices()
    predict = load(devices[0])
    job, wanted = make_job(predict, data, devices[0], threat, attack, attacks, batch_size, seed)
    names, journal = applicable(wanted, job), Journal(plan.journal)
    left = [task for task in job.tasks(names) if not (plan.resume and journal.holds(task))]
    others = (devices[i % len(devices)] for i in range(1, min(plan.workers, len(left))))
    places = [Place(plan.threads, str(device)) for device in others]
    with threads_set(plan.threads), closing(journal), ExitStack() as stack:
        helpers = None
        if places:  # they start while the model is checked
            helpers = stack.enter_context(closing(Helpers(load, places, job, names)))
        checks = checked(predict, job, devices[0], allow, names)
        if plan.resume and plan.journal is not None and not plan.journal.exists():
            tell(f"nothing to continue in {plan.journal}: this evaluation starts anew")
        stored = journal.open(_fingerprint(predict, job, names, devices[0], checks), resume=plan.resume)
        clean = classified(predict, job, devices[0])
        if "routed" in names:
            ready = RoutedPlan.from_json(stored["plan"]) if stored and "plan" in stored else None
            ready = ready or _routed_plan(predict, job, clean, devices[0])
            journal.note(plan=ready.to_json())
            job = replace(job, plan=ready)
        run_tasks(job, names, predict, journal, devices[0], helpers)
    return _evaluation(predict, job, journal, clean, names, wanted, [each.to_dict() for each in checks])


def placed(predict: Predict, device: torch.device) -> Predict:
    """A module on `device`, channels-last; any other callable as it is."""
    if isinstance(predict, nn.Module):
        return predict.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]
    return predict


def checked(
    predict: Predict, job: Job, device: torch.device, allow: Collection[str], names: Sequence[str]
) -> list[Any]:
    """The checks on the first images, all of which passed or may fail; and the whole data's pixels and labels, and
    whether the attacks `names` can be made on as many classes.
    """
    size(job.data)
    x, y = take(job.data, slice(0, CHECKED), device)
    with measuring(predict, device):
        checks = check(predict, x, y)
        require_passed(checks, allow)
        with torch.no_grad():
            num_classes = predict(x[:1]).shape[1]
    require_classes(names, num_classes)
    if isinstance(job.data, tuple):
        check_data(*job.data, num_classes)
    else:
        check_labels(job.data.labels, num_classes)
    return checks


def _routed_plan(predict: Predict, job: Job, clean: Clean, device: torch.device) -> RoutedPlan:
    """Search on the first correctly classified images, and count the pathways that all of them take."""
    budget = job.setting.budget
    chosen = clean.correct.nonzero()[:, 0][: budget.search_examples].tolist()
    x, y = zip(*(take(job.data, slice(i, i + 1), device) for i in chosen), strict=True) if chosen else ((), ())
    with measuring(predict, device):
        empty = take(job.data, slice(0, 0), device)
        return plan_attack(
            RoutedTarget(OpenRouting(predict), predict, job.setting.threat),
            torch.cat([*x, empty[0]]).contiguous(memory_format=torch.channels_last), torch.cat([*y, empty[1]]),
            clean.pathways, budget=budget, seed=seed_for(job.seed, "search"),
        )  # fmt: skip


def _fingerprint(
    predict: Predict, job: Job, names: Sequence[str], device: torch.device, checks: Sequence[Check]
) -> dict[str, Any]:
    """What the numbers depend on, but for the code: an interrupted evaluation continues only where it is the same."""
    model = digest(predict) if isinstance(predict, nn.Module) else None
    steady = all(each.passed for each in checks if each.name == "deterministic")
    if model is None and steady:  # without weights to compare, what it makes of the first images
        with measuring(predict, device), torch.no_grad():
            model = _digest(predict(take(job.data, slice(0, CHECKED), device)[0]).argmax(1))
    attack = job.setting.attack
    return {
        "attacks": list(names), "threat": asdict(job.setting.threat), "batch_size": job.batch_size, "seed": job.seed,
        "attack": {"steps": attack.steps, "step_size": float(attack.step_size), "restarts": attack.restarts,
                   "pathways": attack.pathways, "queries": attack.queries},
        "device": device.type, "threads": torch.get_num_threads(), "torch": torch.__version__,
        "kernels": kernels_used() if device.type == "cpu" else None, "data": _data_digest(job.data),
        "model": model,
    }  # fmt: skip


def _data_digest(data: EvaluationData) -> str:
    """A digest of the examples; of those in files, of what would tell that a file has changed."""
    if isinstance(data, FileSet):
        return data.digest()
    return _digest(*(data if isinstance(data, tuple) else (data.images, data.labels)))


def _digest(*tensors: Tensor) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def _evaluation(
    predict: Predict, job: Job, journal: Journal, clean: Clean, names: Sequence[str], wanted: Sequence[str],
    checks: list[dict[str, Any]],
) -> Evaluation:  # fmt: skip
    held = {name: _joined(job, journal, name, "robust").bool() for name in names}
    labels = job.data[1] if isinstance(job.data, tuple) else job.data.labels
    found = {"clean": clean.correct, **held}
    reports = {name: _report(job, journal, name, held[name]) for name in names}
    reports |= {name: {"skipped": _ADDS_NOTHING} for name in wanted if name not in names}
    result = {
        **summary(found),
        "masking_gap": masking_gap(found),
        "threat": asdict(job.setting.threat),
        "attack": {
            "steps": job.setting.attack.steps, "step_size": float(job.setting.attack.step_size),
            "restarts": job.setting.attack.restarts, "pathways": job.setting.attack.pathways,
            "queries": job.setting.attack.queries, "batch_size": job.batch_size, "seed": job.seed,
        },
        "attacks": reports,
        "checks": checks,
    }  # fmt: skip
    if isinstance(predict, nn.Module) and predict.state_dict():
        result[DIGEST] = digest(predict)
    examples = {
        "label": labels.cpu().numpy(),
        "clean_correct": clean.correct.numpy(),
        "clean_predicted": clean.predicted.numpy(),
        "pathway": clean.pathways.numpy(),
    }
    for name in names:
        examples[f"robust/{name}"] = held[name].numpy()
        examples[f"predicted/{name}"] = _joined(job, journal, name, "predicted").numpy()
    return Evaluation(result, examples, predict)


_ADDS_NOTHING = "the model has no MoE layers, so routed adds nothing"


def _report(job: Job, journal: Journal, name: str, held: Tensor) -> dict[str, Any]:
    """One attack's entry in `evaluation.json`."""
    found = [result for task in job.tasks([name]) if (result := journal.get(task)) is not None]
    parts: dict[str, dict[str, int]] = {}
    for result in found:
        for part in result["parts"]:
            kept = parts.setdefault(part["name"], {"attempted": 0, "broken": 0})
            kept["attempted"] += part["attempted"]
            kept["broken"] += part["broken"]
    flags = [flag for result in found for flag in result["flags"]]
    return {
        "robust_accuracy": held.double().mean().item(),
        "interval": list(wilson(int(held.sum()), len(held))),
        "examples": len(held),
        "seconds": round(sum(result["seconds"] for result in found), 3),
        "model_calls": {kind: sum(result["model_calls"][kind] for result in found) for kind in ("forward", "gradient")},
        "seed": job.seed,
        "flags": {flag: flags.count(flag) for flag in dict.fromkeys(flags)},
        "parts": parts,
        "settings": found[0]["settings"],
    }


def evaluate(
    model: Predict,
    data: EvaluationData,
    *,
    attacks: Sequence[str] | None = None,
    threat: ThreatModel | None = None,
    steps: int = 50,
    step_size: float = 2 / 255,
    restarts: int = 1,
    queries: int = 25_000,
    batch_size: int = 250,
    seed: int = 0,
    allow: Collection[str] = (),
    device: torch.device | str | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Clean and robust accuracy of any callable `x -> logits` on [0, 1] pixels.

    Args:
        data: an `ImageSet` or `FileSet`, or pixels (N, C, H, W) and classes (N,). threat: default l-inf, 8/255.
        attacks: names such as `pgd-50`, `autoattack`, `routed`; by default PGD, and for a routed model of ours PGD
            under soft-routing gradients too.
        steps, step_size, restarts: of PGD; `routed` takes its steps from them too. queries: of Square within `routed`.
        seed: of every random draw. progress: show a bar on a terminal.
        allow: checks made before the attack that may fail, by name.
        device: where images are put; by default where the module is, the CPU for any other callable.

    Returns `evaluation.json`'s content (fractions). Raises `ValueError` for data or a model that fail the checks, and
    for an unknown attack.
    """
    plan = Plan(accelerator=str(device_of(model) if device is None else device))
    size = Pixels(step_size)
    attack = AttackConfig(steps=steps, step_size=size, restarts=restarts, queries=queries)
    with shown(progress):
        return assess(
            lambda _: model, data, threat=threat or ThreatModel(), attack=attack, attacks=attacks,
            batch_size=batch_size, seed=seed, allow=allow, plan=plan,
        ).result  # fmt: skip


def positive(name: str, value: int) -> int:
    """`value`, which must be at least 1: else a `ValueError` that calls it `name`."""
    if value < 1:
        raise InputError(f"{name} must be >= 1, got {value!r}")
    return value
