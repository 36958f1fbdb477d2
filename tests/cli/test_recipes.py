"""`advmoe recipes`: every setting and every method, each with a line that says what it is."""

import re

from advmoe import cli
from advmoe.recipes import METHODS, SETTINGS, describe_method, describe_setting


def test_all_are_listed_with_what_they_are(capsys):
    assert cli.main(["recipes"]) == 0
    out = re.sub(r"\n {4,}", " ", capsys.readouterr().out)  # lines that go on
    lines = {line.split(maxsplit=1)[0]: line.split(maxsplit=1)[1] for line in out.splitlines() if line.startswith("  ")}
    described = {name: describe_setting(name) for name in SETTINGS} | {name: describe_method(name) for name in METHODS}
    assert lines == {name: text.strip() for name, text in described.items()}
    assert "as in cifar10-resnet18-advmoe" in out


def test_nothing_more_is_taken(capsys):
    assert cli.main(["recipes", "more"]) == 2
    assert "recipes must get no more than" in capsys.readouterr().err
