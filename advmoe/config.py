"""What a run is: typed, validated settings. Imports no torch, so that the command line answers at once.

Pixels lie in [0, 1] and every strength (`eps`, `step_size`) is in the same unit; `8/255` may be written as such.
Whatever is wrong with a value is a `ValueError` of one line that names the field, the rule and the value received.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from advmoe.documents import MOST_YAML, dump_yaml, parse_yaml, read_text
from advmoe.errors import InputError
from advmoe.files import write_text
from advmoe.tables import ALTERNATIONS, DATASETS, KINDS, METHODS, ROUTERS, Level
from advmoe.text import MOST_OF_A_VALUE, cut, show

RoutePer = Literal["image", "token"]
ExpertLayout = Literal["subset", "independent"]
ExpertInit = Literal["independent", "shared"]
Norm = Literal["linf", "l2"]
AttackRouting = Literal["straight-through", "soft", "mixed"]
RouterObjective = Literal["trades", "codes"]
Codes = Literal["mod", "random"]
Precision = Literal["32-true", "bf16-mixed"]

ModelKind = Annotated[str, KINDS]
RouterKind = Annotated[str, ROUTERS]
MethodName = Annotated[str, METHODS]

_STRENGTH = "a number or a fraction such as 8/255"
_TYPE_RULES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
_DECIMAL = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", re.ASCII)


class Pixels(float):
    """A strength in pixel units: a number, or a fraction written as text (`8/255`), whose spelling is kept."""

    text: str

    def __new__(cls, value: float | str) -> Pixels:
        """Read a number or a fraction; a `ValueError` says what else was received."""
        try:
            if isinstance(value, bool):
                raise TypeError
            if isinstance(value, str):
                top, slash, bottom = value.partition("/")
                if not all(_DECIMAL.fullmatch(part.strip()) for part in (top, bottom if slash else "1")):
                    raise ValueError
                number = float(top) / float(bottom if slash else 1)
            else:
                number = float(value)
        except (ValueError, TypeError, ArithmeticError):
            raise InputError(f"a strength must be {_STRENGTH}, got {show(value)}") from None
        self = super().__new__(cls, number)
        self.text = str(value).strip()
        return self

    def __str__(self) -> str:
        return self.text

    def __reduce__(self) -> tuple[type[Pixels], tuple[str]]:
        return Pixels, (self.text,)


def require(ok: bool, name: str, rule: str, value: object) -> None:
    """Raise the one-line `ValueError` that names field, rule and value unless `ok`."""
    if not ok:
        shown = cut(str(value), MOST_OF_A_VALUE) if isinstance(value, Pixels) else show(value)
        raise InputError(f"{name} must be {rule}, got {shown}")


@dataclass(frozen=True)
class Within:
    """The range of a number: from `low`, which belongs to it unless it is `open`, to `high`, which does."""

    low: float
    high: float
    open: bool = False

    def require(self, name: str, value: float) -> None:
        """Raise the `ValueError` that names field, rule and value where it is not in the range."""
        above = value > self.low if self.open else value >= self.low
        rule = f"{'>' if self.open else '>='} {self.low:.10g}"
        if above or self.high <= 1 or math.isnan(value):  # others are bounds of sense, told to whom they concern
            rule += f" and <= {self.high:.10g}"
        require(above and value <= self.high, name, rule, value)


Share = Annotated[float, Within(0, 1, open=True)]
Weight = Annotated[float, Within(0, 1e6)]
"""Of a term of a loss."""
Epochs = Annotated[int, Within(0, 100_000)]
Steps = Annotated[int, Within(1, 10_000)]
"""Of an attack."""
Step = Annotated[Pixels, Within(0, 1e5, open=True)]
Experts = Annotated[int, Within(1, 1024)]
Width = Annotated[int, Within(1, 16_384)]
Side = Annotated[int, Within(8, 4096)]
"""Of images, in pixels."""
Seed = Annotated[int, Within(0, 2**32 - 1)]
"""NumPy's range."""
Workers = Annotated[int, Within(0, 256)]
Threads = Annotated[int, Within(1, 256)]
Processes = Annotated[int, Within(1, 256)]
Count = Annotated[int, Within(1, 1_000_000_000)]
"""Of images."""
Classes = Annotated[int, Within(2, 1_000_000)]
Channels = Annotated[int, Within(1, 4096)]
"""Of images."""
Batch = Annotated[int, Within(1, 1_000_000)]
"""Of images at once."""


def typed(name: str, hint: Any, value: Any) -> Any:
    """`value` as the type, and in the range, of the field `name`: an int passes for a float, a path for text, a bool
    for no number.
    """
    if get_origin(hint) is Annotated:
        base, allowed = get_args(hint)
        if base is not str:  # names are a table's, which says what there is to whatever else comes
            value = typed(name, base, value)
        allowed.require(name, value)
        return value
    if get_origin(hint) is Literal:
        options = get_args(hint)
        require(isinstance(value, str) and value in options, name, f"one of {', '.join(options)}", value)
        return value
    if len(alternatives := get_args(hint)) == 2:  # `T | None`, the only union in use
        return None if value is None else typed(name, alternatives[0], value)
    if hint is Pixels:
        try:
            return value if isinstance(value, Pixels) else Pixels(value)
        except ValueError:
            require(False, name, _STRENGTH, value)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        require(isinstance(value, hint), name, f"a {hint.__name__}", value)
        return value
    if hint is str and isinstance(value, os.PathLike):
        value = os.fspath(value)
    wanted = {bool: bool, int: Integral, float: Real, str: str}[hint]
    ok = isinstance(value, wanted) and isinstance(value, bool) == (hint is bool)
    require(ok, name, _TYPE_RULES[hint], value)
    if hint is str:
        require_text(name, value)
    try:
        return hint(value)
    except OverflowError:
        return math.inf  # an int that no float holds: the field's range refuses it


def require_text(name: str, value: str, *, empty: bool = False) -> None:
    """Raise `ValueError` for text that no line or file of YAML holds as it is, or, unless it may be `empty`, that says
    nothing.
    """
    sound = len(value) <= 4096 and not any(unicodedata.category(each) in ("Cc", "Cs") for each in value)
    rule = f"{0 if empty else 1} to 4096 characters of UTF-8 without control characters"
    require(sound and (empty or value != ""), name, rule, value)


def require_path(name: str, value: str, longest: int = 255) -> None:
    """Raise `ValueError` for a path that no file system has: its parts have at most `longest` bytes."""
    require_text(name, value)
    path = os.fsencode(value)
    ok = len(path) <= 3840 and all(len(part) <= longest for part in path.split(b"/"))
    require(ok, name, f"a path of at most 3840 bytes, each of its parts of at most {longest}", value)


def _check_types(config: Any, group: str = "") -> None:
    """Check and convert every field of a dataclass in place: Python callers get no other check."""
    for name, hint in get_type_hints(type(config), include_extras=True).items():
        setattr(config, name, typed(f"{group}.{name}" if group else name, hint, getattr(config, name)))


OWN_MODEL: dict[str, Any] = {
    "name": "own", "kind": "dense", "scale": 1.0, "route_per": "image", "experts": "independent",
    "experts_init": "shared", "width": None,
}  # fmt: skip
"""What the fields that describe a backbone hold for a network of the user's own (`kind`: `moe` if converted)."""


@dataclass(kw_only=True)
class ModelConfig:
    """Which network: a backbone and how it is made a mixture of experts."""

    name: str = "resnet18"
    """Backbone, by its registered name."""
    kind: ModelKind = "moe"
    """`moe`, the `dense` backbone, `s-dense`: the backbone with every layer's channels multiplied by `scale`, or
    `sparse`: the backbone under masks, learnt by the method of that name, that keep `scale` of every layer's channels.
    """
    scale: Share = 0.5
    """Model scale r: the fraction of a layer's channels that one pathway uses. In (0, 1]."""
    num_experts: Experts = 2
    """Experts N per MoE layer."""
    router: RouterKind = "layer"
    """One router per layer, a shallow embedding with one head per layer, or one small CNN that chooses for all."""
    route_per: RoutePer = "image"
    """One choice of experts per image, or one per token (transformers, layer routers): no pathway per image then."""
    experts: ExpertLayout = "subset"
    """Experts as windows of the backbone's channels (`subset`), or with no channel shared (`independent`)."""
    experts_init: ExpertInit = "independent"
    """Whether experts start as copies of one another (`shared`) or not."""
    width: Width | None = None
    """Channels of the first stage at scale 1; by default the backbone's own, which is the paper's (ResNet: 64)."""
    source: str | None = None
    """A network of your own, FILE.py:FACTORY, which is executed. The fields above but `num_experts` and `router` then
    say nothing, and take the values that describe it.
    """
    to_moe: bool = False
    """Convert the source: every convolution becomes an MoE layer of `num_experts` copies of it."""
    skip: str | None = None
    """Layers of the source that stay plain, by name or pattern, separated by commas: `conv1,*.downsample`."""
    linear: str | None = None
    """Linear layers of the source to convert too, by name or pattern, separated by commas: `*.mlp`."""

    def __post_init__(self) -> None:
        _check_types(self, "model")
        if self.route_per == "token":
            able = " or ".join(name for name, each in ROUTERS.items() if each.in_layers)
            require(
                ROUTERS[self.router].in_layers, "model.router", f"{able} when model.route_per is token", self.router
            )
        for name in ("skip", "linear"):
            given = getattr(self, name)
            require(given is None or self.to_moe, f"model.{name}", "left out without model.to_moe", given)
        if self.source is None:
            rule = "false without a source (--model FILE.py:FACTORY)"
            require(not self.to_moe, "model.to_moe", rule, self.to_moe)
            return
        require_path("model.source", self.source)
        require(bool(re.fullmatch(r".+\.py:\w+", self.source)), "model.source", "FILE.py:FACTORY", self.source)
        for name, value in OWN_MODEL.items():
            setattr(self, name, value)
        self.kind = "moe" if self.to_moe else "dense"

    def backbone(self) -> dict[str, Any]:
        """The fields that describe a backbone of ours: what `create_model` takes."""
        own = ("source", "to_moe", "skip", "linear")
        return {name: value for name, value in vars(self).items() if name not in own}


@dataclass(kw_only=True)
class DataConfig:
    """Which images, and how they are prepared."""

    name: Annotated[str, DATASETS] = "cifar10"
    """`digits`, `cifar10`, `cifar100`, `tiny-imagenet`, `imagenet` (both in their official layout), or `folder` for
    `root/train/<class>/*` and `root/test|val/<class>/*`.
    """
    root: str = "data"
    """Where the images lie, or where downloads go."""
    download: bool = False
    """Fetch what is missing (CIFAR), checked by its checksum."""
    image_size: Side | None = None
    """Side in pixels that images are resized to; by default their own, for `imagenet` 224."""
    augment: bool = True
    """Random crop (padding of an eighth of the side; for `imagenet` of 8% to 100% of the area, resized) and, where the
    images have no handedness, horizontal flip.
    """
    val_fraction: Annotated[float, Within(0, 0.5)] = 0.02
    """Share of the training set held out, by seed, to choose the best checkpoint. In [0, 0.5]."""
    train_examples: Annotated[int, Within(2, 1e9)] | None = None
    """Use only so many of the training images, drawn at random but the same for every seed; the validation split is
    taken from them. By default all.
    """
    workers: Workers = 2
    """Processes that decode `imagenet` ahead of time, for each training process; 0 decodes in that one. No result
    depends on it.
    """

    def __post_init__(self) -> None:
        _check_types(self, "data")
        require_path("data.root", self.root)


@dataclass(kw_only=True)
class ThreatConfig:
    """What the attacker may do."""

    norm: Norm = "linf"
    """Norm of the perturbation."""
    eps: Pixels = field(default_factory=lambda: Pixels("8/255"))
    """Largest norm of the perturbation, in pixel units."""

    def __post_init__(self) -> None:
        _check_types(self, "threat")
        # An l2 ball can be wider than the pixel range, up to an image's diagonal; an linf ball cannot.
        Within(0, 1 if self.norm == "linf" else 10_000).require("threat.eps", self.eps)


@dataclass(kw_only=True)
class TrainingConfig:
    """How the network is trained."""

    method: MethodName = "advmoe"
    """What is trained, and against what: see the README's table of methods."""
    alternation: Annotated[str, ALTERNATIONS] = "every-4"
    """Of `advmoe`: which of the routers' and the experts' levels an iteration runs, on which batch, against which
    attack. `every-K` (as in the default): the experts' level always, the routers' in every K-th iteration, each on a
    batch and against an attack of its own; an epoch gives every image once to the experts, one in K to the routers.
    `both`, the paper's Algorithm 1: both in every iteration, at 1.8 times the cost of `at` where `every-4` takes 1.2.
    `shared-attack`: both on one batch, against one attack made before them; every image once an epoch, to both.
    `by-iteration`: in turns, the routers' level first; every image once an epoch, to one of them. `shared-every-K`: as
    `every-K`, but what the routers learn from is the experts' batch and the attack made on it. `warm-start`: as
    `both`, but an attack is one step from the image's last perturbation (ATTA, Zheng et al., CVPR 2020;
    `attack_steps` says nothing then), which takes 2 bytes for each value of the training images.
    """
    epochs: Annotated[int, Within(1, 100_000)] = 100
    """Passes over the training set, as the experts see it (of `advmoe`, see `alternation`)."""
    batch_size: Annotated[int, Within(2, 1_000_000)] = 128
    """Images per step, over all processes."""
    lr: Annotated[float, Within(0, 1e30, open=True)] = 0.1
    """Peak learning rate, annealed to 0 by a cosine; the same for routers and experts."""
    momentum: Annotated[float, Within(0, 0.9999)] = 0.9
    """SGD momentum."""
    weight_decay: Annotated[float, Within(0, 10)] = 5e-4
    """SGD weight decay."""
    beta: Weight = 6.0
    """Weight of the KL term of TRADES (1/lambda)."""
    attack_steps: Steps = 2
    """Steps K of the inner maximisation."""
    step_size: Step = field(default_factory=lambda: Pixels("5/255"))
    """Step of the inner maximisation, in pixel units."""
    attack_routing: AttackRouting = "straight-through"
    """How the inner attack sees the routing: through the hard choice, through experts mixed by softmax, or `mixed`: for
    each image one of the two at random.
    """
    router_objective: RouterObjective = "trades"
    """What the routers' step minimises: TRADES, or TRADES and each class's codeword."""
    codes: Codes = "mod"
    """Codewords for `router_objective=codes`: class modulo N in every layer, or balanced random columns."""
    alpha: Weight = 6.0
    """Weight of the codeword term."""
    balance: Weight = 0.0
    """Weight of a term that makes routers share the images evenly among experts (Switch Transformer, Fedus et al., JMLR
    2022, eq. 4), mean over MoE layers; part of every step that trains routers.
    """
    margin: Weight = 0.0
    """Weight of a term that has routers choose clearly under attack: by how much the chosen expert's lead on the
    runner-up, in scores on adversarial images, stays below 1; mean over MoE layers and images.
    """
    ema: Annotated[float, Within(0, 0.999999)] = 0.0
    """Decay of an exponential moving average of the weights, taken after every iteration, which is then what is
    validated and kept (Rebuffi et al., NeurIPS 2021: 0.999 or so); 0 keeps the weights themselves, and beyond 0.999999
    what an iteration adds is lost in rounding.
    """
    awp: Annotated[float, Within(0, 1)] = 0.0
    """Size, relative to each weight tensor's norm, of the adversarial weight perturbation under which gradients are
    taken (Wu et al., NeurIPS 2020: 0.005 for TRADES), at the price of the loss once more; the part that is not trained
    stays as it is. 0 perturbs nothing.
    """
    precision: Precision = "32-true"
    """Arithmetic of training steps and their attacks; accuracies are always measured in fp32."""
    compile: bool = False
    """Compile the model with `torch.compile`."""
    seed: Seed = 0
    """Everything random follows from it."""
    init_from: str | None = None
    """A run to start from: the standard-trained model for `at-routers`, the router-robust one for `at-experts`; for
    `sparse` one of the Dense backbone, in place of pretraining, or a sparse one, whose scores learn on.
    """
    prune_epochs: Epochs | None = None
    """Of `sparse`: epochs that learn which channels to keep, weights fixed; by default a fifth of `epochs`, which are
    those of pretraining. With 0 the channels of the largest weights are kept.
    """
    finetune_epochs: Epochs | None = None
    """Of `sparse`: epochs that train what remains, by default `epochs`; with 0 the mask alone makes robust."""
    val_attack_steps: Steps = 10
    """PGD steps on the validation split, once per epoch, to choose the best checkpoint."""

    def __post_init__(self) -> None:
        _check_types(self, "training")
        if self.prune_epochs == 0:
            rule = "left out or >= 1 when training.prune_epochs is 0"
            require(self.finetune_epochs != 0, "training.finetune_epochs", rule, self.finetune_epochs)
        if self.init_from is not None:
            require_path("training.init_from", self.init_from)
        self._check_options()
        if METHODS[self.method].start:
            rule = f"a run directory to start from when training.method is {self.method}"
            require(self.init_from is not None, "training.init_from", rule, self.init_from)

    def _check_options(self) -> None:
        """Refuse options that would change nothing."""
        method = METHODS[self.method]
        if self.alternation not in (type(self).alternation, "both"):  # older runs name `both` whatever their method
            rule = f"advmoe when training.alternation is {self.alternation}"
            require(self.method == "advmoe", "training.method", rule, self.method)
        for name, rule, fit in (
            ("balance", "one that trains routers", method.trains_routers),
            ("margin", "one that trains routers against attacks", method.trains_routers and method.adversarial),
            ("awp", "one that trains against attacks", method.adversarial),
        ):
            if getattr(self, name) > 0:
                require(fit, "training.method", f"{rule} when training.{name} is > 0", self.method)

    def levels(self) -> tuple[Level, ...]:
        """The levels of the method, in the order in which an iteration runs those due."""
        if self.method == "advmoe":
            return ALTERNATIONS.find(self.alternation).levels
        return METHODS[self.method].levels

    @property
    def warm(self) -> bool:
        """Whether attacks go on from an image's last perturbation."""
        return any(level.warm for level in self.levels())

    def phase_epochs(self) -> dict[str, int]:
        """Epochs of each phase of `sparse`, by name, after HYDRA's 100, 20 and 100 where they are left out."""
        return {
            "pretrain": self.epochs if self.init_from is None else 0,
            "prune": -(-self.epochs // 5) if self.prune_epochs is None else self.prune_epochs,
            "finetune": self.epochs if self.finetune_epochs is None else self.finetune_epochs,
        }


@dataclass(kw_only=True)
class AttackConfig:
    """The PGD attack that measures robust accuracy."""

    steps: Annotated[int, Within(1, 100_000)] = 50
    """PGD steps."""
    step_size: Step = field(default_factory=lambda: Pixels("2/255"))
    """Step, in pixel units."""
    restarts: Steps = 1
    """Random restarts; an example is robust if every one fails."""
    pathways: Annotated[int, Within(0, 1_000_000)] = 32
    """Of `routed`: how many of the pathways that samples reach are attacked, the most frequent first."""
    queries: Annotated[int, Within(0, 10_000_000)] = 25_000
    """Of `routed`: queries of the black-box Square attack on what is left; 0 leaves it out."""

    def __post_init__(self) -> None:
        _check_types(self, "attack")


@dataclass(kw_only=True)
class Config:
    """Everything that a run depends on."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    threat: ThreatConfig = field(default_factory=ThreatConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    attack: AttackConfig = field(default_factory=AttackConfig)

    def __post_init__(self) -> None:
        _check_types(self)
        # A network of the user's own may have MoE layers without being converted: that shows when it is made.
        routed = self.model.kind == "moe" or self.model.source is not None
        method, data = METHODS[self.training.method], DATASETS[self.data.name]
        if method.apart:
            require(routed, "model.kind", f"moe when training.method is {self.training.method}", self.model.kind)
        for name in ("balance", "margin"):
            if getattr(self.training, name) > 0:
                require(routed, "model.kind", f"moe when training.{name} is > 0", self.model.kind)
                rule = f">= 2 when training.{name} is > 0"
                require(self.model.num_experts >= 2, "model.num_experts", rule, self.model.num_experts)
        if self.training.warm:
            streamed = ", ".join(name for name, each in DATASETS.items() if each.streamed)
            rule = f"of images held in memory (not {streamed}) when training.alternation is {self.training.alternation}"
            require(not data.streamed, "data.name", rule, self.data.name)
        if method.kind is not None:
            rule = f"when training.method is {self.training.method}"
            require(self.model.source is None, "model.source", f"left out {rule}", self.model.source)
            require(self.model.kind == method.kind, "model.kind", f"{method.kind} {rule}", self.model.kind)
        if self.model.kind == "sparse":
            rule = "sparse when model.kind is sparse"
            require(self.training.method == "sparse", "training.method", rule, self.training.method)
        if self.training.router_objective == "codes":
            able = " or ".join(name for name, each in METHODS.items() if each.routers_apart)
            rule = f"{able} when training.router_objective is codes"
            require(method.routers_apart, "training.method", rule, self.training.method)
            if self.training.codes == "random":
                able = " or ".join(name for name, each in ROUTERS.items() if each.apart)
                rule = f"{able} when training.codes is random (one choice per layer)"
                require(ROUTERS[self.model.router].apart, "model.router", rule, self.model.router)

    def require_trainable(self) -> None:
        """Raise `ValueError` for what can be measured but not trained: attacks within a radius of nothing."""
        method = self.training.method
        rule = f">= 1e-06 when training.method is {method} (standard trains without attacks)"
        require(not METHODS[method].adversarial or self.threat.eps >= 1e-6, "threat.eps", rule, self.threat.eps)

    def idle(self) -> dict[str, str]:
        """The fields that change nothing about training, by their dotted names, and why."""
        model, t = self.model, self.training
        own, found = model.source is not None, dict[str, str]()

        def add(group: str, names: str, reason: str) -> None:
            found.update({f"{group}.{name}": reason for name in names.split()})

        if own and not model.to_moe:
            add("model", "num_experts router", "model.to_moe is false")
        elif not own and model.kind != "moe":
            reason = f"model.kind is {model.kind}"
            add("model", "num_experts router route_per experts experts_init", reason)
            add("model", "scale" if model.kind == "dense" else "", reason)
            add("training", "attack_routing", reason)
        if not METHODS[t.method].adversarial:
            add("training", "attack_steps step_size beta attack_routing", f"training.method is {t.method}")
        if t.warm:
            add("training", "attack_steps", f"training.alternation is {t.alternation}")
        if t.method != "sparse":
            add("training", "prune_epochs finetune_epochs", f"training.method is {t.method}")
        if t.router_objective != "codes":
            add("training", "codes alpha", f"training.router_objective is {t.router_objective}")
        if not DATASETS[self.data.name].streamed:
            add("data", "workers", f"data.name is {self.data.name}")
        return found

    def notes(self, given: Iterable[str]) -> list[str]:
        """What whoever gave the fields `given` (dotted names) may not expect of them, a line each."""
        idle, model = self.idle(), self.model
        lines = [f"{name} changes nothing: {idle[name]}" for name in given if name in idle]
        routed = model.kind == "moe" and model.source is None and model.num_experts > 1
        if routed and model.experts == "subset" and model.scale == 1:
            lines.append(f"model.scale 1 makes the {model.num_experts} experts of every layer the same")
        if self.training.lr < 1e-9:
            lines.append(f"training.lr {self.training.lr:g} changes no weight that fp32 would show")
        if METHODS[self.training.method].adversarial and not self.training.warm:
            lines += self._steps("training", self.training.attack_steps, self.training.step_size)
        return lines + self._steps("attack", self.attack.steps, self.attack.step_size)

    def _steps(self, group: str, steps: int, size: Pixels) -> list[str]:
        """What is odd about an attack's steps."""
        eps = self.threat.eps
        if size > eps > 0:
            return [f"{group}.step_size {size} is longer than the radius threat.eps {eps}"]
        if steps * size < eps * (1 - 1e-6):
            return [f"{steps} steps of {group}.step_size {size} are shorter than the radius threat.eps {eps}"]
        return []

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Plain nested dictionaries, strengths in their own spelling: what `config.yaml` holds."""

        def plain(value: Any) -> Any:
            if isinstance(value, Pixels):
                return value.text if "/" in value.text else float(value)
            return value

        groups = {f.name: dataclasses.asdict(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return {group: {k: plain(v) for k, v in values.items()} for group, values in groups.items()}

    @staticmethod
    def from_dict(values: Mapping[str, Mapping[str, Any] | None]) -> Config:
        """The inverse of `to_dict`; missing fields take their defaults. Raises `ValueError` for an unknown field."""
        groups = get_type_hints(Config)
        require(isinstance(values, Mapping), "a configuration", f"groups of fields ({', '.join(groups)})", values)
        made = {}
        for group, fields in values.items():
            if group not in groups:
                raise unknown_field(str(group))
            fields = {} if fields is None else fields
            require(isinstance(fields, Mapping), group, "a group of fields", fields)
            known = get_type_hints(groups[group])
            for name in fields:
                if name not in known:
                    raise unknown_field(f"{group}.{name}")
            made[group] = groups[group](**fields)
        return Config(**made)

    def digest(self) -> str:
        """The SHA-256 of all fields but those that say where things lie, which change no result."""
        groups = self.to_dict()
        for group, name in PLACES:
            del groups[group][name]
        return hashlib.sha256(json.dumps(groups, sort_keys=True).encode()).hexdigest()

    def to_yaml(self) -> str:
        """The text of `config.yaml`."""
        return dump_yaml(self.to_dict())

    def dump(self, path: str | os.PathLike[str]) -> None:
        """Write the configuration as YAML, whole or not at all."""
        write_text(Path(path), self.to_yaml())

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Config:
        """Read what `dump` or a user wrote. Raises `ValueError`, which names the file, or `FileNotFoundError`."""
        values = read_yaml(path)
        try:
            return Config.from_dict(values)
        except ValueError as error:
            raise InputError(f"{path}: {error}") from None


PLACES = (
    ("model", "source"), ("data", "root"), ("data", "download"), ("data", "workers"), ("training", "init_from"),
)  # fmt: skip
"""Fields that say where things lie or how they are fetched."""


def field_names() -> list[str]:
    """Every field by its dotted name, e.g. `training.lr`."""
    return [f"{group}.{name}" for group, hint in get_type_hints(Config).items() for name in get_type_hints(hint)]


def merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dictionaries laid over one another, group by group; the last one to name a field decides."""
    result: dict[str, Any] = {}
    for layer in layers:
        for group, fields in layer.items():
            below = result.get(group)
            if isinstance(below, Mapping) and isinstance(fields, Mapping | None):
                result[group] = {**below, **(fields or {})}  # an empty group in YAML (`training:`) is None
            else:
                result[group] = fields
    return result


def near_matches(name: str, names: Iterable[str]) -> list[str]:
    """Those of the dotted `names` that a misspelt or misplaced one may have meant, most often one."""
    names, by_leaf = list(names), dict[str, list[str]]()
    for known in names:
        by_leaf.setdefault(known.rsplit(".", 1)[-1], []).append(known)
    leaf = name.rsplit(".", 1)[-1]
    if leaf in by_leaf:  # the right name in a wrong group, or in none
        return by_leaf[leaf]
    if close := difflib.get_close_matches(name, names, n=1, cutoff=0.8):
        return close
    return [known for near in difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=0.7) for known in by_leaf[near]]


def unknown_field(name: str) -> InputError:
    """The error for a field, or a group of fields, that does not exist."""
    name = cut(name, MOST_OF_A_VALUE)
    groups = {group: list(get_type_hints(hint)) for group, hint in get_type_hints(Config).items()}
    if near := near_matches(name, field_names() if "." in name else [*field_names(), *groups]):
        return InputError(f"{name} is no known field: did you mean {' or '.join(near)}?")
    if (group := name.split(".", 1)[0]) in groups:
        return InputError(f"{name} is no known field: {group} has {', '.join(groups[group])}")
    return InputError(f"{name} is no known field: the groups of fields are {', '.join(groups)}")


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The groups of fields in a YAML file, not yet checked."""
    values = parse_yaml(read_text(Path(path), MOST_YAML, "YAML"), str(path))
    require(isinstance(values, dict), str(path), f"groups of fields ({', '.join(get_type_hints(Config))})", values)
    return dict(values)
