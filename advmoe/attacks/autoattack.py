"""AutoAttack by its authors' code (the package `pyautoattack`), behind this library's interface for attacks.

Axes: `N` batch, `C` channels, `H W` size, `K` classes. Pixels and `eps` are in [0, 1].
Source: Croce & Hein, ICML 2020 (AutoAttack, APGD); Croce & Hein, ICML 2020 (FAB); Andriushchenko et al., ECCV 2020
(Square). The package is imported when an attack is built or run, not before.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from advmoe.attacks.base import Attack, AttackPart, Proposals
from advmoe.attacks.pgd import Predict
from advmoe.errors import InputError, lacking
from advmoe.faults import label_fault, require_attackable
from advmoe.progress import BRIEF, counting
from advmoe.threat import ThreatModel

Version = Literal["standard", "plus", "rand", "custom"]
"""The official ensembles; `custom` runs attacks of one's choice, APGD and FAB with 5 restarts."""

ATTACKS = ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t")
"""Names that `custom` knows."""
_TARGETED = ("apgd-t", "fab-t")
_FEWEST_CLASSES = {"apgd-dlr": 3, "apgd-t": 4}
"""How many logits an attack's loss sorts; every other attack needs 2."""
_NORMS = {"linf": "Linf", "l2": "L2"}
_POINTER = " See flags_doc.md for details."


def autoattack(
    predict: Predict,
    x: Tensor,
    y: Tensor,
    *,
    threat: ThreatModel,
    seed: int,
    version: Version = "standard",
    attacks: Sequence[str] | None = None,
    num_classes: int | None = None,
) -> Proposals:
    """AutoAttack's proposals for a batch, as the official code makes them for these images as one batch.

    Where there are fewer classes K than the ensemble expects, it aims at K - 1 targets at most and leaves out attacks
    whose loss needs more logits. Flags say so, and repeat the official code's warnings. A module runs in eval mode with
    frozen parameters; its modes, the random state, the trace function and the logger are left as they were.

    Args:
        predict: (N, C, H, W) pixels, contiguous -> (N, K) logits. The official code overwrites logits in place.
        x: clean images, (N, C, H, W) in [0, 1], in any memory format. y: true classes, (N,).
        attacks: what `custom` runs, in this order (`ATTACKS`); for no other version.
        num_classes: K where it is known; otherwise one image is classified to learn it.

    Returns x itself where no attack succeeded. Raises `ValueError` for an unknown version or attack, unusable images,
    fewer than 2 classes, too few for any of the attacks, or a missing package.
    """
    library = official_library()
    _check_choice(version, attacks)
    dtype, x, y = _checked(x, y, threat)
    if len(x) == 0:
        return Proposals(x.to(dtype))
    with _contained(library, predict) as messages:
        counted = _CountedPasses(predict, dtype)
        official = _official(counted, x.device, threat, seed, version, attacks)
        classes = _count_classes(counted, x) if num_classes is None else num_classes
        notes = _fit(official, classes)
        _require_classes(y, classes)
        with counting("autoattack", _calls(official), unit="pass", delay=BRIEF) as counted.after_pass:
            x_adv, _ = official.run_standard_evaluation(x, y, batch_size=len(x))
    return Proposals(x_adv.to(dtype), (*notes, *_flags(messages)))


def square(predict: Predict, x: Tensor, y: Tensor, *, threat: ThreatModel, seed: int, queries: int) -> Proposals:
    """The Square attack's proposals, by the official code with AutoAttack's settings but for the number of `queries`.

    It needs no gradients. `predict`, `x` and `y` are as in `autoattack`. Returns x itself where it failed or where the
    clean image is misclassified. Raises `ValueError` for fewer than one query, unusable images, or a missing package.
    """
    library = official_library()
    if queries < 1:
        raise InputError(f"queries must be >= 1, got {queries!r}")
    dtype, x, y = _checked(x, y, threat)
    if len(x) == 0:
        return Proposals(x.to(dtype))
    with _contained(library, predict) as messages, torch.no_grad():
        counted = _CountedPasses(predict, dtype)
        _require_classes(y, _count_classes(counted, x))
        attack = library.square.SquareAttack(
            counted, norm=_NORMS[threat.norm], n_queries=queries, eps=threat.eps, p_init=0.8, n_restarts=1, seed=seed,
            verbose=False, device=x.device, resc_schedule=False,
        )  # fmt: skip
        with counting("square", queries, unit="query", delay=BRIEF) as counted.after_pass:
            x_adv = attack.perturb(x, y)
    return Proposals(x_adv.to(dtype), _flags(messages))


def square_part(predict: Predict, *, threat: ThreatModel, queries: int) -> AttackPart:
    """`square` on `predict` as a part of an attack."""
    return AttackPart("square", lambda x, y, seed: square(predict, x, y, threat=threat, seed=seed, queries=queries))


def autoattack_attack(
    predict: Predict,
    *,
    threat: ThreatModel,
    version: Version = "standard",
    attacks: Sequence[str] | None = None,
) -> Attack:
    """`autoattack` on `predict` as an attack of one part, `autoattack` or, but for the standard one,
    `autoattack-<version>`.

    Its settings hold the version, the package's version and the attacks by name. Raises `ValueError` for an unknown
    version or attack, or a missing package.
    """
    library = official_library()
    _check_choice(version, attacks)
    with _warnings_collected(library, []):
        ensemble = _official(predict, torch.device("cpu"), threat, 0, version, attacks)
    settings = {
        "version": version,
        "library": f"pyautoattack {library.__version__}",
        "attacks": list(ensemble.attacks_to_run),
    }

    def run(x: Tensor, y: Tensor, seed: int) -> Proposals:
        return autoattack(predict, x, y, threat=threat, seed=seed, version=version, attacks=attacks)

    name = "autoattack" if version == "standard" else f"autoattack-{version}"
    return Attack(name, (AttackPart(name, run),), settings)


# The official code, adapted


def official_library() -> Any:
    """The package. Raises `ValueError` where it is missing."""
    try:
        import pyautoattack
    except ImportError as error:
        raise lacking("autoattack", "autoattack", error) from error
    return pyautoattack


def _check_choice(version: str, attacks: Sequence[str] | None) -> None:
    if version not in get_args(Version):
        raise InputError(f"version must be one of {', '.join(get_args(Version))}, got {version!r}")
    if version != "custom":
        if attacks is not None:
            raise InputError(f"attacks must be left out unless version is custom, got {attacks!r} with {version!r}")
    elif not attacks or isinstance(attacks, str) or not set(attacks) <= set(ATTACKS):
        raise InputError(f"attacks must be names out of {', '.join(ATTACKS)} for version custom, got {attacks!r}")


def _checked(x: Tensor, y: Tensor, threat: ThreatModel) -> tuple[torch.dtype, Tensor, Tensor]:
    """The precision of `x`, and `x` and `y` as the official code takes them: it calls `view`, which a channels-last
    tensor refuses, and takes norms, whose squares underflow in half precision.
    """
    if not isinstance(x, Tensor) or len(x) > 0:
        require_attackable(x, y, threat)
    wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    return x.dtype, wide.contiguous(), y.to(x.device, torch.long)


def _require_classes(y: Tensor, classes: int) -> None:
    if (fault := label_fault(y, len(y), classes)) is not None:
        raise InputError(fault)


def _official(
    predict: Predict, device: torch.device, threat: ThreatModel, seed: int, version: str, attacks: Sequence[str] | None
) -> Any:
    """The official code's ensemble."""
    return official_library().AutoAttack(
        predict, norm=_NORMS[threat.norm], eps=threat.eps, seed=seed, version=version, device=device,
        attacks=None if attacks is None else list(attacks),
    )  # fmt: skip


@torch.no_grad()
def _count_classes(predict: Predict, x: Tensor) -> int:
    return predict(x[:1]).shape[1]


def _fit(official: Any, classes: int) -> list[str]:
    """Make the ensemble one that can run with so few `classes`; returns what that changed, a line each."""
    if classes < 2:
        raise InputError(f"num_classes must be >= 2, got {classes!r}")
    wanted, notes = list(official.attacks_to_run), []
    possible = [name for name in wanted if classes >= _FEWEST_CLASSES.get(name, 2)]
    if not possible:
        raise InputError(f"attacks must hold one that {classes} classes are enough for, got {', '.join(wanted)}")
    if left_out := [name for name in wanted if name not in possible]:
        needs = ", ".join(f"{name} (needs {_FEWEST_CLASSES[name]})" for name in left_out)
        notes.append(f"not {official.version} AutoAttack: {classes} classes are too few for {needs}")
    official.attacks_to_run = possible
    usual = official.fab.n_target_classes
    if classes - 1 < usual:
        official.fab.n_target_classes = official.apgd_targeted.n_target_classes = classes - 1
        if any(name in possible for name in _TARGETED):
            notes.append(
                f"not {official.version} AutoAttack: {classes} classes allow only {classes - 1} of {usual} targets"
            )
    return notes


@dataclass
class _CountedPasses:
    """A classifier that reports every pass, and takes images in the precision that it is attacked in."""

    predict: Predict
    dtype: torch.dtype
    after_pass: Callable[[], object] = lambda: None

    def __call__(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, K)."""
        logits = self.predict(x.to(self.dtype))
        self.after_pass()
        return logits.to(x.dtype)  # FAB writes them beside pixels, which are fp32 at least


def _calls(official: Any) -> int:
    """About how many passes the ensemble makes of a batch of which some image withstands all of it."""
    apgd, targeted, fab = official.apgd, official.apgd_targeted, official.fab
    untargeted = apgd.n_restarts * (apgd.n_iter * apgd.eot_iter + 2)
    each = {
        "apgd-ce": untargeted,
        "apgd-dlr": untargeted,
        "apgd-t": targeted.n_restarts * targeted.n_target_classes * (targeted.n_iter * targeted.eot_iter + 2),
        "fab": 2 * fab.n_restarts * fab.n_iter,
        "fab-t": 2 * fab.n_target_classes * fab.n_iter,  # which it starts once
        "square": official.square.n_restarts * official.square.n_queries,
    }
    return sum(each[name] for name in official.attacks_to_run)


# What it must not leave behind


@contextmanager
def _contained(library: Any, predict: Predict) -> Iterator[list[str]]:
    """Undoes what the official code changes in the process; yields the list that its warnings are put into."""
    messages: list[str] = []
    # It counts calls of autograd for as long as the process lives: one dynamic model would taint all later ones.
    library.checks.funcs.update(dict.fromkeys(library.checks.funcs, 0))
    trace = sys.gettrace()
    devices = list(range(torch.cuda.device_count()))
    try:
        with _frozen(predict), _warnings_collected(library, messages), torch.random.fork_rng(devices):
            yield messages
    finally:
        sys.settrace(trace)


@contextmanager
def _frozen(predict: Predict) -> Iterator[None]:
    """Eval mode without parameter gradients for a module, which FAB would add to; any other callable is left alone."""
    modules = list(predict.modules()) if isinstance(predict, nn.Module) else []
    parameters = list(predict.parameters()) if isinstance(predict, nn.Module) else []
    before = [module.training for module in modules], [parameter.requires_grad for parameter in parameters]
    try:
        for module in modules:
            module.training = False
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, mode in zip(modules, before[0], strict=True):
            module.training = mode
        for parameter, wanted in zip(parameters, before[1], strict=True):
            parameter.requires_grad_(wanted)


class _MessageList(logging.Handler):
    """Appends every log message to a list."""

    def __init__(self, messages: list[str]) -> None:
        super().__init__()
        self.messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        """Append one message."""
        self.messages.append(record.getMessage())


@contextmanager
def _warnings_collected(library: Any, messages: list[str]) -> Iterator[None]:
    """Warnings of the official code, logged or raised by `warnings`, go to `messages` and nowhere else."""
    logger = logging.getLogger("auto-attack")
    before = logger.level, logger.handlers, logger.propagate, logger.disabled
    package = str(Path(library.__file__).parent)
    try:
        logger.handlers, logger.propagate, logger.disabled = [_MessageList(messages)], False, False
        logger.setLevel(logging.WARNING)
        with warnings.catch_warnings():
            show = warnings.showwarning

            def collect(message: Warning | str, category: type[Warning], filename: str, *rest: Any) -> None:
                if filename.startswith(package):
                    messages.append(str(message))
                else:
                    show(message, category, filename, *rest)

            warnings.filterwarnings("always", module=library.__name__)
            warnings.showwarning = collect  # type: ignore[assignment]
            yield
    finally:
        level, logger.handlers, logger.propagate, logger.disabled = before
        logger.setLevel(level)


def _flags(messages: Sequence[str]) -> tuple[str, ...]:
    """One line for each message, repeated ones with their number."""
    counts = Counter(" ".join(text.split()).removesuffix(_POINTER) for text in messages)
    return tuple(text if count == 1 else f"{text} ({count} times)" for text, count in counts.items())
