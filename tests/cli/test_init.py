"""`advmoe init`: a recipe as a file to edit."""

from pathlib import Path
from typing import Any

import pytest

from advmoe import cli
from advmoe.cli.init import commented
from advmoe.config import Config, field_names, read_yaml
from advmoe.recipes import recipe, recipe_names


@pytest.mark.parametrize(
    "name", ["folder-advmoe", "digits-at-sparse", "imagenet-deit-tiny-advmoe", "cifar10-resnet18-at-dense"]
)
def test_the_file_is_the_recipe(name: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(commented(name))
    assert Config.from_dict(read_yaml(path)) == Config.from_dict(recipe(name))
    # Its own fields alone are set: others follow the package's defaults, whatever these become.
    assert {f"{group}.{key}" for group, values in read_yaml(path).items() for key in values or {}} == {
        f"{group}.{key}" for group, values in recipe(name).items() for key in values
    }


def test_every_field_stands_there_with_its_meaning() -> None:
    lines = commented("folder-advmoe").splitlines()
    for field in field_names():
        key = field.split(".")[1]
        [place] = [i for i, line in enumerate(lines) if line.lstrip(" #").startswith(f"{key}: ")][:1]
        assert lines[place - 1].startswith("  # ")
    assert max(map(len, lines)) <= 120


def test_without_the_marks_it_is_the_same_configuration() -> None:
    # What stands behind a mark is what holds anyway.
    for name in recipe_names()[::17]:
        whole = Config.from_dict(recipe(name)).to_dict()
        lines = commented(name).splitlines()
        assert all(
            any(line.removeprefix("  ").removeprefix("# ").startswith(f"{key}: ") for line in lines)
            for fields in whole.values()
            for key in fields
        )


def test_it_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["init", "mine.yaml", "--recipe", "digits-advmoe"]) == 0
    assert "advmoe train --config mine.yaml" in capsys.readouterr().out
    assert cli.main(["train", "--config", "mine.yaml", "--print_config"]) == 0
    for args, part in (
        (["mine.yaml"], "not there yet"),
        (["other.txt"], "ends in .yaml"),
        (["absent/other.yaml"], "a directory that exists"),
        (["other.yaml", "--recipe", "digit-advmoe"], "did you mean digits-advmoe?"),
    ):
        capsys.readouterr()
        assert cli.main(["init", *args]) == 2
        err = capsys.readouterr().err
        assert part in err and err.count("\n") == 1
    assert [each.name for each in tmp_path.iterdir()] == ["mine.yaml"]
