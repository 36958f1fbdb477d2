"""CIFAR archives: their records, what can be wrong with one, and a download that is used again."""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from layouts import CIFAR_IMAGES as COUNT
from layouts import cifar_archive, tarball
from layouts import cifar_members as members_of
from serving import Server

from advmoe.data import load_dataset
from advmoe.data.cifar import ARCHIVES


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replace an entry of the table by one for the given file."""

    def put(name: str, content: bytes, url: str = "http://127.0.0.1:9/none") -> None:
        monkeypatch.setitem(ARCHIVES, name, cifar_archive(name, content, url))

    return put


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
