"""One trial, done in a worker process: values are drawn, a run is trained with them, and measured on validation images.

Killed at any time it goes on from what is there: the values in the journal, the run's checkpoint, the measurement's
finished batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from advmoe.engines import Ledger
from advmoe.errors import of_machine
from advmoe.files import read_object
from advmoe.locks import exclusive
from advmoe.pool import Place, Preempted
from advmoe.rundir import DIGEST, MANIFEST, METRICS, Epochs, digest_at, read_result, write_result
from advmoe.search.settings import TRIALS, SearchSettings
from advmoe.signals import Ended, described
from advmoe.studies.tasks import lock_of
from advmoe.text import one_line

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import Trial

VALIDATION, UNDER_WAY = "validation.json", ".validation"
"""In a trial's run directory: what was measured on the validation split, and the folder of finished batches until then.
"""
ENDS = {"COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "failed"}
"""How a trial ends, in Optuna's words and in ours."""


@dataclass(frozen=True)
class TrialTask:
    """A trial as a task of an engine."""

    number: int
    folder: Path
    """The search's."""
    settings: SearchSettings

    needs: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """Its task's name."""
        return f"{self.number:04d}"

    @property
    def path(self) -> Path:
        """Its run directory."""
        return self.folder / TRIALS / self.id

    @property
    def result(self) -> Path:
        """The file that says how it ended."""
        return self.folder / TRIALS / f"{self.id}.json"

    def ended(self) -> dict[str, Any] | None:
        """How it ended: `state` (`finished`, `pruned`, `failed`), `value`, `parameters`, `epochs` (validation accuracy
        by number), `measured`, `seconds`, `error`. None where it has not, or the file is damaged.
        """
        with suppress(OSError, ValueError):
            return read_result(self.result, required=True)
        return None

    def state(self) -> str:
        """`finished` however it ended, else `interrupted` or `missing`."""
        if self.ended() is not None:
            return "finished"
        return "interrupted" if self.path.exists() else "missing"


@contextmanager
def doing(place: Place, threads: int, accelerator: str, ledger: Ledger | None) -> Iterator[Callable[[TrialTask], None]]:
    """The function that does a trial, in a worker; with a `ledger` it says so there."""

    def work(task: TrialTask) -> None:
        with nullcontext() if ledger is None else ledger.doing(task.id, log=place.log):
            do(task, threads=threads, accelerator=accelerator)

    yield work


def do(task: TrialTask, *, threads: int, accelerator: str) -> None:
    """Do a trial to its end, and write how it ended. What made it fail is raised once that is written; a failure of the
    machine's leaves the trial to be gone on with.
    """
    from optuna.trial import TrialState

    from advmoe.search.storage import begun, known, open_study

    task.path.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(lock_of(task)):
        study = open_study(task.folder, task.settings, task.number)
        problem = None
        if not known(study, task.number).state.is_finished():
            trial = begun(study, task.number, task.settings.space)
            try:
                pruned = _train(task, trial, threads=threads, accelerator=accelerator)
                value = None if pruned else _measured(task, threads=threads, accelerator=accelerator)
                study.tell(trial, value, TrialState.PRUNED if pruned else TrialState.COMPLETE)
            except Exception as error:
                if isinstance(error, Preempted) or of_machine(error):
                    raise
                problem = error
                trial.set_user_attr("error", one_line(error, 500))
                study.tell(trial, state=TrialState.FAIL)
        _write_end(task, study)
    if problem is not None:
        raise problem


def _train(task: TrialTask, trial: Trial, *, threads: int, accelerator: str) -> bool:
    """Train a trial's run, or go on with it; whether the pruner has stopped it."""
    from advmoe.training import run as runs
    from advmoe.training.leftovers import startable
    from advmoe.training.preemption import Stopped

    config, source = task.settings.configured(trial.params), task.settings.config.model.source
    reported = set(trial.study.get_trials(deepcopy=False)[task.number].intermediate_values)
    pruned = False

    def judge(line: Mapping[str, Any]) -> str | None:
        nonlocal pruned
        if line["epoch"] not in reported:  # an epoch that is trained again
            trial.report(line["val"][task.settings.watched], line["epoch"])
        pruned = trial.should_prune()
        return "pruned" if pruned else None

    how: dict[str, Any] = {"accelerator": accelerator, "threads": threads, "after_epoch": judge}
    try:
        if startable(task.path):
            runs.train(config, run_dir=task.path, name=f"trial {task.id}", **how)
        elif read_object(task.path / MANIFEST).get("finished") is None:
            runs.resume(task.path, source=source, **how)
    except Stopped as stop:
        if not pruned:
            raise Preempted(str(stop)) from stop
        return True
    return False


def _measured(task: TrialTask, *, threads: int, accelerator: str) -> float:
    """The objective on the validation split, measured now or before."""
    from advmoe.search.validation import validate

    file = task.path / VALIDATION
    result = read_result(file) if file.is_file() else {}
    if result.get(DIGEST) is None or result[DIGEST] != digest_at(task.path):
        before = _batches(task)
        try:
            result = write_result(file, validate(task.path, task.settings, threads=threads, accelerator=accelerator))
        except Ended as stop:
            if _batches(task) - before:
                raise Preempted(f"{described(stop)[0]} within the measurement of trial {task.id}") from stop
            raise
    return float(result[task.settings.objective])


def _batches(task: TrialTask) -> set[Path]:
    """The finished batches of a measurement under way."""
    return set((task.path / UNDER_WAY).glob("*.*.json"))


def _write_end(task: TrialTask, study: Study) -> None:
    from advmoe.search.storage import known

    frozen = known(study, task.number)
    complete = frozen.state.name == "COMPLETE"
    measured = read_result(task.path / VALIDATION) if complete else {}
    write_result(task.result, {
        "number": task.number, "state": ENDS[frozen.state.name],
        "value": frozen.value if complete else None, "parameters": frozen.params,
        "epochs": {str(number): value for number, value in sorted(frozen.intermediate_values.items())},
        "measured": {name: measured[name] for name in ("clean_accuracy", "robust_accuracy", "worst_case")
                     if name in measured},
        "seconds": _seconds(task.path), "error": frozen.user_attrs.get("error"),
    })  # fmt: skip


def _seconds(run: Path) -> float | None:
    """The wall time of a run's training as far as it went; None where it has not begun."""
    lines = Epochs.read(run / METRICS).lines
    return round(sum(line["seconds"] for line in lines), 1) if lines else None
