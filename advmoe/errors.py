"""Whose fault an error is: the user's (`InputError`), the machine's, or a bug, which keeps its traceback."""

from __future__ import annotations

import errno
import os
import pickle
import sys
import traceback
from numbers import Integral, Real
from typing import SupportsFloat, TypeGuard


class InputError(ValueError):
    """Input that cannot be used. The message is one line that names the field, the rule and the value received."""


class OfNoUse(InputError):
    """A setting that the method, the kind of model or its router has no use for: others have."""


class OtherSettings(InputError):
    """These settings do not continue that unfinished work, which was begun with others."""


def lacking(what: str, extra: str, error: ImportError) -> InputError:
    """The error of `what` in an installation without an `extra`, whose import failed with `error`."""
    return InputError(f"{what} needs the extra {extra}: pip install 'advmoe[{extra}]', got: {error}")


def whole(number: object) -> bool:
    """Whether `number` is a whole one, of whatever type; a bool is none."""
    return isinstance(number, Integral) and not isinstance(number, bool)


def real(number: object) -> TypeGuard[SupportsFloat]:
    """Whether `number` is a real one, of whatever type; a bool is none."""
    return isinstance(number, Real) and not isinstance(number, bool)


def require_whole(name: str, number: object, least: int) -> None:
    """Raise `InputError` unless what is called `name` is a whole number of at least `least`."""
    if not whole(number) or number < least:  # type: ignore[operator]
        raise InputError(f"{name} must be a whole number >= {least}, got {number!r}")


def of_machine(error: BaseException) -> bool:
    """Whether the machine failed: no room on the disk or in memory, a file or permission that went, no descriptors."""
    if isinstance(error, OSError | MemoryError):
        return True
    torch = sys.modules.get("torch")  # which the command line's help does without
    if torch is None or not isinstance(error, RuntimeError):
        return False
    # On CPUs PyTorch has no type for it, but says what the system said.
    return isinstance(error, torch.OutOfMemoryError) or os.strerror(errno.ENOMEM) in str(error)


def reason(error: BaseException) -> str:
    """What went wrong, in one line: the file and why, where the system names one."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    if isinstance(error, OSError) and error.strerror is not None:
        return error.strerror
    return " ".join(str(error).split()) or ("out of memory" if isinstance(error, MemoryError) else type(error).__name__)


class BugElsewhere(RuntimeError):
    """A bug in another process, with its traceback there. `summary`: its type and text."""

    def __init__(self, summary: str, trace: str) -> None:
        super().__init__(summary, trace)
        self.summary, self.trace = summary, trace

    def __str__(self) -> str:
        return f"in a process of its own:\n{self.trace}"


def portable(error: Exception, *whole: type[Exception]) -> Exception:
    """`error` as another process can raise it: mistakes in the input, failures of the machine and errors of the types
    `whole` stay themselves; anything else is a bug, and becomes a `BugElsewhere` with its traceback.
    """
    if isinstance(error, (InputError, *whole)) or of_machine(error):
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # unpickling calls the class with its arguments, which some cannot take
            return InputError(str(error)) if isinstance(error, InputError) else OSError(str(error))
        return error
    summary = f"{type(error).__name__}: {error}"
    return BugElsewhere(summary, "".join(traceback.format_exception(error)))
