"""What is measured, opened once: a run or a user's own classifier, the images that measure it, and how to attack it.

Axes: `N` examples, `B` batch, `C` channels, `H W` size.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from advmoe.attacks.pgd import Predict
from advmoe.config import Config, file_digest, is_source, overlaid
from advmoe.data import Dataset, Images, load_dataset
from advmoe.errors import InputError
from advmoe.evaluation.accuracy import Execution, checked, placed, positive
from advmoe.evaluation.harness import Job, Load
from advmoe.evaluation.outcomes import Measurement, make_job
from advmoe.evaluation.scoring import measuring, stream
from advmoe.evaluation.suite import build
from advmoe.evaluation.targets import home_of
from advmoe.files import require_writable
from advmoe.models import Classifier
from advmoe.models.runs import load_run
from advmoe.models.sources import load_classifier
from advmoe.models.state import digest
from advmoe.progress import tell, tracked
from advmoe.pruning import deployed
from advmoe.rundir import CONFIG, DIGEST, config_note, diverged_note, require_plain, require_same_images
from advmoe.seeding import generator_for, seed_for
from advmoe.text import split_words
from advmoe.threat import ThreatModel


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a run, or a user's own classifier, is measured: what all measurements take."""

    weights: str | None = None
    """A `.safetensors` file, for a user's own classifier."""
    source: str | None = None
    """`FILE.py:FACTORY` of the network, where a run trained one of the user's own: see `load_run`."""
    out: str | Path | None = None
    """Where results go; by default the run, or `evaluations/<file>-<factory>`."""
    attacks: Sequence[str] | str | None = None
    """Names as in `suite`, in a list or separated by commas; None: the measurement's usual ones."""
    overrides: Mapping[str, Mapping[str, Any]] | None = None
    """Fields that replace those of the run's `config.yaml` (of the defaults, for a user's classifier)."""
    num_examples: int | None = None
    """A random subset of the test images, by `seed`; None: all."""
    batch_size: int = 250
    """Images attacked at once."""
    accelerator: str = "auto"
    """`auto`, `cpu`, `cuda`, or one device such as `cuda:1`."""
    threads: int | None = None
    """CPU threads of each process; None: PyTorch's number."""
    seed: int | None = None
    """Of the images drawn and the attacks' random draws; None: the run's."""
    allow: Collection[str] = ()
    """Checks that may fail: see `checks`."""
    eot: int | None = None
    """Draws that attacks and scores of a randomised model average over, by `evaluate` and `sweep-eps` alone."""

    def __post_init__(self) -> None:
        if isinstance(self.attacks, str):
            object.__setattr__(self, "attacks", split_words(self.attacks))


def options_of(options: Options | None, keywords: Mapping[str, Any], **usual: Any) -> Options:
    """`options`, or the `usual` ones, with `keywords` in place of theirs."""
    return Options(**{**usual, **keywords}) if options is None else replace(options, **keywords)


@dataclass(frozen=True)
class _ClassifierLoader:
    """Makes the classifier of a run or a source; each process calls it once."""

    target: str
    weights: str | None
    source: str | None
    digest: str | None = None
    """What the classifier's must be: a run may be trained on, and a factory draw other weights, meanwhile."""

    def __call__(self, device: torch.device) -> Predict:
        """The classifier on `device`; of a sparse model the compacted form, which costs less. Raises `ValueError`."""
        predict = load_classifier(self.target, self.weights) if is_source(self.target) else self._run()
        if self.digest is not None and (loaded := digest_of(predict)) != self.digest:
            rule = f"make the same weights every time it is loaded (SHA-256 {self.digest[:16]})"
            raise InputError(f"{self.target} must {rule}, got {str(loaded)[:16]}: it changed meanwhile")
        return placed(predict, device)

    def _run(self) -> Classifier:
        return deployed(load_run(self.target, self.source))


def digest_of(predict: Predict) -> str | None:
    """The digest by which results name their model: of a loaded model that in its weights file, of another module its
    own; None for any other callable.
    """
    if isinstance(predict, Classifier) and predict.origin is not None:
        return predict.origin.digest
    return digest(predict) if isinstance(predict, nn.Module) else None


@dataclass(frozen=True)
class Subject:
    """A classifier to be measured, with the images that measure it."""

    target: str
    options: Options
    load: Load
    data: Images
    index: Tensor
    """The position of each image in the test set, (N,)."""
    config: Config
    home: Path
    """Where results are written."""
    seed: int
    data_name: str
    classes: tuple[str, ...]
    """Names of the classes."""
    digest: str | None
    """Of the model; None of a callable that is no module."""
    notes: tuple[str, ...]
    """Which images of the data set were left out, by which rule."""

    @property
    def described(self) -> dict[str, Any]:
        """What every result says of its model and data."""
        left_out = {"notes": list(self.notes)} if self.notes else {}
        return {DIGEST: self.digest, "data": {"name": self.data_name, "split": "test", **left_out}}

    @property
    def threat(self) -> ThreatModel:
        """Of the configuration."""
        return ThreatModel(self.config.threat.norm, float(self.config.threat.eps))

    @property
    def device(self) -> torch.device:
        """The first device to compute on."""
        return Execution(accelerator=self.options.accelerator).devices()[0]

    def measurement(self, usual: Sequence[str] | None = None) -> Measurement:
        """The attacks that the options name, else the `usual` ones, in batches and by the seed of the options."""
        options = self.options
        return Measurement(
            threat=self.threat, attack=self.config.attack, batch_size=options.batch_size, seed=self.seed,
            attacks=usual if options.attacks is None else options.attacks, eot=options.eot,
        )  # fmt: skip

    def under_attack(self, usual: Sequence[str] | None = None) -> UnderAttack:
        """The classifier on its device, to be attacked as the options name it, else in the `usual` ways."""
        predict = self.load(self.device)
        job, names = make_job(predict, self.data, self.measurement(usual), self.device)
        return UnderAttack(self.device, predict, job, names)

    def routed_under_pgd(self, purpose: str) -> UnderAttack:
        """As `under_attack`, by default by PGD as configured.

        Raises `InputError` for a model without MoE layers, and for another attack than PGD.
        """
        attacked = self.under_attack(["pgd"])
        if not attacked.job.setting.routed:
            raise InputError(f"a model to {purpose} must have MoE layers, got {self.target!r} without")
        require_pgd(purpose, attacked.names)
        return attacked


@dataclass(frozen=True)
class UnderAttack:
    """A classifier on its device, and the job of attacking it."""

    device: torch.device
    predict: Predict
    job: Job
    names: tuple[str, ...]
    """The attacks' full names."""

    def check(self, allow: Collection[str], names: Sequence[str] | None = None) -> None:
        """Make the checks that precede an attack.

        Raises `InputError` where one fails that is not in `allow`, or where an attack of `names` (all) cannot be made.
        """
        checked(self.predict, self.job, self.device, allow, self.names if names is None else names)

    def images(self, name: str) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Batches of all images under the PGD called `name`: pixels (B, C, H, W), adversarial pixels, and classes (B,).

        Images that are wrong without an attack are attacked too.
        """
        predict, job, device = self.predict, self.job, self.device
        if job.setting.eot is not None:
            raise InputError(f"eot must be left out but by evaluate and sweep, got {job.setting.eot!r}")
        (part,) = build(name, predict, job.setting, None).parts
        tasks = list(job.tasks([name]))
        with closing(stream(job.data, [job.examples(task) for task in tasks], device)) as images:
            for task, (x, y) in zip(tracked(tasks, name), images, strict=True):
                with measuring(predict, device):
                    x_adv = part.run(x, y, seed_for(job.seed, task.first, name, part.name)).x_adv
                yield x, job.setting.threat.project(x_adv, x), y


def require_pgd(purpose: str, names: Sequence[str], *, single: bool = False) -> None:
    """Raise `InputError` for attacks that are not PGD's, and with `single` for more than one."""
    for name in names:
        if not name.startswith("pgd-"):
            raise InputError(f"attacks to {purpose} must be PGD's, got {name!r}")
    if single and len(names) != 1:
        raise InputError(f"attacks to {purpose} must be a single one, got {', '.join(names)}")


def _dataset(config: Config, model: Predict) -> Dataset:
    """The images of a configuration. Pictures in a folder that have not the model's size get it, as in `predict`,
    unless the configuration names another.
    """
    load = partial(
        load_dataset, config.data.name, root=config.data.root, download=config.data.download,
        val_fraction=config.data.val_fraction, workers=config.data.workers, seed=config.training.seed,
    )  # fmt: skip
    data = load(image_size=config.data.image_size)
    size = model.spec["input_size"] if isinstance(model, Classifier) else None
    if config.data.image_size is None and config.data.name == "folder" and size not in (None, data.test.shape[-1]):
        return load(image_size=size)
    return data


def open_subject(
    target: str | Path, options: Options | None = None, *, writes: bool = True, **keywords: Any
) -> Subject:
    """Open a run directory, or a user's own `FILE.py:FACTORY`, with the images that the options name.

    Args:
        keywords: `Options` by name, in place of `options` or of theirs.
        writes: whether results will be written, so that the options' `out` must be writable.

    Raises `InputError` for a run, model, data or setting that cannot be used.
    """
    options, target = options_of(options, keywords), str(target)
    if options.num_examples is not None:
        positive("num_examples", options.num_examples)
    load, home = _loader(target, options), home_of(target, options.out)
    if writes:
        require_writable("out", home)
    config = _config(target, options)
    model = load(torch.device("cpu"))  # what cannot be loaded shows before the data are read
    data = _dataset(config, model)
    shape = data.num_classes, data.in_channels
    expected = (model.spec["num_classes"], model.spec["in_channels"]) if isinstance(model, Classifier) else shape
    if any(wanted not in (None, got) for wanted, got in zip(expected, shape, strict=True)):
        raise InputError(f"data must have the model's (classes, channels) {expected}, got {shape}")
    if isinstance(model, Classifier) and (names := tuple(model.spec.get("classes", data.classes))) != data.classes:
        ours, theirs = next(pair for pair in zip(names, data.classes, strict=True) if pair[0] != pair[1])
        raise InputError(f"data must have the model's classes in their order, got {theirs!r} for {ours!r}")
    if not is_source(target) and "root" not in (options.overrides or {}).get("data", {}):
        require_same_images(Path(target), data.drawn_from)
    seed = config.training.seed if options.seed is None else options.seed
    index = sampled(len(data.test), options.num_examples, seed)
    load = replace(load, digest=digest_of(model))
    return Subject(
        target=target, options=options, load=load, data=data.test.subset(index), index=index, config=config, home=home,
        seed=seed, data_name=data.name, classes=data.classes, digest=load.digest, notes=data.notes,
    )  # fmt: skip


def _loader(target: str, options: Options) -> _ClassifierLoader:
    own = is_source(target)
    if not own:
        require_plain(Path(target))
    if not own and options.weights is not None:
        raise InputError(f"weights must go with FILE.py:FACTORY (a run has its own), got {options.weights!r}")
    if own and options.source is not None:
        raise InputError(f"--model must go with a run (FILE.py:FACTORY is one itself), got {options.source!r}")
    return _ClassifierLoader(target, options.weights, options.source)


def _config(target: str, options: Options) -> Config:
    """The configuration of a run, or the usual one, with the options' fields."""
    settings = Config().to_dict() if is_source(target) else _settings(Path(target))
    return Config.from_dict(overlaid(settings, options.overrides or {}))


def sampled(images: int, number: int | None, seed: int) -> Tensor:
    """The positions of `number` of so many `images`, in their order."""
    if number is None or number >= images:
        return torch.arange(images)
    return torch.randperm(images, generator=generator_for(seed, "examples"))[:number].sort().values


def _settings(run: Path) -> dict[str, dict[str, Any]]:
    """The fields of a run's configuration; says where it is not what the run began with, or where training diverged."""
    config = Config.load(run / CONFIG)
    for note in (config_note(run, file_digest(run / CONFIG)), diverged_note(run)):
        if note is not None:
            tell(f"note  {note}")
    return config.to_dict()
