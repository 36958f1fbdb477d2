from pathlib import Path

import pytest

from advmoe import cli
from advmoe.config import Config
from advmoe.errors import InputError
from advmoe.files import read_object, require_writable, write_text

LINUX = pytest.mark.skipif(not Path("/proc").is_dir(), reason="there is no /proc")


def content(folder):
    return sorted(map(str, folder.rglob("*")))


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with a file, a run that was only begun, and a link that leads nowhere."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "run").mkdir()
    Config().dump(tmp_path / "run" / "config.yaml")
    (tmp_path / "nowhere").symlink_to("absent")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("place", [".", "run", "run/deep/er", "new"])
def test_a_folder_that_can_be_written_is_left_as_it_is(workplace, place):
    before = content(workplace)
    require_writable("out", Path(place))
    assert content(workplace) == before


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("file", "file: Not a directory"),
        ("file/x", "file: Not a directory"),
        ("nowhere/x", "nowhere: No such file or directory"),
        pytest.param("/proc/x/y", "/proc: No such file or directory", marks=LINUX),
    ],
)
def test_a_folder_that_cannot_be_written_is_named(workplace, place, reason):
    with pytest.raises(ValueError) as caught:
        require_writable("out", Path(place))
    assert str(caught.value) == f"out must be where files can be written, got {place!r} ({reason})"


COMMANDS = [
    ["train", "--config", "digits-advmoe", "--accelerator", "cpu", "--run-dir", "file/x"],
    ["evaluate", "run", "--out", "file"],
    ["sweep-eps", "run", "--eps", "0,0.1", "--out", "file/x"],
    ["dissect", "run", "--out", "file"],
    ["pathways", "run", "--out", "file/x"],
    ["cost", "resnet18", "--out", "file/x.json"],
    ["report", "run", "--no-gallery", "-o", "file/x.html"],
    ["study", "fig2", "--out", "file/x"],
]


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: f"{words[0]} {words[-1]}")
def test_every_command_refuses_a_place_that_it_cannot_write_before_it_starts(workplace, capsys, words):
    before = content(workplace)
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and " must be where files can be written, got " in err
    assert content(workplace) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [("[]", "must hold a JSON object, got a list"), ("", "must be JSON, got: Expecting value"), ("{", "must be JSON")],
)
def test_a_file_that_holds_no_object_is_named(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError) as caught:
        read_object(tmp_path / "a.json")
    assert str(caught.value).startswith(f"{tmp_path / 'a.json'} {message}")


def test_text_is_written_in_utf_8_whole_or_not_at_all(tmp_path):
    file = tmp_path / "a.txt"
    write_text(file, "größer")
    assert file.read_bytes() == "größer".encode()
    with pytest.raises(UnicodeEncodeError):
        write_text(file, "half \udc80")
    assert [(each.name, each.read_bytes()) for each in tmp_path.iterdir()] == [("a.txt", "größer".encode())]


def test_a_folder_is_not_written_over(tmp_path):
    (tmp_path / "result.json").mkdir()
    with pytest.raises(InputError, match=r"result\.json must be a file, got a folder"):
        write_text(tmp_path / "result.json", "{}")
    assert [each.name for each in tmp_path.iterdir()] == ["result.json"]


def test_a_configuration_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "config.yaml"
    Config().dump(file)
    before = file.read_bytes()

    def killed(path):
        raise KeyboardInterrupt

    monkeypatch.setattr("advmoe.files.sync", killed)
    with pytest.raises(KeyboardInterrupt):
        Config.from_dict({"training": {"epochs": 7}}).dump(file)
    assert [(each.name, each.read_bytes()) for each in tmp_path.iterdir()] == [("config.yaml", before)]
