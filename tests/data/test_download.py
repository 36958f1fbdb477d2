"""A file fetched once, whole, by one process at a time, from servers that fail in every way."""

import hashlib
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from serving import Server

from advmoe.data.download import TRIES, fetch, file_md5
from advmoe.locks import hold

CONTENT = bytes(np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8))
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


def test_a_cut_answer_is_resumed(tmp_path: Path, serve: Callable[[bytes], Server]) -> None:
    server = serve(CONTENT)
    server.cut_after = [2000, 1500]
    fetch(server.url, tmp_path / "file", MD5)
    assert server.ranges == [None, "bytes=2000-", "bytes=3500-"]
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert not (tmp_path / "file.part").exists()


def test_a_part_left_by_an_earlier_call_is_resumed(tmp_path: Path, serve: Callable[[bytes], Server]) -> None:
    server = serve(CONTENT)
    server.cut_after = [100] * TRIES
    with pytest.raises(ValueError, match=rf"^data.download must reach the end of {server.url}, got 400 bytes"):
        fetch(server.url, tmp_path / "file", MD5)
    assert not (tmp_path / "file").exists()
    assert (tmp_path / "file.part").read_bytes() == CONTENT[:400]
    fetch(server.url, tmp_path / "file", MD5)
    assert server.ranges[-1] == "bytes=400-"
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_a_server_that_ignores_range(tmp_path: Path, serve: Callable[[bytes], Server]) -> None:
    server = serve(CONTENT)
    server.honour_range = False
    (tmp_path / "file.part").write_bytes(CONTENT[:1234])
    fetch(server.url, tmp_path / "file", MD5)
    assert server.ranges == ["bytes=1234-"]
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_a_server_that_answers_with_another_range(tmp_path: Path, serve: Callable[[bytes], Server]) -> None:
    server = serve(CONTENT)
    server.shift = 7
    (tmp_path / "file.part").write_bytes(CONTENT[:1234])
    fetch(server.url, tmp_path / "file", MD5)
    assert server.ranges == ["bytes=1234-", None]
    assert (tmp_path / "file").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("part", "requests"),
    [(CONTENT, 1), (CONTENT + b"more", 2), (b"x" * len(CONTENT), 2)],
    ids=["whole", "too-long", "other"],
)
def test_a_server_that_answers_416(
    tmp_path: Path, serve: Callable[[bytes], Server], part: bytes, requests: int
) -> None:
    server = serve(CONTENT)
    (tmp_path / "file.part").write_bytes(part)
    fetch(server.url, tmp_path / "file", MD5)
    assert len(server.ranges) == requests
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_a_wrong_checksum_is_named_and_forgotten(tmp_path: Path, serve: Callable[[bytes], Server]) -> None:
    server = serve(CONTENT)
    (tmp_path / "file.part").write_bytes(b"bad" * 100)
    joined = hashlib.md5(b"bad" * 100 + CONTENT[300:]).hexdigest()
    with pytest.raises(ValueError) as error:
        fetch(server.url, tmp_path / "file", MD5)
    rule = f"data.download must fetch file with md5 {MD5}"
    assert str(error.value) == f"{rule}, got md5 {joined} from {server.url} (removed)"
    assert list(tmp_path.iterdir()) == []
    fetch(server.url, tmp_path / "file", MD5)
    assert server.ranges == ["bytes=300-", None]


def test_errors_of_the_server_are_named(tmp_path: Path, serve: Callable[[bytes], Server]) -> None:
    server = serve(CONTENT)
    server.status = 404
    with pytest.raises(ValueError, match=rf"^data.download must find {server.url}, got HTTPError: HTTP Error 404"):
        fetch(server.url, tmp_path / "file", MD5)
    assert len(server.ranges) == 1
    server.status = 503
    with pytest.raises(ValueError, match=r"got 0 bytes \(kept\), then HTTPError: HTTP Error 503"):
        fetch(server.url, tmp_path / "file", MD5)
    assert len(server.ranges) == 1 + TRIES


def test_no_server_and_no_folder(tmp_path: Path, serve: Callable[[bytes], Server]) -> None:
    server = serve(CONTENT)
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(ValueError, match=r"^data.download must reach the end of .* then URLError"):
        fetch(server.url, tmp_path / "file", MD5)
    (tmp_path / "plain").write_bytes(b"")
    with pytest.raises(ValueError, match=r"^data.root must be a folder to download to, got "):
        fetch(server.url, tmp_path / "plain" / "file", MD5)
