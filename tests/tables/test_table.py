"""Tables: how an entry is found, and what is refused."""

import subprocess
import sys
from typing import Any

import pytest

from advmoe.config import Config, DataConfig, TrainingConfig
from advmoe.errors import InputError
from advmoe.tables import DATASETS, METHODS, DataSet, Family, Level, Method, Table


def numbers():
    return Table(
        "size", {"small": 1, "large": 9}, Family("at-N", lambda name: int(name[3:]) if name[:3] == "at-" else None)
    )


def test_an_entry_is_found_by_its_name_or_by_its_family():
    assert [numbers().find(name) for name in ("small", "large", "at-5")] == [1, 9, 5]
    assert list(numbers()) == ["small", "large"]


@pytest.mark.parametrize("name", ["huge", "", None, ["small"]])
def test_what_there_is_not_is_refused_with_what_there_is(name):
    with pytest.raises(InputError, match="size must be one of small, large, at-N, got "):
        numbers().find(name)
    with pytest.raises(InputError, match=r"model\.size must be one of"):
        numbers().require("model.size", name)


def test_a_name_is_given_once():
    table = numbers()
    table.add("medium", 4)
    assert table.find("medium") == 4
    for name in ("medium", "at-7"):
        with pytest.raises(InputError, match=f"size has '{name}' already"):
            table.add(name, 5)


def test_the_tables_and_the_configuration_import_no_torch():
    code = "import sys; from advmoe.config import Config; Config(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_new_entry_is_a_choice_of_its_field(monkeypatch):
    monkeypatch.setitem(DATASETS, "mine", DataSet(lambda request: None, "Mine", streamed=True))
    monkeypatch.setitem(METHODS, "experts-only", Method((Level("experts"),), "Experts", "the experts alone"))
    assert DataConfig(name="mine").name == "mine"
    assert TrainingConfig(method="experts-only").levels() == (Level("experts"),)
    assert "data.workers" not in Config(data=DataConfig(name="mine")).idle()
    with pytest.raises(InputError, match=r"training\.method must be one that trains routers"):
        TrainingConfig(method="experts-only", balance=0.1)


@pytest.mark.parametrize("name", ["", "a b", "../x", "--x", "a,b", "zoo:x", "\x1b[31m", 3, None])
def test_what_is_no_name_is_not_added(name: Any) -> None:
    table = Table[int]("thing", {"one": 1})
    with pytest.raises(InputError, match=r"^thing must get a name of letters, digits"):
        table.add(name, 2)
    table.add("two-2.x+y_z", 2)
    assert list(table) == ["one", "two-2.x+y_z"]
