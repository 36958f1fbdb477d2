"""`advmoe data`."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from advmoe import cli
from advmoe.data.cifar import ARCHIVES
from advmoe.tables import DATASETS


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for k, name in enumerate(("ant", "bee")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(5):
            Image.new("RGB", (50, 40), (i, 100 * k, 0)).save(tmp_path / "photos" / name / f"{i}.png")
    return tmp_path / "photos"


def test_every_data_set_is_listed_with_its_licence(capsys: Any) -> None:
    assert cli.main(["data", "list"]) == 0
    told = capsys.readouterr().out
    for name, each in DATASETS.items():
        assert all(part and part in told for part in (name, each.about, each.licence, each.origin))


def test_check_of_no_name_is_refused(photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(photos)
    assert cli.main(["data", "check", ""]) == 2
    assert capsys.readouterr().err.startswith("advmoe: error: data check must be 1 to ")


def test_check_ends_with_1_where_a_result_would_say_nothing(photos: Path, capsys: Any) -> None:
    assert cli.main(["data", "check", str(photos)]) == 0
    assert "ant" in capsys.readouterr().out
    assert cli.main(["data", "check", str(photos), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["counts"] == {"train": [4, 4], "test": [1, 1]} and told["image_size"] == 32
    (photos / "ant" / "0.png").write_bytes(b"")
    assert cli.main(["data", "check", str(photos)]) == 1
    assert "ant/0.png" in capsys.readouterr().out


def test_fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    fetched = []
    monkeypatch.setattr("advmoe.data.cifar.fetch", lambda *args: fetched.append(args))
    assert cli.main(["data", "fetch", "cifar100", "--root", str(tmp_path)]) == 0
    archive = ARCHIVES["cifar100"]
    assert fetched == [(archive.url, tmp_path / archive.file, archive.md5)]
    assert "--config cifar100-resnet18-advmoe" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["fetch", "imagenet"], ["cifar10, cifar100", "'imagenet'", "image-net.org"]),
        (["fetch", "cifar"], ["cifar10, cifar100", "'cifar'"]),
        (["fetch"], ["cifar10, cifar100", "nothing"]),
        (["chek", "x"], ["list, fetch, check, cifar10-jpeg", "'chek'", "did you mean check?"]),
        (["check"], ["a folder of pictures", "nothing"]),
        (["check", "absent"], ["data.root must be a folder", "'absent'"]),
        (["list", "cifar10"], ["no name", "'cifar10'"]),
        (["list", "--json"], ["--json must go with data check"]),
        (["cifar10-jpeg", "--root", "absent"], ["data.root must hold cifar-10-binary.tar.gz", "'absent'"]),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, args: list[str], parts: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["data", *args]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and all(part in err for part in parts), err
    assert list(tmp_path.iterdir()) == []
