"""Processes that do calls: what they answer, and what becomes of those that fail or die."""

import multiprocessing
import os
import signal
from contextlib import closing, contextmanager

import pytest
import torch

from advmoe.errors import BugElsewhere, InputError
from advmoe.pool import Died, Place, Pool, threads_set


@contextmanager
def doing(place, factor):
    """Multiplies; some orders are other things."""

    def work(order):
        if order == "mistake":
            raise InputError("order must be a number, got 'mistake'")
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


def answered(pool, orders):
    """The answers to `orders`, in the order they came, by workers that are started anew where they died."""
    orders, answers = list(orders), []
    expected = len(orders)
    while len(answers) < expected:
        while pool.start():
            pass
        while orders and pool.give(orders[0]):
            del orders[0]
        answers += [answer for answer in pool.answers(seconds=0.1) if answer.order is not None]
    return answers


def test_what_they_answer_and_what_goes_wrong_in_between():
    with closing(Pool(doing, (3,), [Place(threads=1), Place(threads=1)])) as pool:
        assert not pool.idle and not pool.give(1)
        by_order = {answer.order: answer for answer in answered(pool, [1, 2, "mistake", "die", "xx", 4])}
        assert len(pool) <= 2
    assert {order: by_order[order].result for order in (1, 2, 4)} == {1: 3, 2: 6, 4: 12}
    assert by_order["xx"].result == "xxxxxx"
    assert isinstance(by_order["mistake"].error, InputError) and "got 'mistake'" in str(by_order["mistake"].error)
    died = by_order["die"].error
    assert isinstance(died, Died) and died.exit_code == -signal.SIGKILL and not died.at_start
    assert multiprocessing.active_children() == []


def test_each_is_at_its_own_place():
    places = [Place(1, "cuda:0", only_card="7"), Place(2, "cuda:1", only_card="GPU-5a")]
    with closing(Pool(doing, (1,), places)) as pool:
        assert pool.start() and pool.start() and not pool.start()
        seen = []
        orders = 0
        while len(seen) < 2:
            orders += orders < 2 and pool.give("place")
            seen += [answer.result for answer in pool.answers(seconds=0.1)]
    assert set(seen) <= {("7", 1, "cuda:0"), ("GPU-5a", 2, "cuda:1")}


def test_a_bug_comes_with_its_traceback_into_the_log_too(tmp_path):
    log = tmp_path / "log"
    with closing(Pool(doing, (None,), [Place(1, log=log)])) as pool:
        (answer,) = answered(pool, [2])
    assert isinstance(answer.error, BugElsewhere) and answer.error.summary.startswith("TypeError: unsupported operand")
    assert "in work" in str(answer.error) and "TypeError" in log.read_text()
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
