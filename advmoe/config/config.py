"""A run's settings as a whole: what its sections demand of one another, and how they are read, written and merged."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_type_hints

from advmoe.config.fields import FollowingStep, Pixels, Strict, check_types, require
from advmoe.config.network import ModelConfig
from advmoe.config.sections import AttackConfig, DataConfig, ThreatConfig, TrainingConfig
from advmoe.documents import MOST_YAML, dump_yaml, parse_yaml, read_text
from advmoe.errors import InputError, OfNoUse
from advmoe.files import write_text
from advmoe.tables import DATASETS, METHODS, ROUTERS
from advmoe.text import MOST_OF_A_VALUE, cut


@dataclass(kw_only=True)
class Config(Strict):
    """Everything that a run depends on."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    threat: ThreatConfig = field(default_factory=ThreatConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    attack: AttackConfig = field(default_factory=AttackConfig)

    def __post_init__(self) -> None:
        check_types(self)
        self._follow()
        # A network of the user's own may have MoE layers without being converted: that shows when it is made.
        routed = self.model.kind == "moe" or self.model.source is not None
        method, data = METHODS[self.training.method], DATASETS[self.data.name]
        if method.apart:
            require(routed, "model.kind", f"moe when training.method is {self.training.method}", self.model.kind)
        for name in ("balance", "margin", "runner_up"):
            if getattr(self.training, name) > 0:
                require(routed, "model.kind", f"moe when training.{name} is > 0", self.model.kind, OfNoUse)
                rule = f">= 2 when training.{name} is > 0"
                require(self.model.num_experts >= 2, "model.num_experts", rule, self.model.num_experts)
        if self.training.runner_up > 0:
            when = "when training.runner_up is > 0"
            require(self.model.route_per == "image", "model.route_per", f"image {when}", self.model.route_per)
            require(
                self.training.objective == "trades", "training.objective", f"trades {when}", self.training.objective
            )
        self._require_learnt(routed)
        for name in ("router_lr", "router_momentum", "router_weight_decay"):
            if getattr(self.training, name) is not None:
                require(routed, "model.kind", f"moe when training.{name} is given", self.model.kind, OfNoUse)
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

    def _require_learnt(self, routed: bool) -> None:
        """Refuse training for a router that has nothing to train, and a proved radius for one that has none."""
        name, router, training = self.model.router, ROUTERS[self.model.router], self.training
        if self.model.kind == "moe" and not router.learnt:
            rule = f"one that trains no routers alone, such as at, when model.router is {name} (nothing to train there)"
            apart = METHODS[training.method].routers_apart
            require(not apart, "training.method", rule, training.method)
            for weight in ("balance", "margin"):
                value = getattr(training, weight)
                require(value == 0, f"training.{weight}", f"0 when model.router is {name}", value, OfNoUse)
            for of_routers in ("router_lr", "router_momentum", "router_weight_decay"):
                value = getattr(training, of_routers)
                rule = f"left out when model.router is {name}"
                require(value is None, f"training.{of_routers}", rule, value, OfNoUse)
        if training.radius > 0:
            able = " or ".join(each for each, entry in ROUTERS.items() if entry.pixels and entry.learnt)
            rule = f"{able} when training.radius is > 0"
            require(routed and router.pixels and router.learnt, "model.router", rule, name, OfNoUse)

    def _follow(self) -> None:
        """Have steps that nobody has set follow the radius: 1.25 eps / K in training and eps / 4 in attacks, which are
        the paper's at its radii.
        """
        eps = self.threat.eps
        if isinstance(self.training.step_size, FollowingStep):
            step = FollowingStep.of(eps, 1.25 / self.training.attack_steps)
            self.training = replace(self.training, step_size=step)
        if isinstance(self.attack.step_size, FollowingStep):
            self.attack = replace(self.attack, step_size=FollowingStep.of(eps, 1 / 4))

    def checked(self) -> Config:
        """These settings, checked and converted as when they were made: fields may have been set since. Raises
        `ValueError`.
        """
        return Config(**{each.name: replace(getattr(self, each.name)) for each in dataclasses.fields(self)})

    def require_trainable(self) -> None:
        """Raise `ValueError` for what can be measured but not trained: attacks within a radius of nothing."""
        method = self.training.method
        rule = f">= 1e-06 when training.method is {method} (standard trains without attacks)"
        require(not METHODS[method].adversarial or self.threat.eps >= 1e-6, "threat.eps", rule, self.threat.eps)
        rule = "> 0 when training.radius is > 0 (its hinge is in units of threat.eps)"
        require(self.training.radius == 0 or self.threat.eps > 0, "threat.eps", rule, self.threat.eps)

    def idle(self) -> dict[str, str]:
        """The fields that change nothing about training, by their dotted names, and why."""
        model, t = self.model, self.training
        own, reasons = model.source is not None, dict[str, str]()

        def add(group: str, names: str, reason: str) -> None:
            reasons.update({f"{group}.{name}": reason for name in names.split()})

        if own and not model.to_moe:
            add("model", "num_experts router", "model.to_moe is false")
        elif not own and model.kind != "moe":
            reason = f"model.kind is {model.kind}"
            add("model", "num_experts router router_norm route_per experts experts_init", reason)
            add("model", "scale" if model.kind == "dense" else "", reason)
            add("training", "attack_routing compute", reason)
        elif model.kind == "moe" and model.num_experts == 1:
            add("training", "attack_routing", "model.num_experts is 1")
        if not METHODS[t.method].adversarial:
            add("training", "attack_steps step_size beta attack_routing", f"training.method is {t.method}")
        if t.objective == "pgd-at":
            add("training", "beta", f"training.objective is {t.objective}")
        if t.teacher is None:
            add("training", "distill_weight", "training.teacher is left out")
        else:
            add("training", "beta", "training.teacher is given")
        if t.warm and t.runner_up == 0 and not isinstance(t.step_size, FollowingStep):
            add("training", "attack_steps", f"training.alternation is {t.alternation}")
        if t.fixed_norms is None:
            add("training", "frozen_norms", f"training.method is {t.method}")
        if t.method == "sparse" and t.finetune_epochs == 0:
            add("training", "finetune_lr", "training.finetune_epochs is 0")
        if t.method == "sparse" and t.prune_epochs == 0:
            add("training", "frozen_norms", "training.prune_epochs is 0")
        if t.method == "at-experts" and model.router_norm != "batch":
            add("training", "frozen_norms", f"model.router_norm is {model.router_norm}")
        if t.method == "sparse" and t.init_from is not None:
            add("training", "epochs", "training.init_from is given, and is pruned at once")
        if self.data.val_fraction == 0:
            add("training", "val_attack_steps", "data.val_fraction is 0")
        if t.method != "sparse":
            add("training", "prune_epochs finetune_epochs", f"training.method is {t.method}")
        if t.router_objective != "codes":
            add("training", "codes alpha", f"training.router_objective is {t.router_objective}")
        if not DATASETS[self.data.name].streamed:
            add("data", "workers", f"data.name is {self.data.name}")
        return reasons

    def notes(self, names: Iterable[str]) -> list[str]:
        """What a user who set the fields `names` (dotted) may not expect of them, a line each."""
        idle, model = self.idle(), self.model
        lines = [f"{name} changes nothing: {idle[name]}" for name in names if name in idle]
        routed = model.kind == "moe" and model.source is None and model.num_experts > 1
        if routed and model.experts == "subset" and model.scale == 1:
            lines.append(f"model.scale 1 makes the {model.num_experts} experts of every layer the same")
        if self.training.lr < 1e-9:
            lines.append(f"training.lr {self.training.lr:g} changes no weight that fp32 would show")
        if self.training.optimizer == "adamw" and self.training.lr > 0.01:
            lines.append(f"training.lr {self.training.lr:g} is long for adamw, whose steps are of about that size")
        if METHODS[self.training.method].adversarial and not self.training.warm:
            lines += self._steps("training", self.training.attack_steps, self.training.step_size)
        return lines + self._steps("attack", self.attack.steps, self.attack.step_size)

    def _steps(self, group: str, steps: int, size: Pixels) -> list[str]:
        """What is odd about an attack's steps."""
        eps = self.threat.eps
        if size > eps > 0:
            return [f"{group}.step_size {size} is longer than the radius threat.eps {eps}"]
        if steps * size < eps * (1 - 1e-6):
            taken = f"{steps} steps of {group}.step_size {size} are" if steps > 1 else f"a {group}.step_size {size} is"
            return [f"{taken} shorter than the radius threat.eps {eps}"]
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
        sections = {}
        for group, fields in values.items():
            if group not in groups:
                raise unknown_field(str(group))
            fields = {} if fields is None else fields
            require(isinstance(fields, Mapping), group, "a group of fields", fields)
            known = get_type_hints(groups[group])
            for name in fields:
                if name not in known:
                    raise unknown_field(f"{group}.{name}")
            sections[group] = groups[group](**fields)
        return Config(**sections)

    def digest(self) -> str:
        """The SHA-256 of all fields but those that say where things lie, which change no result."""
        return _digest(self.to_dict())

    def to_yaml(self) -> str:
        """The text of `config.yaml`."""
        return dump_yaml(self.to_dict())

    def dump(self, path: str | os.PathLike[str]) -> None:
        """Write the configuration as YAML, whole or not at all."""
        write_text(Path(path), self.to_yaml())

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Config:
        """Read what `dump` wrote, be it of a version with fewer fields: the run was trained as these say nothing of. A
        file of fewer fields than any version had is read as a recipe.

        Raises `ValueError`, which names the file, or `FileNotFoundError`.
        """
        values = read_yaml(path)
        try:
            config = Config.from_dict(values)
            fields = values.get("training") or {}
            if fields.keys() >= {"method", "epochs", "batch_size", "lr", "seed"} and "frozen_norms" not in fields:
                config.training.frozen_norms = METHODS[config.training.method].earlier_norms  # type: ignore[assignment]
            return config
        except ValueError as error:
            raise InputError(f"{path}: {error}") from None


PLACES = (
    ("model", "source"), ("data", "root"), ("data", "download"), ("data", "workers"), ("training", "init_from"),
    ("training", "teacher"), ("training", "teacher_weights"),
)  # fmt: skip
"""Fields that say where things lie or how they are fetched."""


def _digest(groups: Mapping[str, Any]) -> str:
    told = {group: {n: v for n, v in fields.items() if (group, n) not in PLACES} for group, fields in groups.items()}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def file_digest(path: str | os.PathLike[str]) -> str:
    """`Config.digest` of what `dump` wrote, as it was when it did: without the fields of later versions."""
    return _digest({group: fields or {} for group, fields in read_yaml(path).items()})


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


def overlaid(settings: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A whole configuration's fields with others laid over them: steps that follow the radius go on to do so."""
    remaining = {group: dict(fields or {}) for group, fields in settings.items()}
    if "eps" in (overrides.get("threat") or {}):
        config = Config.from_dict(settings)
        for section, share in ((config.training, 1.25 / config.training.attack_steps), (config.attack, 1 / 4)):
            if section.step_size == FollowingStep.of(config.threat.eps, share):
                group = "training" if section is config.training else "attack"
                remaining.get(group, {}).pop("step_size", None)
    return merged(remaining, overrides)


def near_matches(name: str, names: Iterable[str]) -> list[str]:
    """Those of the dotted `names` that a misspelt or misplaced one may have meant, most often one."""
    group, _, leaf = name.rpartition(".")

    def likeness(known: str) -> float:
        there, _, other = known.rpartition(".")
        if other == leaf:  # the right name in a wrong group, or in none
            return 2.0
        # The group's letters would make any two of its fields alike.
        alike = difflib.SequenceMatcher(None, other, leaf).ratio()
        if not group or there != group:
            return alike
        return max(alike + 0.1, sorted(other) == sorted(leaf))  # letters that were swapped: of few most are others

    likenesses = {known: likeness(known) for known in names}
    best = max(likenesses.values(), default=0.0)
    return [known for known, alike in likenesses.items() if alike == best >= 0.7]


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
