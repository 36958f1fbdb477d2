"""Plugins: files that the user names and packages that register themselves; each is executed once, or is one line."""

import os
from pathlib import Path
from typing import Any

import pytest

from advmoe import cli
from advmoe.errors import InputError
from advmoe.tables import BACKBONES, plugins

pytestmark = pytest.mark.usefixtures("nothing_stays_registered")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (None, "must be a Python file"),
        ("raise ValueError('no')", "no"),
        ("import absent_package", "absent_package"),
        ("from advmoe import register_backbone\nregister_backbone('resnet18', width=8)(print)", "already"),
        ("x =", "SyntaxError"),
    ],
)
def test_a_plugin_that_fails_is_one_line(tmp_path: Path, capsys: Any, text: str | None, part: str) -> None:
    file = tmp_path / "mine.py"
    if text is not None:
        file.write_text(text)
    assert cli.main(["recipes", "--plugin", str(file)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "mine.py" in err and part in err
    assert os.environ[plugins.PLUGINS] == ""  # no process that is started next fails of it too


def test_two_files_of_one_name_are_two_plugins(tmp_path: Path) -> None:
    names = ("first-of-two", "second-of-two")
    for folder, name in zip("ab", names, strict=True):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(
            f"from advmoe import register_backbone\nregister_backbone({name!r}, width=8)(print)\n"
        )
        plugins.add_plugin(tmp_path / folder / "mine.py")
        plugins.add_plugin(tmp_path / folder / "mine.py")  # executed once
    assert all(BACKBONES.find(name).width == 8 for name in names)
    assert len(os.environ[plugins.PLUGINS].split(os.pathsep)) == 2


def test_what_failed_is_tried_again_once_it_is_mended(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("raise ValueError('no')")
    with pytest.raises(InputError, match="must run, got ValueError: no"):
        plugins.add_plugin(file)
    file.write_text("from advmoe import register_backbone\nregister_backbone('mended', width=8)(print)\n")
    plugins.add_plugin(file)
    assert BACKBONES.find("mended").width == 8


def test_what_the_environment_names_is_executed_when_a_name_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "other"):
        text = f"from advmoe import register_backbone\nregister_backbone('plugin-{name}', width=8)(print)\n"
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setenv(plugins.PLUGINS, os.pathsep.join(str(tmp_path / f"{name}.py") for name in ("one", "other")))
    BACKBONES.find("resnet18")
    assert "plugin-one" not in BACKBONES  # nothing was missing
    assert BACKBONES.find("plugin-one").width == 8 and "plugin-other" in BACKBONES
    assert BACKBONES.known().count("plugin-") == 2


def test_a_package_registers_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    class Point:
        name, value = "one", "package.module"

        def load(self) -> None:
            BACKBONES["from-a-package"] = BACKBONES["resnet18"]

    class Broken(Point):
        name, value = "two", "other.module"

        def load(self) -> None:
            raise ImportError("gone")

    points: list[Point] = [Point()]
    monkeypatch.setattr(plugins, "entry_points", lambda group: points)
    assert BACKBONES.find("from-a-package") is BACKBONES["resnet18"]
    points.append(Broken())
    with pytest.raises(InputError, match=r"the plugin two \(other\.module\) must load"):
        BACKBONES.find("what no table has")


def test_a_plugin_that_ends_the_process_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ends.py").write_text("import sys\nsys.exit(3)\n")
    monkeypatch.setenv(plugins.PLUGINS, str(tmp_path / "ends.py"))
    with pytest.raises(InputError, match=r"^the plugin '.*ends\.py' must run, got SystemExit: 3$"):
        plugins.discover()
