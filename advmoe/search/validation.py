"""A trained run, attacked on the validation split of its training images: what trials are compared by."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from advmoe.attacks.pgd import Predict
from advmoe.config import Config
from advmoe.errors import OtherSettings
from advmoe.evaluation.accuracy import Execution, assess, placed
from advmoe.evaluation.harness import Journal
from advmoe.evaluation.outcomes import Measurement
from advmoe.evaluation.subject import sampled
from advmoe.models.runs import load_run
from advmoe.pruning import deployed
from advmoe.rundir import CONFIG, DIGEST, digest_at
from advmoe.search.settings import SearchSettings
from advmoe.search.trials import UNDER_WAY
from advmoe.threat import ThreatModel
from advmoe.training.run import load_data


@dataclass(frozen=True)
class _Load:
    run: Path
    source: str | None

    def __call__(self, device: torch.device) -> Predict:
        return placed(deployed(load_run(self.run, self.source)), device)


def validate(run: Path, settings: SearchSettings, *, threads: int, accelerator: str) -> dict[str, Any]:
    """Accuracy on a run's validation images: as they are, under each attack, and in the worst case.

    Returns what `evaluation.json` holds, `data.split` being `val`. An interrupted measurement goes on after its last
    finished batch. Raises `InputError` as `evaluate` does.
    """
    config = Config.load(run / CONFIG)
    images = load_data(config).val
    images = images.subset(sampled(len(images), settings.num_examples, config.training.seed))
    measurement = Measurement(
        threat=ThreatModel(config.threat.norm, float(config.threat.eps)), attack=config.attack,
        attacks=settings.attacks, seed=config.training.seed,
    )  # fmt: skip
    journal = run / UNDER_WAY
    load = _Load(run, settings.config.model.source)

    def measured(resume: bool) -> dict[str, Any]:
        execution = Execution(threads=threads, accelerator=accelerator, journal=journal, resume=resume)
        return assess(load, images, measurement, allow=settings.allow, execution=execution).result

    try:
        result = measured(resume=journal.exists())
    except OtherSettings:  # what was interrupted had another version of PyTorch, say
        result = measured(resume=False)
    Journal(journal).remove()
    return {**result, DIGEST: digest_at(run), "data": {"name": config.data.name, "split": "val"}}
