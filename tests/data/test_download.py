"""A file fetched once, whole, by one process at a time. How a server may fail is tried in test_cifar.py."""

import hashlib
import threading
from pathlib import Path

import pytest

from advmoe.data.download import fetch, file_md5
from advmoe.locks import hold

CONTENT = bytes(range(256)) * 20
MD5 = hashlib.md5(CONTENT).hexdigest()


@pytest.fixture
def url(tmp_path: Path) -> str:
    source = tmp_path / "source"
    source.write_bytes(CONTENT)
    return source.as_uri()


def test_a_checksum_by_hand(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert file_md5(tmp_path / "a") == "900150983cd24fb0d6963f7d28e17f72"  # of RFC 1321


def test_a_file_arrives_whole_and_nothing_else_stays(url: str, tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file"
    fetch(url, path, MD5)
    assert path.read_bytes() == CONTENT and [each.name for each in path.parent.iterdir()] == ["file"]


def test_what_is_there_with_the_right_checksum_is_not_fetched_again(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(CONTENT)
    fetch("http://127.0.0.1:9/nobody", tmp_path / "file", MD5)
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_what_is_there_with_another_is_replaced(url: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"other")
    fetch(url, tmp_path / "file", MD5)
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_a_second_process_waits_for_what_the_first_one_brings(tmp_path: Path) -> None:
    path, lock = tmp_path / "file", hold(tmp_path / ".file.lock")
    assert lock is not None
    waiting = threading.Thread(target=fetch, args=("http://127.0.0.1:9/nobody", path, MD5))
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    path.write_bytes(CONTENT)
    lock.close()
    waiting.join(60)
    assert not waiting.is_alive() and path.read_bytes() == CONTENT
