"""CIFAR archives and their download from a server on this machine."""

import hashlib
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from layouts import CIFAR_IMAGES as COUNT
from layouts import cifar_archive, tarball
from layouts import cifar_members as members_of

from advmoe.data import load_dataset
from advmoe.data.cifar import ARCHIVES
from advmoe.data.download import TRIES, fetch


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replace an entry of the table by one for the given file."""

    def put(name: str, content: bytes, url: str = "http://127.0.0.1:9/none") -> None:
        monkeypatch.setitem(ARCHIVES, name, cifar_archive(name, content, url))

    return put


class Server:
    """A file server that can misbehave, and remembers the Range of every request."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.ranges: list[str | None] = []
        self.cut_after: list[int] = []
        """Bytes after which the first, second, ... answer stops."""
        self.honour_range = True
        self.shift = 0
        """Bytes by which a partial answer begins elsewhere than asked."""
        self.status: int | None = None
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked = self.headers.get("Range")
                server.ranges.append(asked)
                total, start = len(server.content), 0
                if server.status is not None:
                    return self.send_error(server.status)
                if asked and server.honour_range:
                    start = int(asked.removeprefix("bytes=").removesuffix("-")) + server.shift
                    if start >= total:
                        return self.send_error(416)
                    self.send_response(206)
                    self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
                else:
                    self.send_response(200)
                self.send_header("Content-Length", str(total - start))
                self.end_headers()
                end = start + server.cut_after.pop(0) if server.cut_after else total
                self.wfile.write(server.content[start:end])

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/file"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()


@pytest.fixture
def serve() -> Iterator[Callable[[bytes], Server]]:
    started: list[Server] = []

    def start(content: bytes) -> Server:
        started.append(Server(content))
        return started[-1]

    yield start
    for server in started:
        server.http.shutdown()
        server.http.server_close()


CONTENT = bytes(np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8))
MD5 = hashlib.md5(CONTENT).hexdigest()


def test_published_table() -> None:
    ten, hundred = ARCHIVES["cifar10"], ARCHIVES["cifar100"]
    assert (ten.md5, sum(ten.train.values()), sum(ten.test.values())) == (
        "c32a1d4ab5d03f1284b67883e8d87530",
        50_000,
        10_000,
    )
    assert (hundred.md5, sum(hundred.train.values()), sum(hundred.test.values())) == (
        "03b5dce01913d631647c71ecec9e9cb8",
        50_000,
        10_000,
    )


@pytest.mark.parametrize(("name", "label_bytes", "batches"), [("cifar10", 1, 5), ("cifar100", 2, 1)])
def test_records_are_read_where_they_are(
    tmp_path: Path, install: Callable[..., None], name: str, label_bytes: int, batches: int
) -> None:
    members = members_of(name)
    content = tarball(members)
    install(name, content)
    (tmp_path / ARCHIVES[name].file).write_bytes(content)
    data = load_dataset(name, root=tmp_path, val_fraction=0)
    assert data.train.images.shape == (COUNT * batches, 3, 32, 32)
    assert data.train.labels.tolist() == list(range(COUNT)) * batches
    assert data.classes[:2] == ("class0", "class1")
    assert data.num_classes == ARCHIVES[name].num_classes
    assert data.flip
    # Pixel (channel 1, row 2, column 3) of image 4 of the test member, counted by hand.
    test = members[next(iter(ARCHIVES[name].test))]
    assert int(data.test.images[4, 1, 2, 3]) == test[4 * (label_bytes + 3072) + label_bytes + 1024 + 2 * 32 + 3]
    # The last batch comes last.
    last = members[list(ARCHIVES[name].train)[-1]]
    assert int(data.train.images[-1, 2, 31, 31]) == last[-1]


def test_resized(tmp_path: Path, install: Callable[..., None]) -> None:
    content = tarball(members_of("cifar10"))
    install("cifar10", content)
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(content)
    data = load_dataset("cifar10", root=tmp_path, image_size=16)
    assert data.image_size == 16
    assert data.test.images.shape == (COUNT, 3, 16, 16)


def test_missing_archive(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        load_dataset("cifar10", root=tmp_path)
    rule = "data.root must hold cifar-10-binary.tar.gz (or set data.download=true)"
    assert str(error.value) == f"{rule}, got {str(tmp_path)!r}"


def test_wrong_checksum_of_a_given_archive(tmp_path: Path) -> None:
    path = tmp_path / "cifar-100-binary.tar.gz"
    path.write_bytes(b"not it")
    got = hashlib.md5(b"not it").hexdigest()
    with pytest.raises(ValueError) as error:
        load_dataset("cifar100", root=tmp_path)
    rule = "data.root must hold cifar-100-binary.tar.gz with md5 03b5dce01913d631647c71ecec9e9cb8"
    assert str(error.value) == f"{rule}, got md5 {got} in {str(path)!r}"
    assert path.exists()


def without(members: dict[str, bytes], name: str) -> dict[str, bytes]:
    return {key: value for key, value in members.items() if key != name}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (tarball(without(members_of("cifar10"), "data_batch_3.bin")), "with a member data_batch_3.bin, got none in"),
        (
            tarball(members_of("cifar10") | {"test_batch.bin": b"123"}),
            f"with {3073 * COUNT} bytes in test_batch.bin, got 3 in",
        ),
        (tarball(members_of("cifar10") | {"batches.meta.txt": b"a\nb\n"}), "with 10 class names, got 2 in"),
        (
            tarball(members_of("cifar10") | {"test_batch.bin": b"\x0b" * 3073 * COUNT}),
            "with labels below 10, got 11 in",
        ),
        (tarball(members_of("cifar10"))[:-5000], "a readable cifar-10-binary.tar.gz, got "),
        (b"no archive at all", "a readable cifar-10-binary.tar.gz, got ReadError"),
    ],
)
def test_wrong_contents_are_named(tmp_path: Path, install: Callable[..., None], content: bytes, message: str) -> None:
    install("cifar10", content)
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(content)
    with pytest.raises(ValueError, match=rf"^data.root must hold .*{re.escape(message)}") as error:
        load_dataset("cifar10", root=tmp_path)
    assert "\n" not in str(error.value)


def test_download_then_use_without_server(
    tmp_path: Path, install: Callable[..., None], serve: Callable[[bytes], Server]
) -> None:
    content = tarball(members_of("cifar10"))
    server = serve(content)
    install("cifar10", content, server.url)
    root = tmp_path / "new" / "data"
    first = load_dataset("cifar10", root=root, download=True, progress=True)
    assert [file.name for file in root.iterdir()] == ["cifar-10-binary.tar.gz"]
    again = load_dataset("cifar10", root=root, download=True)
    assert len(server.ranges) == 1
    assert torch.equal(first.train.images, again.train.images)


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
