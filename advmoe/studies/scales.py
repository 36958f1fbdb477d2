"""The three sizes that a study runs at, and the runs that studies are made of.

`smoke`  320 digits at 16 pixels, narrow networks, 2 epochs: minutes for all studies; shows that all works, not more.
`cpu`    CIFAR-10 as an image folder, narrow networks, part of the training images: a night of two cores at most.
`paper`  the paper's own setting, from the recipes: for GPUs.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from advmoe.config import Config, Pixels, merged, require_one_of
from advmoe.errors import InputError, OfNoUse
from advmoe.recipes import recipe
from advmoe.studies.labels import in_name, of_backbone, of_data, other_folder, same_threat
from advmoe.studies.rows import Measure, ScaleName, Settings, TrainingRun
from advmoe.tables import BACKBONES, METHODS

T = TypeVar("T")

_EXPERTS = Config().model.num_experts
_USUAL_CHOICES = 16
"""Those that `restarts` makes up for without a number, which this cannot import (`suite.CHANGED`)."""


@dataclass(frozen=True)
class PaperMethod:
    """A method as the paper compares it: the kind of model, how it is trained, and from what other method's model."""

    settings: Settings
    start: str | None = None

    @property
    def routed(self) -> bool:
        """Whether its models have routers."""
        return bool(self.settings["model"]["kind"] == "moe")

    @property
    def fixes(self) -> bool:
        """Whether it leaves a part fixed for good, whose statistics are a matter of choice."""
        return METHODS[self.settings["training"]["method"]].frozen_norms is not None


def _method(kind: str, method: str, start: str | None = None, **training: Any) -> PaperMethod:
    return PaperMethod({"model": {"kind": kind}, "training": {"method": method, **training}}, start)


PAPER_METHODS: Mapping[str, PaperMethod] = {
    "AT (Dense)": _method("dense", "at"),
    "AT (S-Dense)": _method("s-dense", "at"),
    "AT (Sparse)": _method("sparse", "sparse", "AT (Dense)"),
    "AT (MoE)": _method("moe", "at"),
    "AdvMoE": _method("moe", "advmoe", router_objective="trades", alternation="both"),
    "standard MoE": _method("moe", "standard"),
    "router-robustified MoE": _method("moe", "at-routers", "standard MoE"),
    "router-robustified MoE, then its experts": _method("moe", "at-experts", "router-robustified MoE"),
    "standard Dense": _method("dense", "standard"),
    "standard S-Dense": _method("s-dense", "standard"),
    # Pruned like AT (Sparse), but with nothing to defend: TRADES without its KL, on images that noise of 0.001 moves.
    "standard Sparse": _method("sparse", "sparse", "standard Dense", beta=0.0, attack_steps=1, step_size=1e-6),
    "robust mask of standard Dense": _method("sparse", "sparse", "standard Dense", finetune_epochs=0),
}
"""The paper's methods and the models of its section 4: M1 is the standard MoE, M3 the mask."""
COMPARED = ("AT (Dense)", "AT (S-Dense)", "AT (Sparse)", "AT (MoE)", "AdvMoE")
"""Those of its tables."""


@dataclass(frozen=True)
class DataOrBackbone:
    """A data set or a backbone at one scale."""

    label: str
    """What tables call it, before its width or size (see `labels`)."""
    settings: Settings
    paper: str | None = None
    """The paper's name of what this stands for; None where its numbers say nothing about it."""


def useless_for(settings: Settings, name: str, value: Any) -> InputError | None:
    """Why a run of these settings has no use for the field `training.name` so, where that is its method, kind of model
    or router: another row of a study may have one.
    """
    if METHODS[settings["training"]["method"]].start:
        settings = merged({"training": {"init_from": "start"}}, settings)
    try:
        Config.from_dict(settings)
    except InputError:
        return None  # whatever is wrong, it is not this field
    try:
        Config.from_dict(merged(settings, {"training": {name: value}}))
    except OfNoUse as error:
        return error if name != "method" else None
    except InputError:
        return None
    return None


@dataclass(frozen=True, kw_only=True)
class Scale:
    """One size: settings that all runs share, data, backbones, and how much is measured."""

    name: ScaleName
    seeds: int
    """By default seeds 0 ... seeds - 1."""
    base: Settings
    datasets: Mapping[str, DataOrBackbone]
    """By the paper's names; the first is what the figures use."""
    backbones: Mapping[str, DataOrBackbone]
    """By the paper's names; the first is what the figures use."""
    examples: int | None
    """Test images attacked; None for all."""
    autoattack: tuple[str, str, int | None]
    """The attack that stands for AutoAttack: title, name, test images."""
    timed: Mapping[str, Any]
    """How `cost` measures time."""
    paced: Mapping[str, Any]
    """How `pace` measures the time of training."""
    standard_longer: int = 1
    """How many times the epochs of others a standard model is trained for: one that is robust by itself, as all are at
    first, is not what the paper compares with. Its epochs take a fraction of the time."""
    overrides: Settings = field(default_factory=dict)
    """Fields that the user sets for all runs, those of `training` for runs that have a use for them."""

    def pick(self, **choices: T) -> T:
        """The choice for this scale, of `smoke`, `cpu` and `paper`."""
        return choices[self.name]

    def run(
        self,
        method: str,
        *,
        dataset: str | None = None,
        backbone: str | None = None,
        more: Settings | None = None,
        statistics: str | None = None,
        start: TrainingRun | None = None,
        teacher: TrainingRun | None = None,
        **labels: Any,
    ) -> TrainingRun:
        """A method on a data set and a backbone, by the paper's names; by default the first ones.

        Args:
            more: settings over those of the scale, data, backbone and method; a run that it starts from has those of
                the model, the data and the threat too.
            start, teacher: runs that it starts from, in the place of the method's own, and learns from.
            statistics: `training.frozen_norms` of the run and of those that it starts from, where a part stays fixed.
            labels: what the study varies, for its tables and figures; the run's name has them in this order.
        """
        dataset, backbone = dataset or next(iter(self.datasets)), backbone or next(iter(self.backbones))
        data, net, how, more = self.datasets[dataset], self.backbones[backbone], PAPER_METHODS[method], more or {}
        if how.settings["model"]["kind"] == "dense":
            labels.pop("scale", None)  # r says nothing about a Dense model, the start of sparse ones of any r
        if how.start is not None and start is None:
            shared = {group: fields for group, fields in more.items() if group in ("model", "data", "threat")}
            start = self.run(
                how.start, dataset=dataset, backbone=backbone, more=shared, statistics=statistics, **labels
            )
        if statistics is not None and how.fixes:
            labels["statistics"] = statistics
            more = merged(more, {"training": {"frozen_norms": statistics}})
        usual = merged(self.base, data.settings, net.settings, how.settings, more)
        settings = merged(usual, self._taken(usual))
        if how.settings["training"]["method"] == "standard":
            longer = self.standard_longer * settings["training"]["epochs"]
            settings = merged(settings, {"training": {"epochs": longer}})
        elsewhere = other_folder(usual, settings)
        comparable = elsewhere is None and same_threat(usual, settings)
        name = [method, *(in_name(label, value) for label, value in labels.items())]
        every = {
            "method": method, **labels, "dataset": of_data(elsewhere or data.label, settings),
            "backbone": of_backbone(net.label, settings), "paper_dataset": data.paper if comparable else None,
            "paper_backbone": net.paper, "routed": how.routed,
        }  # fmt: skip
        return TrainingRun(", ".join([*name, every["backbone"], every["dataset"]]), settings, every, start, teacher)

    def _taken(self, usual: Settings) -> Settings:
        """What the user set of training, as far as a run of these settings has a use for it, and of all else. What only
        another method, kind of model or router has is left out: a study's rows are of several.
        """
        training = self.overrides.get("training", {})
        useless = {name for name, value in training.items() if useless_for(usual, name, value) is not None}
        return {**self.overrides, "training": {name: training[name] for name in training.keys() - useless}}

    # What is measured

    def accuracy(self, run: TrainingRun, experts: int = 1) -> Measure:
        """SA, RA and the worst case: PGD with two losses, then what a routed model's routing calls for, or on a plain
        model as many gradient steps as one of its backbone with `experts`, or as many as its settings say, would take.
        """
        routed = ["pgd-soft", "routed"]
        attacks = ["pgd", "pgd-margin", *(routed if run.labels["routed"] else [_restarts(run.settings, experts)])]
        return Measure("evaluate", {"attacks": attacks, "num_examples": self.examples})

    def under_autoattack(self) -> Measure:
        """RA-AA."""
        _, name, examples = self.autoattack
        return Measure("evaluate", {"attacks": [name], "num_examples": examples})

    def sweep(self, run: TrainingRun) -> Measure:
        """RA against the radius, in parts of the run's own: under three attacks on routed and plain models alike."""
        steps = run.settings["attack"]["steps"]
        attacks = ["pgd", "pgd-margin", "pgd-soft" if run.labels["routed"] else f"restarts-{steps}"]
        shares = self.pick(
            smoke=(0, 0.5, 1, 2), cpu=(0, 0.25, 0.5, 0.75, 1, 1.5, 2), paper=(0, 0.25, 0.5, 0.75, 1, 1.5, 2)
        )
        radii = [share * self.eps(run) for share in shares]
        return Measure("sweep", {"attacks": attacks, "num_examples": self.examples, "epsilons": radii})

    def dissect(self) -> Measure:
        """What fails: predictions or routing, under PGD and under soft PGD."""
        return Measure("dissect", {"attacks": ["pgd", "pgd-soft"], "num_examples": self.examples})

    def pathways(self, against: TrainingRun) -> Measure:
        """IoU of pathways with the mask of `against`."""
        return Measure("pathways", {"num_examples": self.examples}, against)

    def cost(self) -> Measure:
        """GMACs and time, with nothing else running."""
        return Measure("cost", self.timed)

    def pace(self, against: TrainingRun) -> Measure:
        """Seconds of an epoch of training beside those of `against`, with nothing else running."""
        return Measure("pace", self.paced, against)

    @property
    def strong(self) -> str:
        """The name of the attack that stands for AutoAttack, which may be a part of it."""
        return self.autoattack[0].removeprefix("RA ").removesuffix(" %")

    @staticmethod
    def eps(run: TrainingRun) -> float:
        """The radius of a run's threat."""
        return float(Pixels(run.settings["threat"]["eps"]))


def _restarts(settings: Settings, experts: int) -> str:
    """The attack `restarts` of a plain model, by the choices of its MoE-CNN that `routed` would change."""
    model = settings["model"]
    layers, usual = BACKBONES.find(model["name"]).moe_layers, "restarts"
    if layers is None:
        return usual
    choices = layers * (max(experts, model.get("num_experts", _EXPERTS)) - 1)
    return usual if choices == _USUAL_CHOICES else f"{usual}:{choices}"


def scale_named(name: str) -> Scale:
    """The scale of that name. Raises `ValueError`, which lists those there are."""
    require_one_of(list(_SCALES), "--scale", name)
    return _SCALES[name]


_TRADES = {"method": "at", "beta": 6.0, "momentum": 0.9, "weight_decay": 5e-4, "attack_steps": 2}

_SMOKE = Scale(
    name="smoke",
    seeds=1,
    base={
        "model": {"scale": 0.5, "num_experts": 2, "router": "layer", "experts_init": "shared"},
        "threat": {"norm": "linf", "eps": 0.1},
        "training": {**_TRADES, "epochs": 2, "batch_size": 64, "lr": 0.1, "step_size": 0.0625, "val_attack_steps": 2},
        "attack": {"steps": 5, "step_size": 0.05, "pathways": 2, "queries": 0},
    },
    datasets={
        "CIFAR-10": DataOrBackbone(
            "digits",
            {
                "data": {
                    "name": "digits",
                    "image_size": 16,
                    "train_examples": 320,
                    "val_fraction": 0.1,
                    "augment": False,
                }
            },
        )
    },
    backbones={
        "ResNet-18": DataOrBackbone("ResNet-18", {"model": {"name": "resnet18", "width": 8}}),
        "WRN-28-10": DataOrBackbone("WRN-10-1", {"model": {"name": "wrn-10-1", "width": 8}}),
        "VGG-16": DataOrBackbone("VGG-16", {"model": {"name": "vgg16", "width": 8}}),
        "DenseNet": DataOrBackbone("DenseNet", {"model": {"name": "densenet40", "width": 8}}),
        "DeiT-Tiny": DataOrBackbone(
            "DeiT-Tiny", {"model": {"name": "deit-tiny", "width": 32}, "training": {"lr": 0.05}}
        ),
    },
    examples=40,
    autoattack=("RA APGD-CE (of AutoAttack one part) %", "autoattack:apgd-ce", 20),
    timed={"batches": [64], "seconds": 0.2},
    paced={"rounds": 1},
)

_CPU = Scale(
    name="cpu",
    seeds=5,
    standard_longer=6,
    base={
        "model": {"scale": 0.5, "num_experts": 2, "router": "layer", "experts_init": "shared"},
        "threat": {"norm": "linf", "eps": "8/255"},
        "training": {**_TRADES, "epochs": 8, "batch_size": 64, "lr": 0.05, "step_size": "5/255"},
        "attack": {"steps": 50, "step_size": "2/255", "pathways": 4, "queries": 0},
    },
    datasets={
        "CIFAR-10": DataOrBackbone(
            "CIFAR-10 (JPEG)",
            {"data": {"name": "folder", "root": "data/cifar10-jpeg", "train_examples": 6_000, "val_fraction": 0.05}},
            "CIFAR-10",
        )
    },
    backbones={
        "ResNet-18": DataOrBackbone("ResNet-18", {"model": {"name": "resnet18", "width": 16}}, "ResNet-18"),
        "WRN-28-10": DataOrBackbone("WRN-10-2", {"model": {"name": "wrn-10-2"}}, "WRN-28-10"),
        "VGG-16": DataOrBackbone("VGG-16", {"model": {"name": "vgg16", "width": 16}}, "VGG-16"),
        "DenseNet": DataOrBackbone("DenseNet", {"model": {"name": "densenet40", "width": 16}}, "DenseNet"),
        "DeiT-Tiny": DataOrBackbone("DeiT-Tiny", {"model": {"name": "deit-tiny", "width": 64}}, "DeiT-Tiny"),
    },
    examples=500,
    autoattack=("RA AutoAttack %", "autoattack", 100),
    timed={"batches": [128], "seconds": 3.0},
    paced={"rounds": 5},
)


def _paper_part(data: str, label: str) -> DataOrBackbone:
    """A data set as the paper's recipes have it."""
    whole = recipe(f"{data}-resnet18-at-dense")
    return DataOrBackbone(label, {group: whole[group] for group in ("data", "threat", "attack")}, label)


_PAPER_BASE = recipe("cifar10-resnet18-at-dense")
_PAPER = Scale(
    name="paper",
    seeds=5,
    base={**_PAPER_BASE, "model": {"scale": 0.5, "num_experts": 2, "router": "layer"}},
    datasets={
        label: _paper_part(data, label)
        for data, label in (
            ("cifar10", "CIFAR-10"),
            ("cifar100", "CIFAR-100"),
            ("tiny-imagenet", "Tiny-ImageNet"),
            ("imagenet", "ImageNet"),
        )
    },
    backbones={
        label: DataOrBackbone(label, {"model": {"name": name}}, label)
        for label, name in (
            ("ResNet-18", "resnet18"),
            ("WRN-28-10", "wrn-28-10"),
            ("VGG-16", "vgg16"),
            ("DenseNet", "densenet40"),
            ("DeiT-Tiny", "deit-tiny"),
        )
    },
    examples=None,
    autoattack=("RA AutoAttack %", "autoattack", None),
    timed={"batches": [128], "seconds": 10.0},
    paced={"rounds": 9},
)

_SCALES: Mapping[str, Scale] = {scale.name: scale for scale in (_SMOKE, _CPU, _PAPER)}
