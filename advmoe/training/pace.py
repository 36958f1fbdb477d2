"""How long an epoch of training takes, several ways in turn in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tqdm import tqdm

from advmoe.config import Config
from advmoe.evaluation.cost import setting, settled
from advmoe.pool import threads_set
from advmoe.precision import fp32_on
from advmoe.progress import tracked
from advmoe.training.launch import Engine
from advmoe.training.run import load_data
from advmoe.training.trainer import Trainer, build_model

ITERATIONS = 12
"""Iterations of each round: whole cycles of every alternation in use, whose K are 2, 3 and 4."""


def pace(
    configs: Mapping[str, Config], *, rounds: int = 5, accelerator: str = "auto", threads: int | None = None
) -> dict[str, Any]:
    """Time `ITERATIONS` iterations of each configuration's training in turn, `rounds` times after one that warms up.

    The configurations train new models on the first images of their data; nothing is saved. An epoch must be as many
    iterations in each, as it is where they differ in the method alone.

    Args:
        configs: by name, the one under test first, what it is compared with last. accelerator, threads: as of `train`.

    Returns `seconds` of an iteration, by name the median, least and most over rounds; `ratio`, the median over rounds
    of the first's seconds in those of the last; `rounds`, `iterations`; `device`, `threads`, whose CPU `kernels`, and
    by name `precision` and `batch_size`.
    """
    with threads_set(threads):
        trainers = {name: _trainer(config, rounds, accelerator) for name, config in configs.items()}
        seconds: dict[str, list[float]] = {name: [] for name in trainers}
        hidden = tqdm(disable=True)
        for number in tracked(range(rounds + 1), "pace", unit="round"):
            for name, trainer in trainers.items():
                settled(trainer.fabric.device)
                started = time.perf_counter()
                trainer.train_epoch(number, hidden)
                settled(trainer.fabric.device)
                if number:
                    seconds[name].append((time.perf_counter() - started) / ITERATIONS)
        device = next(iter(trainers.values())).fabric.device
        where = {"device": device.type, "precision": {name: _precision(each) for name, each in trainers.items()},
                 "batch_size": {name: each.config.training.batch_size for name, each in trainers.items()},
                 **setting(device)}  # fmt: skip
    ours, *_, against = seconds.values()
    return {
        "seconds": {
            name: {"median": statistics.median(each), "least": min(each), "most": max(each)}
            for name, each in seconds.items()
        },
        "ratio": statistics.median(a / b for a, b in zip(ours, against, strict=True)),
        "rounds": rounds, "iterations": ITERATIONS, **where,
    }  # fmt: skip


def _trainer(config: Config, rounds: int, accelerator: str) -> Trainer:
    """A trainer of a new model whose epochs are `ITERATIONS` iterations, none of them a first one of a run."""
    examples = ITERATIONS * config.training.batch_size
    short = Config(
        model=config.model, threat=config.threat, attack=config.attack,
        data=replace(config.data, train_examples=examples, val_fraction=0.0),
        training=replace(
            config.training, epochs=rounds + 1, init_from=None, warmup_epochs=0, first_attack_steps=None,
            first_image_sizes=None,
        ),
    )  # fmt: skip
    dataset = load_data(short)
    fabric = Engine(accelerator, 1, config.training.precision).fabric()
    return Trainer(short, build_model(short, dataset), dataset, fabric)


def _precision(trainer: Trainer) -> str:
    precision = trainer.config.training.precision
    return fp32_on(trainer.fabric.device) if precision == "32-true" else precision
