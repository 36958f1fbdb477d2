"""The sections of a run's settings: every field, its default and its meaning, checked when a section is made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from advmoe.config.fields import (
    AttackLoss,
    AttackRouting,
    AttackStart,
    Codes,
    Compute,
    Decay,
    Epochs,
    FollowingStep,
    FrozenNorms,
    LearningRate,
    MethodName,
    Norm,
    Objective,
    Optimizer,
    Pixels,
    Precision,
    RouterObjective,
    Schedule,
    Seed,
    Side,
    Step,
    Steps,
    Strict,
    Weight,
    WeightDecay,
    Within,
    Workers,
    check_types,
    first_epochs,
    is_source,
    require,
    require_path,
)
from advmoe.errors import OfNoUse
from advmoe.tables import ALTERNATIONS, DATASETS, METHODS, Level, levels


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
    """Random crop (padding of an eighth of the side; for `imagenet` of 8% to 100% of the area, resized) and, but for
    `digits`, horizontal flip.
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
    `both`, but an attack is one step from the image's last perturbation (ATTA, Zheng et al., CVPR 2020), which takes 2
    bytes for each value of the training images. Of `attack_steps` it has the `step_size` alone, if that is left out.
    """
    objective: Objective = "trades"
    """What is minimised against attacks. `trades` (Zhang et al., ICML 2019): cross-entropy on clean images, and `beta`
    times the KL divergence of the attacked images' predictions from theirs. `pgd-at` (Madry et al., ICLR 2018), the
    paper's min-max: cross-entropy on the attacked images alone, which the attack ascends.
    """
    epochs: Annotated[int, Within(1, 100_000)] = 100
    """Passes over the training set, as the experts see it (of `advmoe`, see `alternation`)."""
    batch_size: Annotated[int, Within(2, 1_000_000)] = 128
    """Images per step, over all processes."""
    lr: LearningRate = 0.1
    """Peak learning rate, annealed to 0 by a cosine (see `schedule`); routers may have their own, `router_lr`."""
    schedule: Schedule = "cosine"
    """The learning rate's course from its peak: a `cosine` to 0 (Loshchilov & Hutter, ICLR 2017), `one-cycle` from 0 to
    the peak at two fifths of the run and back to 0, linearly (Wong et al., ICLR 2020), or a `step` to a tenth at half
    of the run and again at three quarters (Rice et al., ICML 2020).
    """
    warmup_epochs: Epochs = 0
    """Epochs in which the learning rate first rises linearly to its peak (Goyal et al., 2017); of `sparse`, in each
    phase. The schedule takes the rest.
    """
    optimizer: Optimizer = "sgd"
    """`sgd`, or `adamw` (Loshchilov & Hutter, ICLR 2019), by which transformers are trained (DeiT: lr 5e-4 for batches
    of 512, weight decay 0.05).
    """
    momentum: Annotated[float, Within(0, 0.9999)] = 0.9
    """Momentum of SGD; AdamW's beta1 (its beta2 is 0.999)."""
    weight_decay: WeightDecay = 5e-4
    """Weight decay; AdamW's does not pass through its moments."""
    decay: Decay = "all"
    """What decays: `all` parameters, or `weights`: no biases, no parameters of norms, no scores of channels, no
    positions or class token of a transformer, and of routers not the last layer, which makes their scores, nor the
    hyperplanes of `linear`. The paper does not say; transformers are trained by `weights` (DeiT, ICML 2021).
    """
    router_lr: LearningRate | None = None
    """The routers' own peak learning rate; by default `lr`."""
    router_momentum: Annotated[float, Within(0, 0.9999)] | None = None
    """The routers' own momentum; by default `momentum`."""
    router_weight_decay: WeightDecay | None = None
    """The routers' own weight decay; by default `weight_decay`."""
    clip: Weight = 0.0
    """Longest gradient of an update, as the l2 norm over the parameters that it moves; a longer one is scaled to it
    (Pascanu et al., ICML 2013). 0 clips nothing.
    """
    label_smoothing: Annotated[float, Within(0, 0.999)] = 0.0
    """Share of the label that all classes have evenly in the cross-entropy that is minimised (Szegedy et al., CVPR
    2016; in adversarial training Pang et al., ICLR 2021: 0.1 to 0.2). Attacks ascend that with the true class.
    """
    beta: Weight = 6.0
    """Weight of the KL term of TRADES (1/lambda)."""
    attack_steps: Steps = 2
    """Steps K of the inner maximisation."""
    step_size: Step = field(default_factory=lambda: FollowingStep("5/255"))
    """Step of the inner maximisation, in pixel units; by default 1.25 `threat.eps` / `attack_steps`: the paper's 5/255
    at its radius.
    """
    attack_start: AttackStart | None = None
    """Where the inner attack starts: `noise` of 0.001 on the image (TRADES), or `uniform` in the ball (Madry et al.);
    by default each objective's own.
    """
    attack_loss: AttackLoss | None = None
    """What the inner attack ascends: `kl`, the divergence from the clean prediction (TRADES), or `ce`, the
    cross-entropy with the class (Madry et al.); by default each objective's own.
    """
    first_attack_steps: str | None = None
    """Steps of the inner attack in the first epochs, where not `attack_steps`: `1:5,2` is 1 in each of the first five
    and 2 in the sixth (Cai et al., IJCAI 2018: weak attacks first). With K times fewer, steps are K times longer. Of
    `sparse`, in each phase.
    """
    first_image_sizes: str | None = None
    """Sides in pixels to which the first epochs' images are shrunk before they are attacked: `16:30,24:30` is 16 for
    thirty epochs and 24 for thirty more (progressive resizing; Wong et al., ICLR 2020), at a cost that falls with the
    pixels. The backbone must take them: CNNs do. Of `sparse`, in each phase.
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
    runner_up: Annotated[float, Within(0, 1)] = 0.0
    """Share of a batch, its images nearest to another pathway, on which experts learn to forgive a flip: the pathway
    behind the closest choice is to say of an attack of its own what the image's own pathway, or the teacher, says of
    the clean image. It weighs as the attacked images' term, times how close the choice is; of `fixed` and `linear`
    routers it is the worst pathway within reach, at full weight. Each process takes two of its own images at least.
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
    frozen_norms: FrozenNorms | None = None
    """What becomes of the batch norms' statistics in the part that stays fixed: of the backbone in `at-routers`, of the
    routers in `at-experts`, of all weights while `sparse` learns scores. `refresh` estimates them anew, on clean
    training images under the routing that there is now, before the first epoch and before each validation; `keep`
    leaves them as they were; `running` has them follow in every step. By default `refresh`, of `sparse` `running`.
    """
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
    `sparse` one of the Dense backbone, in place of pretraining, or a sparse one, whose scores learn on. The experts of
    a mixture may all start as copies: of an S-Dense or Sparse run, or of the channels of a Dense CNN with the largest
    weights."""
    teacher: str | None = None
    """A trained network to learn from instead of classes: a run, `zoo:NAME`, or your own as FILE.py:FACTORY, which is
    executed. It says what the clean images are; attacks lead away from that, and the loss is KL from it on clean and
    attacked images (RSLAD, Zi et al., ICCV 2021). It may be of another kind and width.
    """
    teacher_weights: str | None = None
    """A `.safetensors` file, for a teacher of your own."""
    distill_weight: Annotated[float, Within(0, 1)] = 5 / 6
    """Weight, with a teacher, of the term on attacked images, that on clean ones having the rest."""
    prune_epochs: Epochs | None = None
    """Of `sparse`: epochs that learn which channels to keep, weights fixed; by default a fifth of `epochs`, which are
    those of pretraining. With 0 the channels of the largest weights are kept.
    """
    finetune_epochs: Epochs | None = None
    """Of `sparse`: epochs that train what remains, by default `epochs`; with 0 the mask alone makes robust."""
    finetune_lr: LearningRate | None = None
    """Of `sparse`: peak learning rate of finetuning, by default `lr`. HYDRA finetunes from a tenth of it."""
    val_attack_steps: Steps = 10
    """PGD steps on the validation split, once per epoch, to choose the best checkpoint."""

    def __post_init__(self) -> None:
        for name in ("first_attack_steps", "first_image_sizes"):  # one number is no text in YAML
            if type(number := getattr(self, name)) is int:
                setattr(self, name, str(number))
        check_types(self, "training")
        if self.prune_epochs == 0:
            rule = "left out or >= 1 when training.prune_epochs is 0"
            require(self.finetune_epochs != 0, "training.finetune_epochs", rule, self.finetune_epochs)
        if self.init_from is not None:
            require_path("training.init_from", self.init_from)
        self._check_options()
        self._check_first_epochs()
        self._check_teacher()
        if METHODS[self.method].start:
            rule = f"a run directory to start from when training.method is {self.method}"
            require(self.init_from is not None, "training.init_from", rule, self.init_from)

    def _check_options(self) -> None:
        """Refuse options that would change nothing."""
        method = METHODS[self.method]
        if self.alternation not in (type(self).alternation, "both"):  # older runs name `both` whatever their method
            rule = f"advmoe when training.alternation is {self.alternation}"
            require(self.method == "advmoe", "training.method", rule, self.method, OfNoUse)
        against = "one that trains against attacks"
        for names, rule, fit in (
            ("balance router_lr router_momentum router_weight_decay", "one that trains routers", method.trains_routers),
            ("margin", "one that trains routers against attacks", method.trains_routers and method.adversarial),
            ("radius", "one that trains routers", method.trains_routers),
            ("runner_up", "one that trains experts against attacks", method.adversarial and method.trains_experts),
            ("awp objective attack_start attack_loss first_attack_steps", against, method.adversarial),
            ("finetune_lr", "sparse", self.method == "sparse"),
        ):
            for name in names.split():
                value = getattr(self, name)
                if value != getattr(type(self), name):
                    told = "> 0" if name in ("balance", "margin", "radius", "runner_up", "awp") else value
                    require(fit, "training.method", f"{rule} when training.{name} is {told}", self.method, OfNoUse)

    def _check_first_epochs(self) -> None:
        """Refuse what is said of more first epochs than there are."""
        epochs = [each for each in self.phase_epochs().values() if each] if self.method == "sparse" else [self.epochs]
        rule = f"< the {min(epochs)} epochs of {'the shortest phase' if self.method == 'sparse' else 'the run'}"
        require(self.warmup_epochs < min(epochs), "training.warmup_epochs", rule, self.warmup_epochs)
        if self.schedule == "one-cycle":
            rule = "0 when training.schedule is one-cycle, which rises by itself"
            require(self.warmup_epochs == 0, "training.warmup_epochs", rule, self.warmup_epochs)
        for name in ("first_attack_steps", "first_image_sizes"):
            text = getattr(self, name)
            rule = f"of at most the {min(epochs)} epochs that there are"
            require(len(self._first(name)) <= min(epochs), f"training.{name}", rule, text)
            if self.warm:
                rule = f"left out when training.alternation is {self.alternation}"
                require(text is None, f"training.{name}", rule, text)

    def _first(self, name: str) -> list[int]:
        """What the field `name` says of the first epochs, a number each."""
        return first_epochs(f"training.{name}", getattr(self, name), Steps if "steps" in name else Side)

    @property
    def inner(self) -> tuple[AttackStart, AttackLoss]:
        """Start and loss of the inner attack: those named, or the objective's own."""
        own: tuple[AttackStart, AttackLoss] = ("uniform", "ce") if self.objective == "pgd-at" else ("noise", "kl")
        return self.attack_start or own[0], self.attack_loss or own[1]

    def attack_at(self, epoch: int) -> tuple[int, float]:
        """The inner attack's steps in `epoch` (from 0), and the length of each, in pixel units."""
        first, size = self._first("first_attack_steps"), float(self.step_size)
        if epoch >= len(first):
            return self.attack_steps, size
        return first[epoch], size * self.attack_steps / first[epoch]

    def image_size_at(self, epoch: int) -> int | None:
        """The side in pixels to which images are shrunk in `epoch` (from 0); None where they are not."""
        first = self._first("first_image_sizes")
        return first[epoch] if epoch < len(first) else None

    def _check_teacher(self) -> None:
        if self.teacher is not None:
            require_path("training.teacher", self.teacher)
            rule = "one that trains against attacks when training.teacher is given"
            require(METHODS[self.method].adversarial, "training.method", rule, self.method)
            # A teacher sees what the student sees, in the size that it was trained for.
            for name, usual in (("objective", "trades"), ("label_smoothing", 0), ("first_image_sizes", None)):
                value = getattr(self, name)
                rule = f"{'left out' if usual is None else usual} when training.teacher is given"
                require(value == usual, f"training.{name}", rule, value)
            rule = "kl, or left out, when training.teacher is given"
            require(self.attack_loss != "ce", "training.attack_loss", rule, self.attack_loss)
        if self.teacher_weights is not None:
            require_path("training.teacher_weights", self.teacher_weights)
            rule = "left out unless training.teacher is a FILE.py:FACTORY"
            require(is_source(self.teacher or ""), "training.teacher_weights", rule, self.teacher_weights)

    def levels(self) -> tuple[Level, ...]:
        """The levels of the method, in the order in which an iteration runs those due."""
        return levels(self.method, self.alternation)

    @property
    def fixed_norms(self) -> str | None:
        """What `frozen_norms` comes to; None where no part stays fixed for good."""
        usual = METHODS[self.method].frozen_norms
        return usual and (self.frozen_norms or usual)

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
