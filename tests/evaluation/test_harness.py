"""What an interrupted evaluation left, where it is damaged; and processes that do not last as long as their work."""

import multiprocessing
import os
import time
from functools import partial

import pytest
import torch
from torch import nn

from advmoe.config import AttackConfig
from advmoe.evaluation.accuracy import Plan, assess
from advmoe.evaluation.harness import Journal, Task
from advmoe.threat import ThreatModel

TASK, RESULT = Task("pgd-4", 0), {"robust": [1, 0]}


@pytest.fixture
def left(tmp_path):
    """A place where one task is done."""
    journal = Journal(tmp_path / "left")
    journal.open({"seed": 0}, resume=False)
    journal.put(TASK, RESULT)
    return tmp_path / "left"


def test_what_is_sound_is_continued(left):
    journal = Journal(left)
    assert journal.open({"seed": 0}, resume=True) == {"fingerprint": {"seed": 0}}
    assert journal.get(TASK) == RESULT


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "must hold a JSON object, got a list"),
        ("{", "must be JSON, got"),
        ("{}", "must hold the settings that --resume continues (fingerprint), got None"),
    ],
)
def test_damaged_settings_are_named_and_left_alone(left, text, message):
    head = left / "evaluation.json"
    head.write_text(text)
    with pytest.raises(ValueError) as caught:
        Journal(left).open({"seed": 0}, resume=True)
    assert str(caught.value).startswith(f"{head} {message}")
    assert head.read_text() == text and (left / TASK.file).exists()


@pytest.mark.parametrize("text", ["[]", '{"robust": [1,'])
def test_a_damaged_result_is_of_a_task_yet_to_be_done(left, text):
    (left / TASK.file).write_text(text)
    journal = Journal(left)
    assert journal.get(TASK) is None
    journal.put(TASK, RESULT)
    assert Journal(left).get(TASK) == RESULT


class Net(nn.Module):
    """Tells two classes by brightness. In a process of its own it ends that process where `fatal`; in the first one it
    waits for another to have been made, and takes its time.
    """

    def __init__(self, made, fatal):
        super().__init__()
        self.made, self.fatal, self.elsewhere = made, fatal, multiprocessing.parent_process() is not None
        self.calls = 0

    def forward(self, x):
        if self.elsewhere and self.fatal:
            os._exit(7)
        self.calls += 1
        while self.calls > 1 and not (self.elsewhere or self.made.exists()):  # at the first one there is no other yet
            time.sleep(0.01)
        time.sleep(0 if self.elsewhere else 0.01)
        score = x.flatten(1).mean(1, keepdim=True) - 0.5
        return torch.cat([-score, score], 1)


def load(made, at, device):
    if multiprocessing.parent_process() is not None:
        made.touch()
        if at == "start":
            os._exit(7)
    return Net(made, fatal=at == "work")


def assessed(made, at, workers):
    x = torch.linspace(0, 1, 12).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).contiguous()
    return assess(
        partial(load, made, at), (x, (x[:, 0, 0, 0] > 0.5).long()), threat=ThreatModel("linf", 0.1),
        attack=AttackConfig(steps=2), attacks=["pgd-2"], batch_size=1, plan=Plan(workers=workers, threads=1),
    )  # fmt: skip


def test_a_process_that_dies_with_work_in_hand_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match=r"^a worker process died with exit code 7$"):
        assessed(tmp_path / "made", "work", 2)


def test_work_is_done_without_processes_that_never_began(tmp_path):
    found = assessed(tmp_path / "made", "start", 3)
    (tmp_path / "there").touch()
    alone = assessed(tmp_path / "there", "never", 1)
    assert found.result["robust_accuracy"] == alone.result["robust_accuracy"] and 0 < found.result["worst_case"] < 1
    for name, values in alone.examples.items():
        assert found.examples[name].tolist() == values.tolist()
