"""Two processes and one path: by locks, and by claims where the file system has no locks."""

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from waiting import until

from advmoe.locks import CLAIM, busy, exclusive, hold

PROC = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes have no start time to be told by")


@pytest.fixture(params=[True, False], ids=["locks", "no locks"])
def locks(request, monkeypatch):
    if not request.param:
        without_locks(monkeypatch)
    return request.param


def without_locks(monkeypatch):
    def flock(descriptor, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)


def claim_of(path):
    return path / CLAIM if path.is_dir() else path.with_name(path.name + CLAIM)


@pytest.mark.parametrize("folder", [True, False])
def test_one_has_it_until_it_is_closed(tmp_path, locks, folder):
    path = tmp_path / "deep" / "a"
    first = hold(path, folder=folder)
    assert first is not None and hold(path, folder=folder) is None
    assert claim_of(path).exists() == (not locks)
    first.close()
    assert not claim_of(path).exists()
    second = hold(path, folder=folder)
    assert second is not None
    first.close()  # for a second time, which takes nothing from others
    assert hold(path, folder=folder) is None
    second.close()


def test_whoever_waits_gets_it_when_it_is_free(tmp_path, locks):
    order, first = [], hold(tmp_path / "a")

    def wait():
        with exclusive(tmp_path / "a"):
            order.append("second")

    thread = threading.Thread(target=wait)
    thread.start()
    order.append("first")
    first.close()
    thread.join(60)
    assert order == ["first", "second"] and not claim_of(tmp_path / "a").exists()


@PROC
def test_the_claim_of_a_killed_process_is_taken_over(tmp_path, monkeypatch):
    code = (
        "import errno, fcntl, os, signal, sys\nfrom pathlib import Path\nfrom advmoe.locks import hold\n"
        "def flock(*_):\n    raise OSError(errno.ENOSYS, '')\nfcntl.flock = flock\n"
        "print(hold(Path(sys.argv[1]), folder=True) is not None, flush=True)\ninput()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "True\n"
    assert hold(tmp_path / "run", folder=True) is None  # though this process could lock it
    without_locks(monkeypatch)
    assert hold(tmp_path / "run", folder=True) is None
    other.kill()
    other.communicate()
    mine = hold(tmp_path / "run", folder=True)
    assert json.loads((tmp_path / "run" / CLAIM).read_text())["process"] == os.getpid()
    mine.close()
    assert list((tmp_path / "run").iterdir()) == []


@PROC
@pytest.mark.parametrize("change", [{"started": "1"}, {"boot": "another"}, {"process": 2**22 + 1}, {"process": "x"}])
def test_the_claim_of_what_is_no_more_is_taken_over(tmp_path, monkeypatch, change):
    without_locks(monkeypatch)
    mine = hold(tmp_path, folder=True)
    claim = json.loads((tmp_path / CLAIM).read_text())
    (tmp_path / CLAIM).write_text(json.dumps(claim | change))
    again = hold(tmp_path, folder=True)
    assert again is not None and json.loads((tmp_path / CLAIM).read_text())["process"] == os.getpid()
    again.close()
    mine.close()


@pytest.mark.parametrize("change", [{"host": "elsewhere"}, {"space": "pid:[1]"}])
def test_the_claim_of_another_host_is_refused_with_what_to_delete(tmp_path, monkeypatch, locks, change):
    with monkeypatch.context() as patch:
        without_locks(patch)
        assert hold(tmp_path, folder=True)
    claim = json.loads((tmp_path / CLAIM).read_text()) | change
    (tmp_path / CLAIM).write_text(json.dumps(claim))
    with pytest.raises(ValueError) as caught:
        hold(tmp_path, folder=True)
    for part in (claim["host"], claim["since"], f"delete {tmp_path / CLAIM} if it is gone"):
        assert part in str(caught.value)
    assert json.loads((tmp_path / CLAIM).read_text()) == claim


@pytest.mark.parametrize(
    ("beat", "age", "gone"), [(30.0, 301, True), (30.0, 299, False), (None, 10**6, False), (60.0, 301, False)]
)
def test_the_claim_of_another_host_is_taken_over_when_its_heart_has_stopped(tmp_path, monkeypatch, beat, age, gone):
    without_locks(monkeypatch)
    assert hold(tmp_path, folder=True)
    claim = json.loads((tmp_path / CLAIM).read_text()) | {"host": "elsewhere", "beat": beat}
    (tmp_path / CLAIM).write_text(json.dumps(claim))
    then = (tmp_path / CLAIM).stat().st_mtime - age
    os.utime(tmp_path / CLAIM, (then, then))
    if gone:
        assert hold(tmp_path, folder=True)
        assert json.loads((tmp_path / CLAIM).read_text())["process"] == os.getpid()
    else:
        with pytest.raises(ValueError, match=r"process .* of host elsewhere since .*: delete .* if it is gone"):
            hold(tmp_path, folder=True)
    assert [path.name for path in tmp_path.iterdir()] == [CLAIM]


def test_a_claim_is_touched_as_long_as_it_is_held(tmp_path, monkeypatch):
    without_locks(monkeypatch)
    monkeypatch.setattr("advmoe.locks.BEAT", 0.01)
    before = set(threading.enumerate())
    mine = hold(tmp_path / "a")
    claim = claim_of(tmp_path / "a")
    for _ in range(2):
        os.utime(claim, (1, 1))
        until(lambda: claim.stat().st_mtime > 1)
    claim.rename(tmp_path / "aside")  # another's from now on
    claim.write_text("{}")
    os.utime(claim, (1, 1))
    until(lambda: set(threading.enumerate()) <= before)
    assert claim.stat().st_mtime == 1
    mine.close()


def test_busy_is_what_another_has(tmp_path, locks, monkeypatch):
    assert not busy(tmp_path / "a") and list(tmp_path.iterdir()) == []
    with exclusive(tmp_path / "a"):
        assert busy(tmp_path / "a")
    assert not busy(tmp_path / "a")
    without_locks(monkeypatch)
    claim = {"host": "elsewhere", "boot": None, "space": None, "process": 1, "started": "1", "since": "then"}
    claim_of(tmp_path / "a").write_text(json.dumps(claim))
    assert busy(tmp_path / "a")


@pytest.mark.parametrize("text", ["", "[]", "{}", "\udcff"])
def test_a_claim_that_says_nothing_is_refused(tmp_path, text):
    (tmp_path / CLAIM).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match="nobody can read: delete"):
        hold(tmp_path, folder=True)


def test_nothing_is_held_through_a_link(tmp_path, locks):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    for name, target in (("a", "folder"), ("b", "file"), ("c", "absent")):
        (tmp_path / name).symlink_to(target)
        for folder in (True, False):
            with pytest.raises(ValueError, match="must be no link"):
                hold(tmp_path / name, folder=folder)
    os.mkfifo(tmp_path / "fifo")
    for path, folder in (("file", True), ("folder", False), ("fifo", False), ("fifo", True)):
        with pytest.raises(ValueError, match=r"must be a (file|folder)"):
            hold(tmp_path / path, folder=folder)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a", "b", "c", "fifo", "file", "folder"]
    (tmp_path / "folder" / CLAIM).symlink_to(tmp_path / "file")
    with pytest.raises(ValueError, match="nobody can read"):
        hold(tmp_path / "folder", folder=True)
    assert (tmp_path / "file").read_text() == "mine"
