"""Clean and robust accuracy of any classifier of [0, 1] pixels, under one attack or many, and in the worst case.

Axes: `N` examples, `C` channels, `H W` size. Accuracies are fractions, not percent.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from advmoe.attacks.pgd import Predict
from advmoe.attacks.routed import RoutedPlan
from advmoe.config import AttackConfig, Pixels
from advmoe.errors import InputError, whole
from advmoe.evaluation.checks import CHECKED, CHECKS, Check, check, check_data, check_labels, require_passed
from advmoe.evaluation.fingerprint import fingerprint
from advmoe.evaluation.harness import Helpers, Job, Journal, Load, run_tasks
from advmoe.evaluation.outcomes import (
    Clean,
    Measurement,
    applicable,
    classified,
    collected,
    column,
    gradient_passes,
    make_job,
    masking_gap,
    routed_plan,
    summary,
)
from advmoe.evaluation.randomised import Repeatable, averaged
from advmoe.evaluation.scoring import EvaluationData, device_of, in_memory, measuring, size, take
from advmoe.evaluation.suite import named_for_now, require_classes
from advmoe.models.state import digest
from advmoe.pool import Place, threads_set
from advmoe.progress import shown, tell
from advmoe.rundir import DIGEST
from advmoe.text import show
from advmoe.threat import ThreatModel


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


class Elsewhere(Protocol):
    """Makes attacks in processes that find everything by themselves: see `shards.Shards`."""

    @property
    def device(self) -> str:
        """The kind of device that they compute on."""

    def attack(self, job: Job, names: Sequence[str], journal: Journal) -> None:
        """Do the tasks of the attacks `names` that `journal` lacks."""


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How an evaluation is run: where, by how many processes, and where its finished batches are stored."""

    workers: int = 1
    threads: int | None = None
    """CPU threads of each process; None leaves PyTorch's number, and then results of different machines may differ."""
    accelerator: str = "cpu"
    """`auto`, `cpu` or `cuda`, or one device such as `cuda:1`."""
    journal: Path | None = None
    """The folder of finished batches, until the end."""
    resume: bool = False
    elsewhere: Elsewhere | None = None
    """Makes the attacks in place of processes of this machine; needs a journal."""

    def devices(self) -> list[torch.device]:
        """The device of each process, repeated if there are more processes. Raises `ValueError` without CUDA."""
        if self.accelerator not in ("auto", "cpu", "cuda"):
            try:
                return [torch.device(self.accelerator)]
            except RuntimeError as error:
                raise InputError(f"device must be one that PyTorch knows, got {show(self.accelerator)}") from error
        present = torch.cuda.device_count() if self.accelerator != "cpu" else 0
        if self.accelerator == "cuda" and not present:
            raise InputError("accelerator must be auto or cpu where no CUDA device is present, got 'cuda'")
        return [torch.device("cuda", i) for i in range(present)] or [torch.device("cpu")]


def assess(
    load: Load,
    data: EvaluationData,
    measurement: Measurement,
    *,
    allow: Collection[str] = (),
    execution: Execution | None = None,
) -> Evaluation:
    """Check a classifier, attack it in every way that is asked for, and count.

    Args:
        load: makes the classifier, `x -> logits` on [0, 1] pixels, for a device; each process calls it once.
        measurement: the attacks. execution: processes, devices, and where finished batches are kept.
        allow: checks that may fail (see `checks`).

    Raises `ValueError` for a failed check, an unknown attack or data that cannot be used; nothing has run then.
    """
    execution = execution or Execution()
    devices = execution.devices()
    device = devices[0]
    predict = load(device)
    job, wanted = make_job(predict, data, measurement, device)
    names, journal = applicable(wanted, job), Journal(execution.journal)
    left = [task for task in job.tasks(names) if not (execution.resume and journal.holds(task))]
    others = [devices[i % len(devices)] for i in range(1, min(execution.workers, len(left)))]
    places = [Place(execution.threads, str(other)) for other in others]
    with threads_set(execution.threads), closing(journal), ExitStack() as stack:
        helpers = None
        if places:  # they start while the model is checked
            helpers = stack.enter_context(closing(Helpers(load, places, job, names)))
        checks = checked(predict, job, device, allow, names)
        if execution.resume and execution.journal is not None and not execution.journal.exists():
            tell(f"note  nothing to continue in {execution.journal}: this evaluation starts anew")
        mark = fingerprint(predict, job, names, device, checks)
        if (elsewhere := execution.elsewhere) is not None and elsewhere.device != device.type:
            mark |= {"device": elsewhere.device, "kernels": None}
        stored = journal.open(mark, resume=execution.resume)
        clean = classified(predict, job, device)
        if "routed" in names:
            plan = RoutedPlan.from_json(stored["plan"]) if stored and "plan" in stored else None
            plan = plan or routed_plan(predict, job, clean, device)
            journal.note(plan=plan.to_json())
            job = replace(job, plan=plan)
        if elsewhere is None:
            run_tasks(job, names, predict, journal, device, helpers)
        else:
            elsewhere.attack(job, names, journal)
    robust, entries = collected(job, journal, names)
    entries |= {name: {"skipped": _ADDS_NOTHING} for name in wanted if name not in names}
    result = _numbers(job, {"clean": clean.correct, **robust}, entries, checks)
    if isinstance(predict, nn.Module) and predict.state_dict():
        result[DIGEST] = digest(predict)
    predicted = {name: column(job, journal, name, "predicted") for name in names}
    return Evaluation(result, _examples(job, clean, robust, predicted), predict)


def placed(predict: Predict, device: torch.device) -> Predict:
    """A module on `device`, channels-last; any other callable as it is."""
    if isinstance(predict, nn.Module):
        return predict.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]
    return predict


_BY_PASS = CHECKS.index("deterministic")
"""How many checks are of a single pass, hence of a randomised model itself."""


def checked(
    predict: Predict, job: Job, device: torch.device, allow: Collection[str], names: Sequence[str]
) -> list[Check]:
    """The checks on the first images, each of which passed or may fail.

    Raises `InputError` where another one failed, where the whole data have pixels or labels that cannot be, and where
    the attacks `names` cannot be made on as many classes.
    """
    size(job.data)
    x, y = take(job.data, slice(0, CHECKED), device)
    with measuring(predict, device):
        eot = job.setting.eot
        with averaged(predict, eot, job.seed, "check"):
            checks = check(predict, x, y)
        if eot is not None and not any(each.fatal and not each.passed for each in checks):
            # What must repeat is the mean over given draws. Which of them an image gets depends on its batch.
            checks = [*checks[:_BY_PASS], *check(Repeatable(predict, eot), x, y)[_BY_PASS:]]
            allow = {*([allow] if isinstance(allow, str) else allow), "batch-independent"}
        require_passed(checks, allow)
        with torch.no_grad():
            num_classes = predict(x[:1]).shape[1]
    require_classes(names, num_classes)
    if isinstance(job.data, tuple):
        check_data(*job.data, num_classes)
    else:
        check_labels(job.data.labels, num_classes)
    return checks


_ADDS_NOTHING = "the model has no MoE layers, so routed adds nothing"


def _numbers(
    job: Job, robust: dict[str, Tensor], entries: dict[str, dict[str, Any]], checks: Sequence[Check]
) -> dict[str, Any]:
    """The content of `evaluation.json`, but for the digest. robust: as of `outcomes`. entries: those of the attacks."""
    return {
        **summary(robust),
        "masking_gap": masking_gap(robust),
        "gradient_passes": gradient_passes(entries),
        "threat": asdict(job.setting.threat),
        "attack": job.setting.described | {"batch_size": job.batch_size, "seed": job.seed},
        "attacks": entries,
        "checks": [each.to_dict() for each in checks],
    }


def _examples(
    job: Job, clean: Clean, robust: dict[str, Tensor], predicted: dict[str, Tensor]
) -> dict[str, np.ndarray[Any, Any]]:
    """The content of `evaluation-examples.npz`."""
    labels = job.data[1] if isinstance(job.data, tuple) else job.data.labels
    arrays = {
        "label": labels.cpu().numpy(),
        "clean_correct": clean.correct.numpy(),
        "clean_predicted": clean.predicted.numpy(),
        "pathway": clean.pathways.numpy(),
    }
    for name in robust:
        arrays[f"robust/{name}"] = robust[name].numpy()
        arrays[f"predicted/{name}"] = predicted[name].numpy()
    return arrays


def evaluate(
    model: Predict,
    data: EvaluationData | Iterable[tuple[Tensor, Tensor]],
    *,
    attacks: str | Sequence[str | Callable[..., Tensor]] | None = None,
    threat: ThreatModel | None = None,
    steps: int = 50,
    step_size: float = 2 / 255,
    restarts: int = 1,
    queries: int = 25_000,
    batch_size: int = 250,
    seed: int = 0,
    eot: int | None = None,
    allow: Collection[str] = (),
    device: torch.device | str | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Clean and robust accuracy of any callable `x -> logits` on [0, 1] pixels.

    Args:
        data: an `ImageSet` or `FileSet`, pixels (N, C, H, W) and classes (N,), or a `DataLoader` or other iterable of
            such batches, which is read into memory. threat: default l-inf, 8/255.
        attacks: names such as `pgd-50`, `autoattack`, `routed`, in a list or separated by commas; by default PGD, and
            as many steps again: under soft-routing gradients for a routed model of ours, on the margin for any other.
            Functions `(predict, x, y, *, threat, seed) -> adversarial x` count in the worst case like any other, under
            their own names (see `extend.register_attack`).
        steps, step_size, restarts: of PGD; `routed` takes its steps from them too. queries: of Square within `routed`.
        eot: of a randomised model, which is refused without, the draws that attacks and scores average over: its answer
            is the mean of their probabilities.
        seed: of every random draw. progress: show a bar on a terminal.
        allow: checks made before the attack that may fail, by name.
        device: where images are put; by default where the module is, the CPU for any other callable.

    Returns `evaluation.json`'s content (fractions). Raises `ValueError` for data or a model that fail the checks, and
    for an unknown attack.
    """
    if not isinstance(threat, ThreatModel | None):
        raise InputError(f"threat must be a ThreatModel(norm, eps), got {show(threat)}")
    if not isinstance(allow, Iterable):
        raise InputError(f"allow must be names of checks, got {show(allow)}")
    positive("batch_size", batch_size)
    attack = AttackConfig(steps=steps, step_size=Pixels(step_size), restarts=restarts, queries=queries)
    execution = Execution(accelerator=str(device_of(model) if device is None else device))
    with shown(progress), named_for_now(attacks) as names:
        measurement = Measurement(
            threat=threat or ThreatModel(),
            attack=attack,
            attacks=names,
            batch_size=batch_size,
            seed=seed,
            eot=eot,
        )
        return assess(lambda _: model, in_memory(data), measurement, allow=allow, execution=execution).result


def positive(name: str, value: int) -> int:
    """`value`, which must be at least 1: else a `ValueError` that calls it `name`."""
    if not whole(value):
        raise InputError(f"{name} must be a whole number, got {show(value)}")
    if value < 1:
        raise InputError(f"{name} must be >= 1, got {value!r}")
    return value
