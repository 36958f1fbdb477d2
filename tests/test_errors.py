"""Whose fault an error is, and how it is told."""

import errno
import pickle

import numpy as np
import pytest
import torch

from advmoe.config import require
from advmoe.errors import BugElsewhere, InputError, of_machine, portable, reason, require_whole
from advmoe.training.trainer import TrainingDiverged


def caught(do):
    with pytest.raises(Exception) as found:
        do()
    return found.value


def mistake():
    require(False, "a", "b", "c")


def bug():
    int("a library's")


FULL = OSError(errno.ENOSPC, "No space left on device", "a/b")


def test_the_machine_is_to_blame_for_files_memory_and_descriptors_alone():
    def too_much():
        torch.empty(2**60)

    for error in (FULL, OSError(errno.EMFILE, "Too many open files"), MemoryError(), torch.OutOfMemoryError("CUDA")):
        assert of_machine(error)
    assert of_machine(caught(too_much))
    for error in (RuntimeError("a bug"), ValueError("a"), KeyError("a"), caught(mistake), TrainingDiverged("a")):
        assert not of_machine(error)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (FULL, "a/b: No space left on device"), (OSError(errno.EMFILE, "Too many open files"), "Too many open files"),
        (MemoryError(), "out of memory"), (RuntimeError("two\nlines"), "two lines"), (OSError("a"), "a"),
    ],
)  # fmt: skip
def test_the_reason_is_one_line(error, text):
    assert reason(error) == text


def test_what_a_line_tells_is_passed_on_and_a_bug_with_its_traceback():
    for error in (FULL, caught(mistake), TrainingDiverged("a"), MemoryError("b")):
        assert portable(error, TrainingDiverged) is error
    told = portable(caught(bug), TrainingDiverged)
    assert (
        isinstance(told, BugElsewhere)
        and "in bug" in str(told)
        and told.summary.startswith("ValueError: invalid literal")
    )
    assert str(pickle.loads(pickle.dumps(told))) == str(told)


@pytest.mark.parametrize("kind", [InputError, OSError])
def test_an_error_that_cannot_be_made_anew_is_told_as_the_kind_that_it_was(kind):
    class Odd(kind):
        def __init__(self, one, two):
            super().__init__(f"{one} {two}")

    told = portable(Odd("a", "b"))
    assert type(told) is kind and str(told) == "a b"


def test_whole_numbers_are_of_any_type():
    for number in (2, np.int64(2), np.uint8(3)):
        require_whole("n", number, 2)
    for wrong in (1, np.int64(1), 2.0, True, "2", None):
        with pytest.raises(InputError, match=r"^n must be a whole number >= 2, got "):
            require_whole("n", wrong, 2)
