"""What a search shows, of made-up trials: the table, the best so far, and the page."""

import json

import pytest

from advmoe.report.page import write_report
from advmoe.report.results import load_results
from advmoe.search.findings import pictures, trials_table, write_findings
from advmoe.search.trials import TrialTask


def end(state, value, epochs, lr, error=None):
    measured = {} if value is None else {"clean_accuracy": 0.5, "worst_case": value}
    return {
        "state": state, "value": value, "parameters": {"training.lr": lr}, "error": error, "seconds": 2.0,
        "epochs": {str(at): share for at, share in enumerate(epochs, 1)}, "measured": measured,
    }  # fmt: skip


ENDS = {
    "0000": end("finished", 0.25, [0.2, 0.3], 0.1),
    "0001": end("pruned", None, [0.1], 0.9),
    "0002": end("finished", 0.125, [0.2, 0.15], 0.02),
    "0003": end("failed", None, [], 0.5, "it diverged"),
}


def test_the_table_has_a_row_for_each_trial_that_ended(make_settings):
    shown = trials_table(make_settings(), ENDS)
    assert [column["key"] for column in shown["columns"]] == [
        "trial", "training.lr", "state", "epochs", "clean_accuracy", "worst_case",
    ]  # fmt: skip
    assert [row["worst_case"] for row in shown["rows"]] == [25.0, None, 12.5, None]
    assert [row["epochs"] for row in shown["rows"]] == [2, 1, 2, 0]


def test_the_best_so_far_never_falls(make_settings):
    best, epochs = pictures(make_settings(), ENDS)
    assert best.data["best so far"] == [{"x": 0, "y": 25.0}, {"x": 2, "y": 25.0}]
    assert best.data["each trial"] == [{"x": 0, "y": 25.0}, {"x": 2, "y": 12.5}]
    assert set(epochs.data) == {"0000", "0002"}
    assert pictures(make_settings(), {}) == []


def test_a_report_shows_it(make_settings, tmp_path):
    pytest.importorskip("matplotlib")
    settings = make_settings()
    tasks = {f"{number:04d}": TrialTask(number, tmp_path, settings) for number in range(5)}
    write_findings(tmp_path, settings, tasks, ENDS, "0000", "advmoe search space.yaml")
    content = json.loads((tmp_path / "study.json").read_text())
    assert [run["status"] for run in content["runs"]] == ["finished", "pruned", "finished", "failed", "missing"]
    assert "training.lr" not in content["settings"] and content["settings"]["training.epochs"] == 2
    write_report(load_results([tmp_path]), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    for words in (
        "Search for training.lr",
        "best.yaml",
        "it diverged",
        "1 of 5 trials have not ended yet",
        "Best so far",
    ):
        assert words in page, words
