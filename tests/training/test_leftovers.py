"""Runs killed before their first checkpoint, at everything that they do to files; and what is not theirs."""

import json
import os
import sys
from pathlib import Path

import pytest

from advmoe.config import Config
from advmoe.locks import CLAIM
from advmoe.training.leftovers import begun, clear, startable
from advmoe.training.run import resume, train
from advmoe.training.trainer import Trainer

MANIFEST = {"name": "run", "command": None, "devices": 1, "threads": 1, "finished": None}
HOW = {"accelerator": "cpu", "threads": 1}
TINY = Config.from_dict(
    {
        "model": {"name": "resnet18", "kind": "s-dense", "width": 4},
        "data": {"name": "digits", "image_size": 8, "train_examples": 64, "val_fraction": 0.0},
        "training": {"method": "standard", "epochs": 1, "batch_size": 64},
    }
)


@pytest.fixture
def left(tmp_path):
    """All that a training may leave before its first checkpoint."""
    run = tmp_path / "run"
    (run / "tensorboard").mkdir(parents=True)
    (run / "tensorboard" / "events.out.tfevents.epoch-000001").write_text("")
    (run / ".last.partial").mkdir()
    (run / ".last.partial" / "model.safetensors").write_text("half")
    for name in (".config.yaml.0a.partial", "config.yaml", CLAIM):
        (run / name).write_text("")
    (run / "metrics.jsonl").write_text('{"epoch": 1}\n')
    (run / "manifest.json").write_text(json.dumps(MANIFEST))
    return run


def test_what_a_killed_training_left_is_cleared_but_for_the_claim(left):
    assert startable(left) and begun(left)
    clear(left)
    assert [each.name for each in left.iterdir()] == [CLAIM]
    assert startable(left.parent / "new") and not begun(left.parent / "new")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("notes.txt", "mine"), (".hidden", ""), ("last", None), ("best", None), ("tensorboard/mine.txt", "mine"),
        ("metrics.jsonl", "{}\n{}\n"), ("manifest.json", json.dumps(MANIFEST | {"finished": "2026-01-01"})),
        ("manifest.json", "{"), ("manifest.json", '{"short_name": "an app"}'), ("evaluation.json", "{}"),
    ],
)  # fmt: skip
def test_what_is_not_a_leftover_stands_in_the_way(left, name, content):
    if content is None:
        (left / name).mkdir()
    else:
        (left / name).write_text(content)
    before = sorted(left.rglob("*"))
    assert not startable(left)
    with pytest.raises(ValueError, match="run_dir must be new, empty"):
        train(TINY, run_dir=left, **HOW)
    assert sorted(left.rglob("*")) == before


@pytest.mark.parametrize("name", ["config.yaml", "model.safetensors", "metrics.jsonl"])
def test_without_a_manifest_of_ours_a_file_is_the_user_s(tmp_path, name):
    (tmp_path / name).write_text("mine")
    assert not startable(tmp_path)


@pytest.mark.parametrize("name", ["manifest.json", "config.yaml", ".x.partial", "tensorboard"])
def test_a_link_is_nobody_s_leftover(left, tmp_path, name):
    target = left / name
    if target.exists():
        target.rename(tmp_path / "away")
    target.symlink_to(tmp_path / "away")
    assert not startable(left)


class Killed(BaseException):
    """The end of a process, in which nothing more is done to files."""


class Killer:
    """Ends this process, so far as its files under `folder` show it, at the `last`-th thing that is done to them."""

    def __init__(self):
        self.folder, self.last, self.done = None, 0, 0
        sys.addaudithook(self.hear)

    def hear(self, event, arguments):
        if self.folder is None or event not in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"):
            return
        path = arguments[0]
        if isinstance(path, str | os.PathLike) and os.fspath(path).startswith(self.folder):
            self.done += 1
            if self.done >= self.last:
                raise Killed


@pytest.fixture(scope="module")
def killer():
    return Killer()  # a hook stays


def killed_at(killer, run, number):
    """Whether a training in `run` was killed at its `number`-th deed."""
    killer.folder, killer.last, killer.done = str(run), number, 0
    try:
        train(TINY, run_dir=run, **HOW)
    except Killed:
        return True
    finally:
        killer.folder = None
    return False


@pytest.mark.slow
def test_wherever_a_training_is_killed_it_can_be_gone_on_with_or_started_anew(tmp_path, monkeypatch, killer):
    monkeypatch.setattr(Trainer, "train_epoch", lambda self, epoch, bar: None)
    resumed = anew = 0
    for number in range(1, 31):
        run = tmp_path / str(number)
        if not killed_at(killer, run, number):
            break
        before = {each: each.read_bytes() for each in run.rglob("*") if each.is_file()}
        try:
            resume(run)
            resumed += 1
        except ValueError as error:
            assert "start it anew" in str(error) or not any(run.rglob("*")), (number, error)
            assert {each: each.read_bytes() for each in run.rglob("*") if each.is_file()} == before
            train(TINY, run_dir=run, **HOW)
            anew += 1
        assert json.loads((run / "manifest.json").read_text())["finished"] is not None
        assert (run / "model.safetensors").is_file() and not list(run.glob(".*"))
    assert resumed > 10 and anew > 3


def test_no_checkpoint_is_needed_to_start_anew_whatever_was_there(tmp_path, monkeypatch, left):
    monkeypatch.setattr(Trainer, "train_epoch", lambda self, epoch, bar: None)
    (left / CLAIM).unlink()
    train(TINY, run_dir=left, **HOW)
    names = {each.name for each in Path(left).iterdir()}
    assert names == {"config.yaml", "manifest.json", "metrics.jsonl", "model.json", "model.safetensors", "best", "last"}
