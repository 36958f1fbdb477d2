"""Every study at its smallest size, by the command line, on shared runs; then one report of them all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from advmoe import cli
from advmoe.studies.catalogue import STUDIES

pytestmark = pytest.mark.studies


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("studies")


def advmoe(*words: str | Path) -> int:
    return cli.main([*map(str, words)])


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_runs_at_smoke_size_and_measures_all_that_it_shows(root: Path, name: str) -> None:
    assert advmoe("study", name, "--scale", "smoke", "--jobs", "2", "--out", root) == 0
    content = json.loads((root / f"{name}-smoke" / "study.json").read_text())
    assert content["runs"] and all(run["status"] == "finished" for run in content["runs"])
    assert content["tables"] and all(table["rows"] for table in content["tables"])
    for table in content["tables"]:
        for row in table["rows"]:
            missing = [column["key"] for column in table["columns"] if row.get(column["key"]) is None]
            assert not missing, f"{table['title']}: {row} lacks {missing}"
    assert content["figures"]
    for figure in content["figures"]:
        assert (root / f"{name}-smoke" / figure["svg"]).stat().st_size > 1000


def test_a_second_time_nothing_is_trained(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert advmoe("study", "table1", "--scale", "smoke", "--out", root, "--dry-run") == 0
    assert " 0 to do" in capsys.readouterr().out


def test_one_report_holds_them_all(root: Path) -> None:
    page = root / "report.html"
    assert advmoe("report", *(root / f"{name}-smoke" for name in STUDIES), "-o", page) == 0
    text = page.read_text()
    assert all(study.title.replace("'", "&#x27;") in text for study in STUDIES.values())
