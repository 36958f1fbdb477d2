"""An epoch and a finished run, as they are told."""

from typing import Any

from advmoe.training.lines import epoch_line, summary, terms_line

LINE: dict[str, Any] = {
    "epoch": 3,
    "train": {
        "routers": {"ce": 1.04, "kl": 0.214, "accuracy": 0.5},
        "experts": {"ce": 1.012, "kl": 0.031, "accuracy": 0.5288},
    },
    "val": {"clean_accuracy": 0.583, "robust_accuracy": 0.3891},
    "layers": [{"load": [0.6, 0.4], "dead_experts": []}, {"load": [0.0, 0.64, 0.36], "dead_experts": [0]}],
    "seconds": 63.2,
}


def test_an_epoch_of_advmoe() -> None:
    assert epoch_line(LINE, epochs=7, best=True, left=250.0) == (
        "epoch 3/7  routers kl 0.21  experts ce 1.01 kl 0.03 acc 52.9%  val 58.3 / robust 38.9 (best)"
        "  load 0.62 (1 dead)  63.2 s  left 4 min"
    )


def test_experts_stand_last_whichever_level_began() -> None:
    turned = LINE | {"train": dict(reversed(LINE["train"].items()))}
    assert epoch_line(turned, epochs=7, best=True, left=250.0) == epoch_line(LINE, epochs=7, best=True, left=250.0)


def test_an_epoch_of_a_plain_network_without_validation() -> None:
    line = LINE | {"train": {"all": {"ce": 0.5, "accuracy": 1.0}}, "val": None, "layers": [], "phase": "pretrain"}
    assert epoch_line(line, epochs=3, best=True, left=None) == "epoch 3/3  pretrain  all ce 0.50 acc 100.0%  63.2 s"


def test_the_end() -> None:
    progress = {"best": {"epoch": 5, "val": LINE["val"]}, "wall_seconds": 250.0}
    best, time = summary(progress, epochs=7, steps=10).splitlines()
    assert best == "best  epoch 5 of 7: clean 58.3 %, robust 38.9 % under PGD-10 (validation)"
    assert time == "time  4 min"
    assert summary({"best": {"epoch": 7, "val": None}, "wall_seconds": 3.0}, epochs=7, steps=10) == "time  3 s"


def test_the_terms_of_a_step() -> None:
    assert terms_line({"ce": 1.23456, "kl": 0.012}) == "ce 1.23 kl 0.012"
