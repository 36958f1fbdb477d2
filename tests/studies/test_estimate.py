"""A plan's time and disk, from made-up work and times."""

import pytest

from advmoe.studies import estimate
from advmoe.studies.estimate import Estimate, estimated, lines
from advmoe.studies.estimate_work import Network, Work, no_passes

NET = Network("{}", 1, 8, 10)


def work(name, kind="train", needs=(), alone=False, **passes):
    made = no_passes()
    made.update({(NET, of): number for of, number in passes.items()})
    found = Work(name, needs, kind, made, seconds=5.0, alone=alone)
    if kind == "train":
        found.weights[NET] += 8
    return found


@pytest.fixture
def times(monkeypatch):
    known = {NET.key: {"forward": 0.001, "gradient": 0.002, "train": 0.01, "parameters": 1e6}}
    monkeypatch.setattr(estimate, "calibrated", lambda *_, **__: known)


def test_time_is_passes_times_theirs_and_disk_is_weights(times, tmp_path):
    tasks = [work("a", train=1000, gradient=2000), work("b", "evaluate", ("a",), forward=5000)]
    of = estimated(tasks, tmp_path, threads=1, accelerator="cpu")
    assert of.seconds == pytest.approx({"a": 5 + 10 + 4, "b": 5 + 5})
    assert of.bytes == {"a": 32_000_000 + 100_000, "b": 100_000}
    assert of.by_kind() == {"train": (1, pytest.approx(19), 32_100_000), "evaluate": (1, pytest.approx(10), 100_000)}


def test_processes_share_what_does_not_wait_for_one_another():
    works = [work("a"), work("b"), work("c", needs=("a",)), work("d", "cost", needs=("a",), alone=True)]
    of = Estimate({"a": 4.0, "b": 6.0, "c": 3.0, "d": 10.0}, dict.fromkeys("abcd", 0), works)
    assert of.lasts(1) == 4 + 6 + 3 + 10
    assert of.lasts(2) == max(4 + 3, 6) + 10
    assert of.lasts(8) == 7 + 10  # c waits for a, and d is timed alone


def test_what_is_printed(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    works = [work(str(number)) for number in range(4)]
    of = Estimate({str(n): 3600.0 for n in range(4)}, {str(n): 2_000_000 for n in range(4)}, works)
    assert lines(of, jobs=4, threads=1, gpus=False) == [
        "       tasks       time  disk", "train      4  4 h 0 min  8 MB", "total      4  4 h 0 min  8 MB",
        "4 processes here, of which 2 have a core: about 2 h 0 min",
    ]  # fmt: skip
    assert lines(of, jobs=1, threads=1, gpus=True)[-2:] == [
        "on 1 GPU: about 4 h 0 min", "on 8 GPUs: about 60 min",
    ]  # fmt: skip
