"""What an interrupted evaluation left, where it is damaged; and processes that do not last as long as their work."""

import errno
import multiprocessing
import os
import signal
import time
from contextlib import suppress
from functools import partial

import pytest
import torch
from torch import nn

from advmoe.config import AttackConfig
from advmoe.errors import BugElsewhere
from advmoe.evaluation.accuracy import Execution, assess
from advmoe.evaluation.harness import BatchTask, Journal
from advmoe.evaluation.outcomes import Measurement
from advmoe.threat import ThreatModel

TASK, RESULT = BatchTask("pgd-4", 0), {"robust": [1, 0]}


@pytest.fixture
def left(tmp_path):
    """A place where one task is done."""
    journal = Journal(tmp_path / "left")
    journal.open({"seed": 0}, resume=False)
    journal.put(TASK, RESULT)
    journal.close()
    return tmp_path / "left"


def test_what_is_sound_is_continued(left):
    journal = Journal(left)
    assert journal.open({"seed": 0}, resume=True) == {"fingerprint": {"seed": 0}}
    assert journal.get(TASK) == RESULT


def test_what_another_process_is_at_is_left_alone(left):
    other = Journal(left)
    assert other.open({"seed": 0}, resume=True)
    for again in (True, False):
        with pytest.raises(ValueError, match=r"out must be free of other evaluations, got .*: one is at work there"):
            Journal(left).open({"seed": 1}, resume=again)
    Journal(left).remove()
    assert (left / TASK.file).exists()
    other.close()
    anew = Journal(left)
    assert anew.open({"seed": 1}, resume=False) is None and anew.get(TASK) is None
    anew.remove()
    assert not left.exists()


@pytest.mark.parametrize("resume", [True, False])
def test_a_folder_in_place_of_a_result_is_named_and_left_alone(left, resume):
    (left / TASK.file).unlink()
    (left / TASK.file).mkdir()
    with pytest.raises(ValueError, match=rf"{TASK.file} must be a file, got a folder"):
        Journal(left).open({"seed": 0}, resume=resume)
    assert (left / TASK.file).is_dir() and (left / "evaluation.json").exists()


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


def once(mark):
    """Whether this is the first process to ask for `mark`, which is there for one."""
    with suppress(FileNotFoundError):
        mark.unlink()
        return True
    return False


class Net(nn.Module):
    """Tells two classes by brightness, but in a process of its own, when it is attacked, it does as `marks` say by the
    name of a file. The first process waits at its first attack until another has begun one.
    """

    def __init__(self, marks):
        super().__init__()
        self.marks, self.elsewhere = marks, multiprocessing.parent_process() is not None

    def wants(self, what):
        return (self.marks / what).exists()

    def act(self):
        (self.marks / "begun").touch()
        if self.wants("exit-0"):
            os._exit(0)
        if self.wants("exit-7"):
            os._exit(7)
        if once(self.marks / "first-killed"):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.wants("error"):
            raise EOFError("of the model's own")

    def forward(self, x):
        if x.requires_grad and len(x) == 1:  # not a check, which takes all
            if self.elsewhere:
                self.act()
            while not (self.elsewhere or self.wants("begun") or self.wants("alone")):
                time.sleep(0.01)
            if not self.elsewhere and self.wants("interrupt"):
                while not list(self.marks.glob("journal/pgd-2.*")):  # what the other one has found
                    time.sleep(0.01)
                raise KeyboardInterrupt
        score = x.flatten(1).mean(1, keepdim=True) - 0.5
        return torch.cat([-score, score], 1)


def load(marks, device):
    if multiprocessing.parent_process() is not None and (marks / "at-start").exists():
        (marks / "begun").touch()  # the first one need not wait for it
        os._exit(7)
    return Net(marks)


def assessed(marks, what, workers=2):
    marks.mkdir()
    (marks / what).touch()
    x = torch.linspace(0, 1, 12).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).contiguous()
    attack = AttackConfig(steps=2)
    return assess(
        partial(load, marks),
        (x, (x[:, 0, 0, 0] > 0.5).long()),
        Measurement(threat=ThreatModel("linf", 0.1), attack=attack, attacks=["pgd-2"], batch_size=1),
        execution=Execution(workers=workers, threads=1, journal=marks / "journal"),
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return assessed(tmp_path_factory.mktemp("alone") / "marks", "alone", workers=1)


@pytest.mark.parametrize(
    ("what", "workers", "code"),
    [("exit-0", 2, None), ("exit-7", 2, 7), ("first-killed", 3, -9), ("at-start", 2, None)],
)
def test_what_a_process_did_not_finish_is_done_again(tmp_path, alone, capsys, what, workers, code):
    evaluation = assessed(tmp_path / "marks", what, workers)
    assert evaluation.result["robust_accuracy"] == alone.result["robust_accuracy"]
    assert 0 < evaluation.result["worst_case"] < 1
    for name, values in alone.examples.items():
        assert evaluation.examples[name].tolist() == values.tolist()
    said = f"note  a worker process died (exit code {code}): what it had not finished is done again\n"
    assert capsys.readouterr().err == ("" if code is None else said)


def test_an_error_in_a_process_is_raised(tmp_path):
    with pytest.raises(BugElsewhere, match=r"EOFError: of the model.s own"):
        assessed(tmp_path / "marks", "error")


def test_what_others_found_is_kept_when_this_process_is_interrupted(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        assessed(tmp_path / "marks", "interrupt")
    assert list((tmp_path / "marks" / "journal").glob("pgd-2.*.json"))


def test_a_journal_is_one_process_s_where_there_are_no_locks_too(left, monkeypatch):
    def flock(descriptor, how):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr("fcntl.flock", flock)
    one = Journal(left)
    assert one.open({"seed": 1}, resume=False) is None  # which keeps nothing of what was there, but for the claim
    with pytest.raises(ValueError, match="out must be free of other evaluations"):
        Journal(left).open({"seed": 1}, resume=True)
    one.put(TASK, RESULT)
    one.close()
    again = Journal(left)
    assert again.open({"seed": 1}, resume=True) and again.get(TASK) == RESULT
    again.remove()
    assert list(left.parent.iterdir()) == []
