"""The loop that gives an engine its tasks: what comes after what, what is tried again, and what is skipped."""

from collections import defaultdict
from dataclasses import dataclass

import pytest

from advmoe.engines.schedule import Bug, MachineFailed, Skipped, failure, run
from advmoe.errors import BugElsewhere, InputError
from advmoe.pool import Answer, Died, Preempted


@dataclass(frozen=True)
class Named:
    id: str
    needs: tuple[str, ...] = ()


class Scripted:
    """An engine for tasks one at a time: each ends as it is told to, and then well."""

    given = "queued"

    def __init__(self, endings, retries=2):
        self.endings, self.retries = defaultdict(list, {name: list(each) for name, each in endings.items()}), retries
        self.order, self.asked = None, []

    def ready(self, number):
        self.asked.append(number)

    def give(self, order):
        if self.order is not None:
            return False
        self.order = order
        return True

    def answers(self, seconds):
        order, self.order = self.order, None
        left = self.endings[order.id]
        yield Answer(order, error=left.pop(0) if left else None, seconds=7.0)


def heard(engine, *tasks, errors=None):
    lines = []
    errors = {} if errors is None else errors
    run({task.id: task for task in tasks}, errors, engine, lambda word, task, seconds: lines.append((task.id, word)))
    return lines, errors


def test_each_comes_after_what_it_needs_and_in_the_order_given():
    lines, errors = heard(Scripted({}), Named("c", ("a",)), Named("b"), Named("a"))
    assert errors == {}
    assert lines == [(name, word) for name in ("b", "a", "c") for word in ("queued", "done")]


def test_one_whose_process_died_is_tried_again_as_often_as_the_engine_allows(capsys):
    lines, errors = heard(Scripted({"a": [Died(-9)] * 2}), Named("a"))
    assert lines == [("a", "queued")] * 3 + [("a", "done")] and errors == {}
    assert capsys.readouterr().err == "note  a: its process died (exit code -9); tried again\n" * 2
    lines, errors = heard(Scripted({"a": [Died(-9)] * 3}), Named("a"), Named("b", ("a",)))
    assert lines[:3] == [("a", "queued")] * 3 and isinstance(errors["a"], MachineFailed)
    assert errors["a"] == "its process died (exit code -9)"
    assert errors["b"] == "skipped, as what it needs failed: its process died (exit code -9)"
    assert isinstance(errors["b"], Skipped) and lines[4:] == [("b", errors["b"])]


def test_one_that_was_preempted_is_tried_again_whatever_the_engine_allows():
    lines, errors = heard(Scripted({"a": [Preempted("stopped by SIGTERM")] * 9}, retries=0), Named("a"))
    assert lines == [("a", "queued")] * 10 + [("a", "done")] and errors == {}


def test_an_error_is_final_and_one_of_before_is_not_tried():
    mistake = InputError("x must be 1, got 2")
    lines, errors = heard(Scripted({"a": [mistake]}), Named("a"), Named("b", ("z",)), errors={"z": "old"})
    assert lines == [
        ("b", "skipped, as what it needs failed: old"), ("a", "queued"), ("a", "x must be 1, got 2"),
    ]  # fmt: skip
    assert errors == {"z": "old", "a": "x must be 1, got 2", "b": "skipped, as what it needs failed: old"}


@pytest.mark.parametrize(
    ("error", "text", "kind"),
    [
        (InputError("x must be 1"), "x must be 1", str),
        (OSError("no disk"), "OSError: no disk", MachineFailed),
        (Died(7), "its process died (exit code 7)", MachineFailed),
        (BugElsewhere("KeyError: 'a'", "a trace"), "KeyError: 'a'", Bug),
        (KeyError("a"), "KeyError: 'a'", Bug),
    ],
)
def test_whose_fault_it_is(error, text, kind):
    assert failure(error) == text and type(failure(error)) is kind
    assert failure(None) is None
