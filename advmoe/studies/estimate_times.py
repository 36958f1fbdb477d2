"""How long a pass takes here: a minute's timing of the networks of a plan, small batches of noise, kept in a file."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from advmoe.config import Config
from advmoe.data import Dataset, ImageSet
from advmoe.errors import InputError
from advmoe.evaluation.cost import parameters, setting, settled
from advmoe.files import read_object, write_text
from advmoe.models.modes import frozen
from advmoe.moe.routing import soft_routing
from advmoe.pool import threads_set
from advmoe.progress import tell, tracked
from advmoe.rundir import CALIBRATION
from advmoe.studies.estimate_work import Network
from advmoe.tables import Level
from advmoe.training.launch import Engine
from advmoe.training.trainer import Trainer, build_model

MINUTE = 60.0
"""Seconds that all timing may take, about: what comes when they are over is not timed but the first."""
REPEATS = 3
KINDS = ("forward", "gradient", "soft", "train")

Times = dict[str, dict[str, float]]
"""Of each network, by its key: seconds of an image in a pass of each kind, and its `parameters`."""
Clock = Callable[[], float]


def calibrated(
    folder: Path, networks: Iterable[Network], *, threads: int, accelerator: str, clock: Clock = time.perf_counter
) -> Times:
    """Times of `networks`: those kept in the folder by the same machine and settings, others timed now, and kept."""
    fabric = Engine(accelerator, 1, "32-true").fabric()
    with threads_set(threads):
        here = {**setting(fabric.device), "device": fabric.device.type, "torch": torch.__version__}
        here = json.loads(json.dumps(here))
        known = dict[str, Any]()
        with suppress(OSError, ValueError):
            known = read_object(folder / CALIBRATION)
        times: Times = known.get("times", {}) if known.get("here") == here else {}
        new = [each for each in dict.fromkeys(networks) if each.key not in times]
        # The smallest images first: what the minute is too short for follows from these.
        new.sort(key=lambda each: each.area)
        end, share = clock() + MINUTE, MINUTE / max(1, len(KINDS) * len(new))
        timed = dict[Network, dict[str, float]]()
        for network in tracked(new, "timing", unit="network"):
            trainer = _trainer(network, accelerator)
            weights = float(parameters(trainer.model)[0])
            if timed and clock() > end:
                seconds = _scaled(network, weights, timed)
            else:
                seconds = timed[network] = _timed(trainer, clock, end, share)
            times[network.key] = {**seconds, "parameters": weights}
            if network in timed:
                timed[network] = times[network.key]
    if new:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / CALIBRATION, json.dumps({"here": here, "times": times}, indent=1) + "\n")
        if len(timed) < len(new):
            tell(f"note  {len(timed)} of {len(new)} networks were timed; times of the others follow from their sizes")
    return times


def _scaled(network: Network, weights: float, timed: Mapping[Network, Mapping[str, float]]) -> dict[str, float]:
    """Seconds of an image in each pass, from those of the most alike of the networks that were timed: they go with the
    area of what blocks compute on, times the weights, each of which is used at every place.
    """
    like = min(timed, key=lambda each: (each.model != network.model, abs(timed[each]["parameters"] - weights)))
    ratio = network.area / like.area * weights / timed[like]["parameters"]
    return {kind: ratio * timed[like][kind] for kind in KINDS if kind in timed[like]}


def buildable(network: Network) -> bool:
    """Whether there is such a network."""
    try:
        _trainer(network, "cpu")
    except InputError:
        return False
    return True


def _timed(trainer: Trainer, clock: Clock, end: float, share: float) -> dict[str, float]:
    """Seconds of an image in each pass of a network. `end`: when the clock says so, nothing is done twice; `share`: of
    each kind of pass.
    """
    model, device = trainer.model, trainer.fabric.device
    x = trainer.train_set.pixels(slice(None))
    y = trainer.train_set.labels
    generator = torch.Generator(device).manual_seed(0)
    level = Level("all")

    def forward() -> None:
        with frozen(model), torch.no_grad():
            model(x)

    passes: dict[str, Callable[[], object]] = {
        "forward": forward, "gradient": lambda: _gradient(trainer, model, x, y),
        "train": lambda: trainer.step(level, x, y, generator, x),
    }  # fmt: skip
    if model.routed:
        passes["soft"] = lambda: _gradient(trainer, soft_routing(model), x, y)
    seconds = dict[str, float]()
    for kind, run in passes.items():
        took, begun = list[float](), clock()
        while len(took) <= REPEATS and (not took or clock() < min(end, begun + share)):
            settled(device)
            start = clock()
            run()
            settled(device)
            took.append(clock() - start)
        seconds[kind] = min(took[1:] or took) / len(x)  # the first one warms up
    return seconds


def _gradient(trainer: Trainer, predict: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> None:
    with frozen(trainer.model):
        moved = x.detach().requires_grad_()
        torch.autograd.grad(F.cross_entropy(predict(moved), y), moved)


def _trainer(network: Network, accelerator: str) -> Trainer:
    """A trainer of a new network on a batch of noise; of a sparse one on its whole self."""
    model = json.loads(network.model)
    method = "sparse" if model["kind"] == "sparse" else "at"
    config = Config.from_dict({"model": model, "training": {"method": method}})
    fabric = Engine(accelerator, 1, "32-true").fabric()
    batch = 128 if fabric.device.type == "cuda" else 16 if network.size <= 64 else 4
    generator = torch.Generator().manual_seed(0)
    shape = (batch, network.channels, network.size, network.size)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    labels = torch.arange(batch) % network.classes
    noise = ImageSet(images, labels)
    half = (0.5,) * network.channels
    dataset = Dataset(
        "noise", noise, noise.subset(torch.arange(0)), noise, tuple(map(str, range(network.classes))), half, half, False
    )
    return Trainer(config, build_model(config, dataset), dataset, fabric)
