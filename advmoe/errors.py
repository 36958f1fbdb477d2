"""Whose fault an error is: the user's (a `ValueError` of ours), the machine's, or a bug, which keeps its traceback."""

from __future__ import annotations

import errno
import os
import pickle
import sys
import traceback


def is_ours(error: BaseException) -> bool:
    """Whether this package raised the error itself: a library's `ValueError` is a bug and keeps its traceback."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__")).split(".")[0] == "advmoe"


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


def portable(error: Exception, *whole: type[Exception]) -> Exception:
    """`error` as another process can raise it: itself where a line says all, as it does of those of the types `whole`;
    anything else is a bug, and becomes a `RuntimeError` that holds its traceback.
    """
    if isinstance(error, whole) or of_machine(error) or (isinstance(error, ValueError) and is_ours(error)):
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # one that cannot be made anew from its arguments
            return ValueError(str(error)) if isinstance(error, ValueError) else OSError(str(error))
        return error
    return RuntimeError("in a process of its own:\n" + "".join(traceback.format_exception(error)))
