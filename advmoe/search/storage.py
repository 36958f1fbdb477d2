"""A search in Optuna: its journal, how values are drawn and trials stopped, and each trial by its number.

A trial is put into the journal before anybody does it, so that whoever is given its number finds it there, new or
begun. Imports Optuna, not torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from advmoe.errors import InputError, lacking
from advmoe.search.settings import JOURNAL, SearchSettings
from advmoe.search.space import Dimension
from advmoe.text import one_line

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial

NAME = "search"
STARTUP = 10
"""Trials drawn at random before TPE begins; half as many are finished before the median stops any."""


def require_optuna() -> Any:
    """Optuna. Raises `InputError` where it is not installed."""
    try:
        import optuna
    except ImportError as error:
        raise lacking("search", "search", error) from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def open_study(folder: Path, settings: SearchSettings, number: int = 0) -> Study:
    """The search of a folder, begun if it is not there; what trial `number` draws follows from it and the seed."""
    optuna = require_optuna()
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    file = str(folder / JOURNAL)
    seed = int.from_bytes(hashlib.sha256(f"{settings.seed} {number}".encode()).digest()[:4], "big")
    if settings.sampler == "random":
        sampler = optuna.samplers.RandomSampler(seed=seed)
    else:  # trials under way count as bad ones, so that those at the same time differ
        sampler = optuna.samplers.TPESampler(n_startup_trials=STARTUP, constant_liar=True, seed=seed)
    pruner = {
        "none": optuna.pruners.NopPruner(), "median": optuna.pruners.MedianPruner(n_startup_trials=STARTUP // 2),
        "asha": optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3),
    }[settings.pruner]  # fmt: skip
    try:
        study: Study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(file, lock_obj=JournalFileOpenLock(file))), study_name=NAME,
            direction="maximize", sampler=sampler, pruner=pruner, load_if_exists=True,
        )  # fmt: skip
    except (LookupError, TypeError, ValueError) as error:
        raise InputError(f"{file} must be a journal of Optuna's, got {one_line(error)}: it is damaged") from error
    return study


def ready(study: Study, trials: int) -> None:
    """Have the journal hold trials 0 to `trials` - 1 at least."""
    for _ in range(len(study.get_trials(deepcopy=False)), trials):
        study.enqueue_trial({})


def known(study: Study, number: int) -> FrozenTrial:
    """What the journal holds of a trial."""
    return study.get_trials(deepcopy=False)[number]


def begun(study: Study, number: int, space: Sequence[Dimension]) -> Trial:
    """A trial that is not finished, under way from now on; the values that it has drawn before stay."""
    from optuna.trial import Trial, TrialState

    # `study.ask` would begin any trial that waits, not this one.
    storage = study._storage
    identifier = storage.get_trial_id_from_study_id_trial_number(study._study_id, number)
    if known(study, number).state == TrialState.WAITING:
        storage.set_trial_state_values(identifier, TrialState.RUNNING)
    trial = Trial(study, identifier)
    for each in space:
        if each.choices:
            trial.suggest_categorical(each.name, each.choices)
        elif each.whole:
            step = 1 if each.step is None else int(each.step)
            trial.suggest_int(each.name, int(each.low), int(each.high), step=step, log=each.log)
        else:
            trial.suggest_float(each.name, each.low, each.high, step=each.step, log=each.log)
    return trial
