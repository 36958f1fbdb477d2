"""How much work a task is: passes of a network over images, and bytes that it leaves, counted from settings.

Passes are those of an image that withstands everything, and of attacks in several parts half of them: an estimate, on
the high side for models that are easily broken.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from advmoe.config import Config, merged
from advmoe.evaluation.suite import ATTACKS, Setting, default_attacks
from advmoe.models.stem import stem_stride
from advmoe.studies.plan import PlannedMeasure, PlannedRun, StudyTask, kind_of
from advmoe.threat import ThreatModel
from advmoe.training.pace import ITERATIONS
from advmoe.training.phases import phases


@dataclass(frozen=True)
class Shape:
    """What a network needs to know of its images, and how many there are."""

    train: int
    """Validation images included."""
    test: int
    channels: int
    size: int
    classes: int


KNOWN = {
    "cifar10": Shape(50_000, 10_000, 3, 32, 10), "cifar100": Shape(50_000, 10_000, 3, 32, 100),
    "tiny-imagenet": Shape(100_000, 10_000, 3, 64, 200), "imagenet": Shape(1_281_167, 50_000, 3, 224, 1000),
}  # fmt: skip
"""Data sets whose images need not be there; others are read."""


def shape_of(config: Config) -> Shape:
    """The images of a configuration. Raises `InputError` where they must be read and cannot be."""
    if (known := KNOWN.get(config.data.name)) is not None:
        size = config.data.image_size or known.size
        train = config.data.train_examples or known.train
        return Shape(train, known.test, known.channels, size, known.classes)
    from advmoe.training.run import load_data

    data = load_data(config)
    train = len(data.train) + len(data.val)
    return Shape(train, len(data.test), data.in_channels, data.image_size, data.num_classes)


@dataclass(frozen=True)
class Network:
    """What the time of a pass depends on."""

    model: str
    """The group of fields, as JSON."""
    channels: int
    size: int
    classes: int

    @staticmethod
    def of(config: Config, shape: Shape) -> Network:
        """The network of a configuration on images of this shape."""
        model = json.dumps(config.to_dict()["model"], sort_keys=True)
        return Network(model, shape.channels, shape.size, shape.classes)

    @property
    def area(self) -> float:
        """Places that its blocks compute on: a stem shrinks large images first."""
        return float((self.size / stem_stride(self.size)) ** 2)

    @property
    def key(self) -> str:
        """Its name among calibrated times."""
        return f"{self.model} {self.channels}x{self.size}x{self.size} {self.classes}"


Kind = str
"""Of a pass: `forward`, `gradient` (and back to the image), `soft` (that through soft routing) or `train` (TRADES' loss
on clean and adversarial images, and an update).
"""
Passes = defaultdict[tuple[Network, Kind], float]
"""Passes times images."""


def no_passes() -> Passes:
    """What to add to."""
    return defaultdict(float)


@dataclass
class Work:
    """A task as the estimate sees it."""

    id: str
    needs: tuple[str, ...]
    kind: str
    passes: Passes = field(default_factory=no_passes)
    seconds: float = 0.0
    """Beyond the passes."""
    weights: Counter[Network] = field(default_factory=Counter)
    """Copies of a network's weights that it leaves on the disk."""
    alone: bool = False


CHECKPOINT = 8
"""Copies of the weights that a run leaves: two checkpoints with momentum, the best with momentum, the model, and its
best's.
"""
START_UP = 5.0
"""Seconds that a task takes before it computes."""


def training(config: Config, shape: Shape) -> Passes:
    """The passes of a training run, its validations included."""
    passes = no_passes()
    held_out = round(shape.train * config.data.val_fraction)
    images = shape.train - held_out
    for phase in phases(config):
        t, network = phase.config.training, Network.of(phase.config, shape)
        batch = min(t.batch_size, images)
        seen = t.epochs * (images // batch) * batch
        attacked = set[tuple[int, int, int]]()
        for level in t.levels():
            share = seen / level.every
            passes[network, "train"] += share * (1 if level.adversarial else 0.5) * (2 if t.awp else 1)
            on = (level.batch, level.every, level.turn)
            if level.adversarial and on not in attacked:  # levels on one batch share its attack
                attacked.add(on)
                steps = 1 if level.warm else t.attack_steps
                soft = {"soft": 1.0, "mixed": 0.5}.get(t.attack_routing, 0.0) * (phase.config.model.kind == "moe")
                passes[network, "forward"] += share
                passes[network, "gradient"] += share * steps * (1 - soft)
                passes[network, "soft"] += share * steps * soft
        validated = t.epochs * held_out
        passes[network, "forward"] += 2 * validated
        passes[network, "gradient"] += validated * t.val_attack_steps
        if phase.config.model.kind == "moe":
            passes[network, "soft"] += validated * t.val_attack_steps
    return passes


def attacking(config: Config, shape: Shape, names: Iterable[str] | None, images: int) -> Passes:
    """The passes of an evaluation of so many images under attacks; None: the usual ones."""
    threat = ThreatModel(config.threat.norm, float(config.threat.eps))
    routed = config.model.kind == "moe"
    setting = Setting(threat=threat, attack=config.attack, routed=routed)
    network, passes = Network.of(config, shape), no_passes()
    passes[network, "forward"] += images
    for name in default_attacks(setting) if names is None else names:
        attack = ATTACKS.find(name)
        if attack.for_routed and not routed:
            continue
        made, share = attack.passes(setting), 1.0 if name.startswith("pgd") else 0.5
        passes[network, "soft" if made.soft and routed else "gradient"] += images * made.gradient * share
        passes[network, "forward"] += images * made.forward * share
    return passes


def works(tasks: Mapping[str, StudyTask]) -> list[Work]:
    """The work of a study's tasks that are not finished."""
    shapes: dict[str, Shape] = {}

    def shaped(config: Config) -> Shape:
        key = json.dumps(config.to_dict()["data"], sort_keys=True) + str(config.training.seed)
        if key not in shapes:
            shapes[key] = shape_of(config)
        return shapes[key]

    found = []
    for task in tasks.values():
        if task.state() == "finished":
            continue
        work = Work(task.id, task.needs, kind_of(task), seconds=START_UP)
        if isinstance(task, PlannedRun):
            config = Config.from_dict(task.config)
            work.passes = training(config, shape := shaped(config))
            work.weights[Network.of(config, shape)] += CHECKPOINT
        else:
            _measuring(work, task, shaped)
        found.append(work)
    return found


def _measuring(work: Work, task: PlannedMeasure, shaped: Callable[[Config], Shape]) -> None:
    options, work.alone = task.options, task.alone
    config = Config.from_dict(merged(task.run.config, options.get("overrides", {})))
    shape = shaped(config)
    if task.kind == "cost":
        batches: Sequence[int] = options.get("batches", (128,))
        work.seconds += float(options.get("seconds", 3.0)) * 2 * (1 + len(batches))
        return
    if task.kind == "pace":
        assert task.against is not None
        for each in (config, Config.from_dict(task.against.config)):
            images = (options.get("rounds", 5) + 1) * ITERATIONS * each.training.batch_size
            whole = training(each, shape)
            share = images / max(1, shape.train * each.training.epochs)
            for of, number in whole.items():
                work.passes[of] += number * share
        return
    images = min(options.get("num_examples") or shape.test, shape.test)
    names = options.get("attacks") or (["pgd"] if task.kind in ("dissect", "pathways") else None)
    radii = len([eps for eps in options.get("epsilons", (1,)) if eps])
    for of, number in attacking(config, shape, names, images).items():
        work.passes[of] += number * radii
