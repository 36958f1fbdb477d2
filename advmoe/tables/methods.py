"""Training methods, and how AdvMoE alternates: who is updated when.

psi are the backbone's parameters (experts, norms, stem, classifier), phi the routers'; a sparse model has channel
scores besides. A method is a schedule of levels, some or all of which an iteration runs. Each level has a batch and an
attack on the current model, its own or shared with another level, and changes its part alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from advmoe.errors import InputError, require_whole
from advmoe.tables.table import Family, Table

PAPER = "https://arxiv.org/abs/2308.10110"

Part = Literal["all", "experts", "routers", "scores"]


@dataclass(frozen=True)
class Level:
    """One update: which part moves, against an attack or not, and when and on what it does."""

    part: Part
    """`routers`, `experts`, `scores` (of a sparse model) or `all`; the rest stays as it is."""
    adversarial: bool = True
    """Whether its images are attacked (TRADES), or clean (cross-entropy)."""
    batch: int = 0
    """Which of an iteration's batches. Levels on one batch share it and the attack on it, made before the first."""
    every: int = 1
    """The level runs in the iterations whose number, from the run's start, is `turn` modulo `every`."""
    turn: int = 0
    warm: bool = False
    """Whether the attack is one step from an image's last perturbation (ATTA, Zheng et al., CVPR 2020)."""

    def __post_init__(self) -> None:
        if self.part not in get_args(Part):
            raise InputError(f"a level's part must be one of {', '.join(get_args(Part))}, got {self.part!r}")
        for name, least in (("batch", 0), ("every", 1), ("turn", 0)):
            require_whole(f"a level's {name}", getattr(self, name), least)
        if self.turn >= self.every:
            raise InputError(f"a level's turn must be less than its every={self.every}, got {self.turn}")


@dataclass(frozen=True)
class Method:
    """A way to train."""

    levels: tuple[Level, ...]
    """In the order in which an iteration runs those due."""
    label: str
    """What tables call it, but for the kind of network."""
    sentence: str
    """What it does, in a model card."""
    start: bool = False
    """Whether it begins with another run's weights (`training.init_from`)."""
    kind: str | None = None
    """The one kind of network that it trains, where it trains no other."""
    frozen_norms: str | None = None
    """What `training.frozen_norms` is where it is left out; None where no part stays fixed for good."""

    def __post_init__(self) -> None:
        if not isinstance(self.levels, tuple) or not self.levels or not all(isinstance(e, Level) for e in self.levels):
            raise InputError(f"a method's levels must be Levels in a tuple, at least one, got {self.levels!r}")

    @property
    def adversarial(self) -> bool:
        """Whether any level is trained against attacks."""
        return any(level.adversarial for level in self.levels)

    @property
    def earlier_norms(self) -> str | None:
        """What became of a fixed part's statistics before `training.frozen_norms` could say it."""
        return "keep" if self.frozen_norms == "refresh" else self.frozen_norms

    @property
    def apart(self) -> bool:
        """Whether routers and experts learn apart, so that there must be both."""
        return any(level.part in ("routers", "experts") for level in self.levels)

    @property
    def routers_apart(self) -> bool:
        """Whether a level trains the routers alone, which may then have an objective of their own."""
        return any(level.part == "routers" for level in self.levels)

    @property
    def trains_experts(self) -> bool:
        """Whether any level moves experts."""
        return any(level.part in ("all", "experts") for level in self.levels)

    @property
    def trains_routers(self) -> bool:
        """Whether any level moves routers."""
        return any(level.part != "experts" for level in self.levels)


_BOTH = (Level("routers"), Level("experts", batch=1))
"""Algorithm 1: the lower level (routers) first, then the upper (backbone)."""

METHODS: Table[Method] = Table(
    "training.method",
    {
        "standard": Method((Level("all", adversarial=False),), "standard", "cross-entropy on clean images"),
        "at": Method((Level("all"),), "AT", "adversarial training (TRADES) of all parameters"),
        "at-routers": Method(
            (Level("routers"),), "at-routers",
            "adversarial training (TRADES) of the routers, the experts fixed", start=True,
            frozen_norms="refresh",
        ),
        "at-experts": Method(
            (Level("experts"),), "at-experts",
            "adversarial training (TRADES) of the experts, the routers fixed", start=True,
            frozen_norms="refresh",
        ),
        # Its second phase; before and after it is `at` (see `training.phases`).
        "sparse": Method(
            (Level("scores"),), "AT (Sparse)",
            "robust structured pruning (HYDRA): TRADES of the Dense backbone, of channel scores, of what they keep",
            kind="sparse", frozen_norms="running",
        ),
        "advmoe": Method(
            _BOTH, "AdvMoE",
            f"[AdvMoE]({PAPER}): routers and experts in turn, each against attacks",
        ),
    },
)  # fmt: skip


@dataclass(frozen=True)
class Alternation:
    """How AdvMoE takes turns between routers and experts."""

    levels: tuple[Level, ...]


def _every(shared: bool) -> Family[Alternation]:
    prefix = "shared-" if shared else ""

    def read(name: str) -> Alternation | None:
        match = re.fullmatch(prefix + r"every-([1-9][0-9]{0,4})", name)
        if match is None or not 2 <= (every := int(match[1])) <= 10_000:
            return None
        return Alternation((Level("routers", every=every), Level("experts", batch=0 if shared else 1)))

    spelling = f"{prefix}every-K{' (K a whole number >= 2 and <= 10000)' if shared else ''}"
    return Family(spelling, read, example=f"{prefix}every-2")


ALTERNATIONS: Table[Alternation] = Table(
    "training.alternation",
    {
        "both": Alternation(_BOTH),
        "shared-attack": Alternation((Level("routers"), Level("experts"))),
        "by-iteration": Alternation((Level("routers", every=2), Level("experts", every=2, turn=1))),
        "warm-start": Alternation((Level("routers", warm=True), Level("experts", batch=1, warm=True))),
    },
    _every(shared=False),
    _every(shared=True),
)


def levels(method: str = "advmoe", alternation: str = "both") -> tuple[Level, ...]:
    """The levels of a training method, in the order in which an iteration runs those that are due.

    Args:
        method: a name of `METHODS`, `advmoe` for Algorithm 1: the routers' level, then the experts' (AdvMoE, Zhang et
            al., ICCV 2023).
        alternation: of `advmoe` alone, a name of `ALTERNATIONS`: which level runs in which iteration and on which
            batch. `both` is the paper's; `every-K` runs the routers' in every K-th iteration.

    Raises `ValueError`, which lists the names that there are, for an unknown one.
    """
    if method == "advmoe":
        return ALTERNATIONS.find(alternation).levels
    return METHODS.find(method).levels
