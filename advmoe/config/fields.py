"""What a field of a configuration may hold: its type, its range, and the error of one line for anything else."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from advmoe.errors import InputError
from advmoe.tables import KINDS, METHODS, ROUTERS
from advmoe.text import MOST_OF_A_VALUE, cut, nearest, radius, show

RoutePer = Literal["image", "token"]
ExpertLayout = Literal["subset", "independent"]
ExpertInit = Literal["independent", "shared"]
Norm = Literal["linf", "l2"]
AttackRouting = Literal["straight-through", "soft", "mixed"]
RouterObjective = Literal["trades", "codes"]
Codes = Literal["mod", "random"]
Precision = Literal["32-true", "bf16-mixed"]
Compute = Literal["auto", "dispatch", "masked", "kernel"]
RouterNorm = Literal["batch", "layer", "none"]
Objective = Literal["trades", "pgd-at"]
Schedule = Literal["cosine", "one-cycle", "step"]
Optimizer = Literal["sgd", "adamw"]
Decay = Literal["all", "weights"]
AttackStart = Literal["noise", "uniform"]
AttackLoss = Literal["kl", "ce"]
FrozenNorms = Literal["refresh", "keep", "running"]

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


class FollowingStep(Pixels):
    """A step that nobody has set: within a `Config` it follows the radius."""

    @staticmethod
    def of(eps: Pixels, share: float) -> FollowingStep:
        """The step of `share` times `eps`, in its spelling; of no radius that of the paper's."""
        short = Pixels(radius(eps, "linf"))  # one value has one step, however it is written
        top, slash, bottom = (short if short == eps else eps).text.partition("/")
        step = FollowingStep(f"{share * float(top):.10g}{slash}{bottom}")
        return step if step > 0 else FollowingStep.of(Pixels("8/255"), share)

    def __reduce__(self) -> tuple[type[Pixels], tuple[str]]:
        return FollowingStep, (self.text,)


def require(ok: bool, name: str, rule: str, value: object, error: type[InputError] = InputError) -> None:
    """Raise the one-line `ValueError` that names field, rule and value unless `ok`."""
    if not ok:
        shown = cut(str(value), MOST_OF_A_VALUE) if isinstance(value, Pixels) else show(value)
        raise error(f"{name} must be {rule}, got {shown}")


def require_one_of(options: Sequence[str], name: str, value: object) -> None:
    """Raise the one-line `ValueError`, with the nearest of `options`, unless `value` is one of them."""
    if not isinstance(value, str) or value not in options:
        raise InputError(f"{name} must be one of {', '.join(options)}, got {show(value)}{nearest(value, options)}")


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
LearningRate = Annotated[float, Within(0, 1e30, open=True)]
WeightDecay = Annotated[float, Within(0, 10)]
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
Accelerator = Literal["auto", "cpu", "cuda"]
Hours = Annotated[float, Within(0, 100_000)]
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
        require_one_of(options, name, value)
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


def first_epochs(name: str, text: str | None, hint: Any) -> list[int]:
    """The numbers of type `hint` that `text` gives the first epochs, one each: `1:3,2` is 1, 1, 1, 2. Raises the
    `ValueError` that names the field for what is not written so.
    """
    numbers = list[int]()
    for part in [] if text is None else text.split(","):
        number, _, epochs = part.strip().partition(":")
        written = re.fullmatch(r"[0-9]{1,9}(:[0-9]{1,6})?", part.strip(), re.ASCII)
        ok = written is not None and (epochs == "" or 1 <= int(epochs) <= 100_000)
        require(ok, name, "numbers, or numbers and epochs such as 1:5, separated by commas", text)
        numbers += [typed(name, hint, int(number))] * int(epochs or 1)
    return numbers


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


def is_source(text: str) -> bool:
    """Whether `text` means a Python file and a name in it (`model.py:net`), not a run directory.

    A file with its name missing or misspelt is meant as one too, so that `load_classifier` can say what is wrong.
    """
    return re.fullmatch(r".*\.py(:[^/\\]*)?", text) is not None


class Strict:
    """A dataclass that takes no attribute but its fields: a slip in a name would change nothing."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a field. Raises `AttributeError` for what is none, with the nearest name."""
        names = [each.name for each in dataclasses.fields(self)]  # type: ignore[arg-type]
        if name not in names:
            raise AttributeError(f"{type(self).__name__} has no field {name!r}{nearest(name, names)}")
        super().__setattr__(name, value)


def check_types(config: Any, group: str = "") -> None:
    """Check and convert every field of a dataclass in place: Python callers get no other check."""
    for name, hint in get_type_hints(type(config), include_extras=True).items():
        setattr(config, name, typed(f"{group}.{name}" if group else name, hint, getattr(config, name)))
