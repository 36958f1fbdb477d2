"""Processes that do calls: what they answer, and what becomes of those that fail or die."""

import multiprocessing
import os
import signal
from contextlib import closing, contextmanager

import pytest
import torch

from advmoe.errors import BugElsewhere, InputError
from advmoe.pool import Died, Place, Pool, Preempted, threads_set


@contextmanager
def doing(place, factor):
    """Multiplies; some orders are other things."""

    def work(order):
        if order == "mistake":
            raise InputError("order must be a number, got 'mistake'")
        if order == "stop":
            raise Preempted("stopped within epoch 1")
        if order == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if order == "place":
            return os.environ.get("CUDA_VISIBLE_DEVICES"), torch.get_num_threads(), place.device
        return factor * order

    yield work


@contextmanager
def refusing(place):
    raise InputError("nothing can be prepared")
    yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two workers that differ in all that a place says, and every kind of order, one after the other.

    What each said of its place, the other answers by their orders, how many workers were left, and the log. As starting
    is what takes time, a worker is started anew where one has died, and else not.
    """
    log = tmp_path_factory.mktemp("pool") / "log"
    places = [Place(1, "cuda:0", "7", log), Place(2, "cuda:1", "GPU-5a", log)]
    asked, orders, answers = ["place"] * 2, [1, 2, "mistake", {}, "die", "xx", "stop", 4], []
    expected = len(asked) + len(orders)
    with closing(Pool(doing, (3,), places)) as pool:
        while pool.start():
            pass
        assert len(pool) == 2 and not pool.idle and not pool.give(1)
        while len(answers) < expected:
            if len(answers) >= 2:  # both have said where they are
                while pool.start():
                    pass
                while orders and pool.give(orders[0]):
                    del orders[0]
            elif asked and pool.give(asked[0]):
                del asked[0]
            answers += [answer for answer in pool.answers(seconds=0.1) if answer.order is not None]
        left = len(pool)
    assert multiprocessing.active_children() == []
    by_order = {repr(answer.order): answer for answer in answers[2:]}
    return [answer.result for answer in answers[:2]], by_order, left, log


def test_what_they_answer_and_what_goes_wrong_in_between(run):
    _, by_order, left, _ = run
    assert left <= 2 and len(by_order) == 8
    assert {order: by_order[order].result for order in ("1", "2", "4")} == {"1": 3, "2": 6, "4": 12}
    assert by_order["'xx'"].result == "xxxxxx"
    mistake = by_order["'mistake'"].error
    assert isinstance(mistake, InputError) and "got 'mistake'" in str(mistake)
    stopped = by_order["'stop'"].error
    assert isinstance(stopped, Preempted) and str(stopped) == "stopped within epoch 1"
    died = by_order["'die'"].error
    assert isinstance(died, Died) and died.exit_code == -signal.SIGKILL and not died.at_start


def test_each_is_at_its_own_place(run):
    places, *_ = run
    # One may answer twice, before the other is ready.
    assert set(places) <= {("7", 1, "cuda:0"), ("GPU-5a", 2, "cuda:1")}


def test_a_bug_comes_with_its_traceback_into_the_log_too(run):
    _, by_order, _, log = run
    bug = by_order["{}"].error
    assert isinstance(bug, BugElsewhere) and bug.summary.startswith("TypeError: unsupported operand")
    assert "in work" in str(bug) and "TypeError" in log.read_text()
    assert log.stat().st_mode & 0o111 == 0  # no program


def test_what_cannot_be_prepared_is_told_without_an_order():
    with closing(Pool(refusing, (), [Place(1)])) as pool:
        pool.start()
        answers = []
        while len(pool):
            answers += pool.answers(seconds=0.1)
        assert not pool.idle
    (told,) = answers  # once, and not again as its process ends
    assert told.order is None and isinstance(told.error, InputError)


def test_threads_are_set_inside_alone():
    before = torch.get_num_threads()
    with pytest.raises(ValueError, match="so"), threads_set(before + 1):
        assert torch.get_num_threads() == before + 1
        raise ValueError("so")
    assert torch.get_num_threads() == before
