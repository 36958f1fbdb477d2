"""Times of passes: by a stand-in clock, kept and used again; once by a real one."""

import json
import time
from dataclasses import replace

import pytest

from advmoe.config import Config
from advmoe.rundir import CALIBRATION
from advmoe.studies.estimate_times import REPEATS, buildable, calibrated
from advmoe.studies.estimate_work import Network, Shape

SHAPE = Shape(100, 100, 1, 8, 10)
HERE = {"threads": 1, "accelerator": "cpu"}


def network(**model):
    groups = {"model": {"name": "resnet18", "width": 4, **model}, "training": {"method": "at"}}
    return Network.of(Config.from_dict(groups), SHAPE)


class Clock:
    """Goes on by a second whenever it is looked at."""

    def __init__(self, seconds=1.0):
        self.now, self.seconds = 0.0, seconds

    def __call__(self):
        self.now += self.seconds
        return self.now


def test_each_pass_is_timed_by_the_image_and_kept(tmp_path):
    plain, routed = network(kind="dense"), network(kind="moe")
    times = calibrated(tmp_path, [plain, routed, plain], clock=Clock(0.001), **HERE)
    # From one look at the clock to the next, a batch of 16 passes.
    assert {kind: times[plain.key][kind] for kind in ("forward", "gradient", "train")} == pytest.approx(
        dict.fromkeys(("forward", "gradient", "train"), 0.001 / 16)
    )
    assert "soft" not in times[plain.key] and times[routed.key]["soft"] == pytest.approx(0.001 / 16)
    assert times[plain.key]["parameters"] > 1000

    never = Clock(float("nan"))
    assert calibrated(tmp_path, [plain], clock=never, **HERE) == times
    kept = json.loads((tmp_path / CALIBRATION).read_text())
    kept["here"]["torch"] = "0.1"
    (tmp_path / CALIBRATION).write_text(json.dumps(kept))
    anew = calibrated(tmp_path, [plain], clock=Clock(0.002), **HERE)
    assert set(anew) == {plain.key} and anew[plain.key]["forward"] == pytest.approx(0.002 / 16)


def test_once_the_minute_is_over_nothing_is_done_twice(tmp_path):
    slow, quick = Clock(100.0), Clock(0.001)
    calibrated(tmp_path / "slow", [network(kind="dense")], clock=slow, **HERE)
    calibrated(tmp_path / "quick", [network(kind="dense")], clock=quick, **HERE)
    looks = [round(clock.now / clock.seconds) for clock in (slow, quick)]
    # Each of 3 kinds: the begin, then a look before each repetition and two around it.
    assert looks == [1 + 3 * (1 + 2 + 1), 1 + 3 * (1 + 2 + 3 * REPEATS)]


def test_what_the_minute_is_too_short_for_follows_from_the_smallest(tmp_path, capsys):
    small, large = network(kind="dense"), replace(network(kind="dense"), size=16)
    photos, wide = replace(small, size=224), network(kind="dense", width=8)
    times = calibrated(tmp_path, [large, photos, wide, small], clock=Clock(100.0), **HERE)
    timed = times[wide.key]  # of the two smallest the one that came first
    for each, places in ((small, 1), (large, 4), (photos, 49)):  # 16 and 224 / 4 pixels a side, against 8
        weights = times[each.key]["parameters"] / timed["parameters"]
        for kind in ("forward", "gradient", "train"):
            assert times[each.key][kind] == pytest.approx(places * weights * timed[kind])
    assert "1 of 4 networks were timed" in capsys.readouterr().err


def test_a_network_that_cannot_be_is_told(tmp_path):
    assert buildable(network(kind="moe"))
    assert not buildable(network(kind="moe", num_experts=4, experts_init="shared"))


def test_a_real_clock_measures_what_passes_take(tmp_path):
    started = time.perf_counter()
    times = calibrated(tmp_path, [network(kind="dense")], **HERE)
    took = time.perf_counter() - started
    (found,) = times.values()
    assert all(0 < 16 * found[kind] < took for kind in ("forward", "gradient", "train"))
    assert found["forward"] < found["train"]
