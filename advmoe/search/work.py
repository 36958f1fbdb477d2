"""How much work the trials of a search are, before anybody knows what they will draw."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from advmoe.config import Config
from advmoe.errors import InputError
from advmoe.search.settings import SearchSettings
from advmoe.search.trials import TrialTask
from advmoe.studies.estimate_times import buildable
from advmoe.studies.estimate_work import CHECKPOINT, START_UP, Network, Work, attacking, shape_of, training


def works(tasks: Iterable[TrialTask]) -> list[Work]:
    """The work of the trials that have not ended, none of them pruned: each the mean of the space's two ends."""
    found: list[Work] = []
    for task in tasks:
        if task.state() == "finished":
            continue
        if not found:
            found.append(_trial(task))
        else:
            first = found[0]
            found.append(Work(task.id, (), first.kind, first.passes, first.seconds, first.weights))
    return found


def _trial(task: TrialTask) -> Work:
    work, settings = Work(task.id, (), "trial", seconds=START_UP), task.settings
    configs = _ends(settings)
    for config in configs:
        shape = shape_of(config)
        held_out = round(shape.train * config.data.val_fraction)
        images = min(settings.num_examples or held_out, held_out)
        for passes in (training(config, shape), attacking(config, shape, settings.attacks, images)):
            for of, number in passes.items():
                work.passes[of] += number / len(configs)
        work.weights[Network.of(config, shape)] += CHECKPOINT // len(configs)
    return work


def _ends(settings: SearchSettings) -> list[Config]:
    """The configurations at the space's two ends, as far as they can be; else what trials share."""
    ends: list[Mapping[str, Any]] = [
        {each.name: each.choices[0] if each.choices else each.low for each in settings.space},
        {each.name: each.choices[-1] if each.choices else each.high for each in settings.space},
    ]
    configs = list[Config]()
    for parameters in ends:
        with suppress(InputError):
            config = settings.configured(parameters)
            if buildable(Network.of(config, shape_of(config))):
                configs.append(config)
    return configs or [settings.config]
