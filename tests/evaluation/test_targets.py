"""What is measured, by its name: a run directory, or a file and a factory; and where results about it go."""

from pathlib import Path

import pytest

from advmoe.evaluation.targets import home_of, is_source


@pytest.mark.parametrize("text", ["model.py:make", "a/b.py:Net", "model.py", "model.py:", "/x y/m.py:f"])
def test_files_of_python_are_sources(text):
    assert is_source(text)


@pytest.mark.parametrize("text", ["runs/a", "model", "model.py/run", "model.py:a/b", "model.pyc:f"])
def test_anything_else_is_a_run(text):
    assert not is_source(text)


def test_results_go_to_the_run_or_to_a_folder_named_after_the_file():
    assert home_of("runs/a") == Path("runs/a")
    assert home_of("nets/model.py:make") == Path("evaluations/model-make")
    assert home_of("runs/a", "x") == home_of("nets/model.py:make", Path("x")) == Path("x")
