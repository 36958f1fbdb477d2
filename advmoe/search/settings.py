"""What a search is, whoever does its trials: the same for as long as its folder lives.

Imports neither torch nor Optuna.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from advmoe.config import Config, merged, require, require_one_of
from advmoe.documents import MOST_YAML, dump_yaml, parse_yaml, read_text
from advmoe.errors import InputError
from advmoe.files import write_text
from advmoe.search.space import Dimension, overrides
from advmoe.tables import BACKBONES, METHODS

SEARCH, JOURNAL, BEST, TRIALS = "search.yaml", "optuna.journal", "best.yaml", "trials"
"""What lies in a search's folder: its settings, Optuna's journal, the best configuration, and the trials."""
OBJECTIVES = ("worst_case", "clean_accuracy")
SAMPLERS = ("tpe", "random")
PRUNERS = ("none", "median", "asha")


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """A search. Raises `InputError`, which names the option or the field, for what cannot be."""

    space: Sequence[Dimension]
    base: Mapping[str, Mapping[str, Any]]
    """Groups of fields that all trials share, as the user wrote them: steps that nobody set follow the radius."""
    objective: str = "worst_case"
    """One of `OBJECTIVES`, on the validation split: the larger the better."""
    sampler: str = "tpe"
    """One of `SAMPLERS`."""
    pruner: str = "none"
    """One of `PRUNERS`: whether a trial is stopped after an epoch whose validation accuracy falls behind others'."""
    seed: int = 0
    """Of what is drawn from the space."""
    attacks: Sequence[str] | None = None
    """Names as in `evaluation.suite`; None: PGD, and through soft routing or, of a plain model, on the margin."""
    num_examples: int | None = None
    """Validation images attacked, drawn at random, the same for all trials; None: all."""
    allow: Sequence[str] = ()
    """Checks before the attacks that may fail: see `evaluation.checks`."""
    config: Config = field(init=False)
    """What trials share, resolved."""

    def __post_init__(self) -> None:
        for name, options in (("objective", OBJECTIVES), ("sampler", SAMPLERS), ("pruner", PRUNERS)):
            require_one_of(options, f"--{name}", getattr(self, name))
        config = Config.from_dict(self.base)
        object.__setattr__(self, "config", config)
        require(config.data.val_fraction > 0, "data.val_fraction", "> 0, as trials are compared on that part",
                config.data.val_fraction)  # fmt: skip
        for each in self.space:
            if each.name == "model.name":
                for choice in each.choices:
                    BACKBONES.require("model.name: choices", choice)
        usual = self.objective != "worst_case" or METHODS[config.training.method].adversarial
        require(usual, "--objective", f"clean_accuracy when training.method is {config.training.method}",
                self.objective)  # fmt: skip

    @property
    def watched(self) -> str:
        """What a pruner compares, of an epoch's validation."""
        return "clean_accuracy" if self.objective == "clean_accuracy" else "robust_accuracy"

    def configured(self, parameters: Mapping[str, Any]) -> Config:
        """The configuration of a trial with these values of the space's fields. Raises `InputError`."""
        return Config.from_dict(merged(self.base, overrides(parameters)))

    def to_dict(self) -> dict[str, Any]:
        """What `search.yaml` holds."""
        return {
            "objective": self.objective, "sampler": self.sampler, "pruner": self.pruner, "seed": self.seed,
            "attacks": None if self.attacks is None else list(self.attacks), "num_examples": self.num_examples,
            "allow": list(self.allow),
            "space": {each.name: each.described() for each in self.space}, "config": self.config.to_dict(),
        }  # fmt: skip

    def keep(self, folder: Path) -> None:
        """Write `search.yaml` into a new search's folder. Raises `InputError` where another search lies there."""
        self.require_same(folder)
        if not (file := folder / SEARCH).exists():
            write_text(file, dump_yaml(self.to_dict()))

    def require_same(self, folder: Path) -> None:
        """Raise `InputError` where another search lies in `folder`."""
        if not (file := folder / SEARCH).exists():
            return
        before = parse_yaml(read_text(file, MOST_YAML, "YAML"), str(file))
        for name, value in parse_yaml(dump_yaml(self.to_dict()), "a search").items():
            if not isinstance(before, dict) or before.get(name) != value:
                raise InputError(f"--out must be a new folder, or one of the same search, got {str(folder)!r}: "
                                 f"{file} has another {name}")  # fmt: skip
