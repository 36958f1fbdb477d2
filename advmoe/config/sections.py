"""The sections of a run's settings: every field, its default and its meaning, checked when a section is made."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Any

from advmoe.config.fields import (
    AttackRouting,
    Codes,
    Compute,
    Epochs,
    ExpertInit,
    ExpertLayout,
    Experts,
    FollowingStep,
    MethodName,
    ModelKind,
    Norm,
    Pixels,
    Precision,
    RoutePer,
    RouterKind,
    RouterObjective,
    Seed,
    Share,
    Side,
    Step,
    Steps,
    Strict,
    Weight,
    Width,
    Within,
    Workers,
    check_types,
    require,
    require_path,
)
from advmoe.tables import ALTERNATIONS, DATASETS, METHODS, ROUTERS, Level, levels

OWN_MODEL: dict[str, Any] = {
    "name": "own", "kind": "dense", "scale": 1.0, "route_per": "image", "experts": "independent",
    "experts_init": "shared", "width": None,
}  # fmt: skip
"""What the fields that describe a backbone hold for a network of the user's own (`kind`: `moe` if converted)."""


@dataclass(kw_only=True)
class ModelConfig(Strict):
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
    """One router per layer, a shallow embedding with one head per layer, or one small CNN that chooses for all
    (`image`). `fixed-FORM` and `linear`: whether the image's brightness in a part of it, or a learnt average of its
    pixels, exceeds a threshold, which is the training images' median or starts there: choices that can be proved
    (`advmoe certify`). `fixed-top-bottom` and `linear-2` decide twice, for each half of the layers.
    """
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
        check_types(self, "model")
        if self.route_per == "token":
            able = " or ".join(name for name, each in ROUTERS.items() if each.in_layers)
            require(
                ROUTERS[self.router].in_layers, "model.router", f"{able} when model.route_per is token", self.router
            )
        if self.kind == "moe" and (experts := ROUTERS[self.router].experts) is not None:
            rule = f"{experts} when model.router is {self.router}"
            require(self.num_experts == experts, "model.num_experts", rule, self.num_experts)
        for name in ("skip", "linear"):
            patterns = getattr(self, name)
            require(patterns is None or self.to_moe, f"model.{name}", "left out without model.to_moe", patterns)
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
class DataConfig(Strict):
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
        check_types(self, "data")
        require_path("data.root", self.root)


@dataclass(kw_only=True)
class ThreatConfig(Strict):
    """What the attacker may do."""

    norm: Norm = "linf"
    """Norm of the perturbation."""
    eps: Pixels = field(default_factory=lambda: Pixels("8/255"))
    """Largest norm of the perturbation, in pixel units."""

    def __post_init__(self) -> None:
        check_types(self, "threat")
        # An l2 ball can be wider than the pixel range, up to an image's diagonal; an linf ball cannot.
        Within(0, 1 if self.norm == "linf" else 10_000).require("threat.eps", self.eps)


@dataclass(kw_only=True)
class TrainingConfig(Strict):
    """How the network is trained."""

    method: MethodName = "advmoe"
    """What is trained, and against what: see docs/how-to/train.md."""
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
    step_size: Step = field(default_factory=lambda: FollowingStep("5/255"))
    """Step of the inner maximisation, in pixel units; by default 1.25 `threat.eps` / `attack_steps`: the paper's 5/255
    at its radius.
    """
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
    radius: Weight = 0.0
    """Weight of a term that has a `linear` router choose with room: by how much the radius within which a choice is
    proved stays below `threat.eps`, in units of that and as if pixels could leave [0, 1]; mean over bits and images.
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
    compute: Compute = "auto"
    """How a batch's experts are computed: `dispatch` groups the images by expert, for which a GPU's host waits in each
    layer; `masked` computes every expert for all images, without a wait; `kernel` computes each image's own expert,
    without a wait, by Triton on a GPU (extra `triton`). They agree to rounding. `auto` is `masked` on a GPU where there
    are at most four experts, and `dispatch` elsewhere.
    """
    deterministic: bool = False
    """Have a GPU give the same bits for the same seed (`torch.use_deterministic_algorithms`), which is slower; CPUs do.
    """
    compile: bool = False
    """Compile training's passes with `torch.compile`: whole ones, forward and backward, where `compute` comes to
    `masked` or there are no experts, which a GPU replays as CUDA graphs; else pieces between the MoE layers.
    """
    checkpoint_minutes: Annotated[float, Within(0, 1e6)] = 10.0
    """Minutes between checkpoints within an epoch, beside those at its end; 0: the latter alone. Changes no result."""
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
        check_types(self, "training")
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
            ("radius", "one that trains routers", method.trains_routers),
            ("awp", "one that trains against attacks", method.adversarial),
        ):
            if getattr(self, name) > 0:
                require(fit, "training.method", f"{rule} when training.{name} is > 0", self.method)

    def levels(self) -> tuple[Level, ...]:
        """The levels of the method, in the order in which an iteration runs those due."""
        return levels(self.method, self.alternation)

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
class AttackConfig(Strict):
    """The PGD attack that measures robust accuracy."""

    steps: Annotated[int, Within(1, 100_000)] = 50
    """PGD steps."""
    step_size: Step = field(default_factory=lambda: FollowingStep("2/255"))
    """Step, in pixel units; by default a quarter of `threat.eps`: the paper's 2/255 at its radius."""
    restarts: Steps = 1
    """Random restarts; an example is robust if every one fails."""
    pathways: Annotated[int, Within(0, 1_000_000)] = 32
    """Of `routed`: how many of the pathways that samples reach are attacked, the most frequent first."""
    queries: Annotated[int, Within(0, 10_000_000)] = 25_000
    """Of `routed`: queries of the black-box Square attack on what is left; 0 leaves it out."""

    def __post_init__(self) -> None:
        check_types(self, "attack")
