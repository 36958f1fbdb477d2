"""Measuring a run directory, or a user's own classifier, and keeping what was found beside it.

Axes: `N` examples, `L` MoE layers. Fractions, not percent.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from advmoe.attacks.pgd import Predict
from advmoe.config import Config
from advmoe.data import Images, load_dataset
from advmoe.errors import InputError
from advmoe.evaluation import sweep as sweeps
from advmoe.evaluation.accuracy import (
    Plan,
    applicable,
    assess,
    checked,
    classified,
    make_job,
    masking_gap,
    measured,
    placed,
    positive,
)  # fmt: skip
from advmoe.evaluation.cost import cost
from advmoe.evaluation.dissection import Dissection, dissect
from advmoe.evaluation.harness import Job, Journal, Load
from advmoe.evaluation.scoring import measuring, stream
from advmoe.evaluation.suite import build, stretched
from advmoe.evaluation.targets import home_of, is_source
from advmoe.files import require_writable, write_arrays, write_text
from advmoe.models import Classifier
from advmoe.models.runs import load_run
from advmoe.models.sources import load_classifier
from advmoe.models.state import digest
from advmoe.pool import threads_set
from advmoe.progress import tell, tracked
from advmoe.pruning import deployed
from advmoe.rundir import (
    CONFIG,
    DIGEST,
    DISSECTION,
    EVALUATION,
    EXAMPLES,
    JOURNAL,
    SWEEP,
    config_note,
    diverged_note,
    require_plain,
    sealed,
    write_result,
)
from advmoe.seeding import generator_for, seed_for
from advmoe.threat import ThreatModel


@dataclass(frozen=True)
class _Loader:
    """Makes the classifier of a run or a source; each process calls it once."""

    target: str
    weights: str | None
    source: str | None
    digest: str | None = None
    """The digest that it must have: a run may be trained on, and a factory draw other weights, meanwhile."""

    def __call__(self, device: torch.device) -> Predict:
        """The classifier on `device`; of a sparse model the compacted form, which costs less. Raises `ValueError`."""
        predict = load_classifier(self.target, self.weights) if is_source(self.target) else self._run()
        if self.digest is not None and (found := digest_of(predict)) != self.digest:
            rule = f"make the same weights every time it is loaded (SHA-256 {self.digest[:16]})"
            raise InputError(f"{self.target} must {rule}, got {str(found)[:16]}: it changed meanwhile")
        return placed(predict, device)

    def _run(self) -> Classifier:
        return deployed(load_run(self.target, self.source))


def digest_of(predict: Predict) -> str | None:
    """The digest of what results are of: a loaded model's as its weights file has it, another module's own; None of
    any other callable.
    """
    if isinstance(predict, Classifier) and predict.origin is not None:
        return predict.origin.digest
    return digest(predict) if isinstance(predict, nn.Module) else None


@dataclass(frozen=True)
class Subject:
    """A classifier to be measured, with the images that measure it."""

    load: Load
    data: Images
    index: Tensor
    """The position of each image in the test set, (N,)."""
    config: Config
    home: Path
    """Where results are written."""
    seed: int
    source: str
    classes: tuple[str, ...]
    """Names of the classes."""
    digest: str | None
    """Of the model; None of a callable that is no module."""
    notes: tuple[str, ...]
    """Which images of the data set were left out, by which rule."""

    @property
    def described(self) -> dict[str, Any]:
        """What every result says of what it is of."""
        left_out = {"notes": list(self.notes)} if self.notes else {}
        return {DIGEST: self.digest, "data": {"name": self.source, "split": "test", **left_out}}

    @property
    def threat(self) -> ThreatModel:
        """Of the configuration."""
        return ThreatModel(self.config.threat.norm, float(self.config.threat.eps))


def subject(
    target: str | Path,
    *,
    weights: str | None = None,
    source: str | None = None,
    out: str | Path | None = None,
    overrides: dict[str, dict[str, Any]] | None = None,
    num_examples: int | None = None,
    seed: int | None = None,
    kept: bool = True,
) -> Subject:
    """What a run directory, or a user's own `FILE.py:FACTORY`, and the settings given with it describe.

    Args:
        source: see `load_run`.
        overrides: fields that replace those of the run's `config.yaml` (of the defaults, for a user's classifier).
        num_examples: a random subset of the test images, by `seed`.
        out: where results go; by default the run, or `evaluations/<file>-<factory>`.
        kept: whether results go there at all, so that it must be writable.

    Raises `ValueError` for a run, model, data or setting that cannot be used.
    """
    if num_examples is not None:
        positive("num_examples", num_examples)
    own = is_source(str(target))
    if not own:
        require_plain(Path(target))
    load = _Loader(str(target), weights, source)
    if not own and weights is not None:
        raise InputError(f"weights must go with FILE.py:FACTORY (a run has its own), got {weights!r}")
    if own and source is not None:
        raise InputError(f"--model must go with a run (FILE.py:FACTORY is one itself), got {source!r}")
    home = home_of(str(target), out)
    if kept:
        require_writable("out", home)
    settings = Config().to_dict() if own else _settings(Path(target))
    for group, fields in (overrides or {}).items():
        settings[group].update(fields)
    config = Config.from_dict(settings)
    model = load(torch.device("cpu"))  # what cannot be loaded shows before the data are read
    dataset = load_dataset(
        config.data.name, root=config.data.root, download=config.data.download, image_size=config.data.image_size,
        val_fraction=config.data.val_fraction, workers=config.data.workers, seed=config.training.seed,
    )  # fmt: skip
    found = dataset.num_classes, dataset.in_channels
    expected = (model.spec["num_classes"], model.spec["in_channels"]) if isinstance(model, Classifier) else found
    if any(known not in (None, there) for known, there in zip(expected, found, strict=True)):
        raise InputError(f"data must have the model's (classes, channels) {expected}, got {found}")
    seed = config.training.seed if seed is None else seed
    index = torch.arange(len(dataset.test))
    if num_examples is not None and num_examples < len(index):
        index = torch.randperm(len(index), generator=generator_for(seed, "examples"))[:num_examples].sort().values
    load = replace(load, digest=digest_of(model))
    images = dataset.test.subset(index)
    return Subject(
        load, images, index, config, home, seed, dataset.name, dataset.classes, load.digest, dataset.notes
    )  # fmt: skip


def _settings(run: Path) -> dict[str, dict[str, Any]]:
    """The fields of a run's configuration; says where it is not what the run began with, or where training diverged."""
    config = Config.load(run / CONFIG)
    for note in (config_note(run, config.digest()), diverged_note(run)):
        if note is not None:
            tell(f"note  {note}")
    return config.to_dict()


def evaluate_run(
    target: str | Path,
    *,
    weights: str | None = None,
    source: str | None = None,
    out: str | Path | None = None,
    attacks: Sequence[str] | None = None,
    overrides: dict[str, dict[str, Any]] | None = None,
    num_examples: int | None = None,
    batch_size: int = 250,
    accelerator: str = "auto",
    threads: int | None = 1,
    workers: int | None = None,
    seed: int | None = None,
    allow: Collection[str] = (),
    resume: bool = False,
) -> dict[str, Any]:
    """Evaluate a run, or a user's `FILE.py:FACTORY`, on its test set; write `evaluation.json` and
    `evaluation-examples.npz`.

    Args: as of `subject` and `assess`. workers: processes that share the images, by default one per GPU or, without,
        per core, but no more than there are batches; their number changes no result.
        threads: CPU threads of each, None for PyTorch's number. resume: continue an interrupted evaluation, whose
        finished batches lie in `.evaluation` beside the results.

    Raises `ValueError` for whatever cannot be used; what was written before stays as it was.
    """
    given = subject(
        target, weights=weights, source=source, out=out, overrides=overrides, num_examples=num_examples, seed=seed
    )
    if workers is None:
        workers = _processes(-(-len(given.data) // positive("batch_size", batch_size)), accelerator)
    plan = Plan(
        workers=positive("workers", workers),
        threads=threads and positive("threads", threads), accelerator=accelerator,
        journal=given.home / JOURNAL, resume=resume,
    )  # fmt: skip
    found = assess(
        given.load, given.data, threat=given.threat, attack=given.config.attack, attacks=attacks, batch_size=batch_size,
        seed=given.seed, allow=allow, plan=plan,
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


def _opened(
    given: Subject, accelerator: str, attacks: Sequence[str] | None, batch_size: int
) -> tuple[torch.device, Predict, Job, tuple[str, ...]]:
    """A subject ready to be attacked in this process: where, the classifier, the job, and the attacks' full names."""
    device = Plan(accelerator=accelerator).devices()[0]
    predict = given.load(device)
    job, names = make_job(
        predict, given.data, device, given.threat, given.config.attack, attacks, batch_size, given.seed
    )
    return device, predict, job, names


def opened_routed(
    given: Subject, target: str | Path, accelerator: str, attacks: Sequence[str] | None, batch_size: int, *,
    purpose: str,
) -> tuple[torch.device, Predict, Job, tuple[str, ...]]:  # fmt: skip
    """As `_opened`, of a routed model and PGD, by default as configured. Raises `ValueError` for anything else."""
    opened = _opened(given, accelerator, ["pgd"] if attacks is None else attacks, batch_size)
    _, _, job, names = opened
    if not job.setting.routed:
        raise InputError(f"a model to {purpose} must have MoE layers, got {str(target)!r} without")
    for name in names:
        if not name.startswith("pgd-"):
            raise InputError(f"attacks to {purpose} must be PGD's, got {name!r}")
    return opened


def attacked(name: str, predict: Predict, job: Job, device: torch.device) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Every image under PGD called `name`, those that are wrong without an attack too: in batches, pixels
    (B, C, H, W), their adversarial ones, and classes (B,).
    """
    (part,) = build(name, predict, job.setting, None).parts
    tasks = list(job.tasks([name]))
    with closing(stream(job.data, [job.examples(task) for task in tasks], device)) as images:
        for task, (x, y) in zip(tracked(tasks, name), images, strict=True):
            with measuring(predict, device):
                x_adv = part.run(x, y, seed_for(job.seed, task.first, name, part.name)).x_adv
            yield x, job.setting.threat.project(x_adv, x), y


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
    target: str | Path,
    *,
    epsilons: Sequence[float],
    weights: str | None = None,
    source: str | None = None,
    out: str | Path | None = None,
    attacks: Sequence[str] | None = None,
    overrides: dict[str, dict[str, Any]] | None = None,
    num_examples: int | None = None,
    batch_size: int = 250,
    accelerator: str = "auto",
    threads: int | None = None,
    seed: int | None = None,
    allow: Collection[str] = (),
) -> tuple[Path, dict[str, Any]]:
    """Robust accuracy against the attack's radius, for each attack and in the worst case over them.

    Each attack's step is as of `suite.stretched`, so that every radius can be crossed. Writes `sweep.json` beside the
    run's other results and returns where that is, and its content: a `sweep.sweep` by attack, whose points hold the
    attack's `settings` and `flags` at that radius, and one under `worst case`, whose points hold `masking_gap`. Raises
    `ValueError` for whatever cannot be used.
    """
    given = subject(
        target, weights=weights, source=source, out=out, overrides=overrides, num_examples=num_examples, seed=seed
    )
    device, predict, job, wanted = _opened(given, accelerator, attacks, batch_size)
    names = applicable(wanted, job)
    norm, attack = given.config.threat.norm, given.config.attack
    probe = None if norm == "linf" else math.sqrt(math.prod(given.data.shape))
    with threads_set(threads):
        checked(predict, job, device, allow, names)
        at = _Radii(predict, job, names, device)
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
    target: str | Path,
    *,
    weights: str | None = None,
    source: str | None = None,
    out: str | Path | None = None,
    attacks: Sequence[str] | None = None,
    overrides: dict[str, dict[str, Any]] | None = None,
    num_examples: int | None = None,
    batch_size: int = 250,
    accelerator: str = "auto",
    threads: int | None = None,
    seed: int | None = None,
    allow: Collection[str] = (),
) -> tuple[Path, dict[str, Dissection]]:
    """Dissect PGD on a routed run: which predictions and which choices of experts survive it.

    Every image is attacked, those that are wrong without an attack too. `attacks` are PGD's names as in `suite`, one
    dissection each. Writes `dissection.json`, with each one's settings, flags, threat, seed and data, and with the
    `masking_gap` of all; returns where that is, and the dissections. Raises `ValueError` for a model without MoE layers
    and whatever else cannot be used.
    """
    given = subject(
        target, weights=weights, source=source, out=out, overrides=overrides, num_examples=num_examples, seed=seed
    )
    device, predict, job, names = opened_routed(given, target, accelerator, attacks, batch_size, purpose="dissect")
    found: dict[str, Dissection] = {}
    with threads_set(threads):
        checked(predict, job, device, allow, names)
        for name in names:
            batches = attacked(name, predict, job, device)
            found[name] = Dissection.merge([dissect(predict, *batch, batch_size=batch_size) for batch in batches])
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
