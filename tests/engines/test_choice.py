"""Where tasks are done: what goes together, and what is missing."""

import sys

import pytest

from advmoe.engines import EngineOptions, Ledger
from advmoe.errors import InputError
from advmoe.pool import Place, Pool


def test_by_default_this_machine_s_processes_do_them(tmp_path):
    options = EngineOptions()
    options.require()
    engine = options.open(print, (), places=[Place(1)], ledger=Ledger(tmp_path / "logs"))
    assert options.local and isinstance(engine, Pool) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"engine": "cloud"}, "--engine must be one of local, slurm, ray, got 'cloud'"),
        ({"gpus": 1}, "--task-gpus must go with --engine slurm or ray, got 1 with local"),
        ({"engine": "ray", "partition": "p"}, "--partition must go with --engine slurm, got 'p' with ray"),
        ({"engine": "ray", "hours": 2.0}, "--task-hours must go with --engine slurm, got 2.0 with ray"),
        ({"engine": "slurm", "ray_address": "a"}, "--ray-address must go with --engine ray, got 'a' with slurm"),
    ],
)
def test_what_does_not_go_together_is_named(fields, message):
    with pytest.raises(InputError) as caught:
        EngineOptions(**fields)
    assert str(caught.value) == message


@pytest.mark.parametrize(("engine", "package"), [("slurm", "submitit"), ("ray", "ray")])
def test_a_missing_package_is_a_line_that_names_the_extra(monkeypatch, engine, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        InputError, match=rf"--engine {engine} needs the extra {engine}: pip install 'advmoe\[{engine}\]'"
    ):
        EngineOptions(engine=engine).require()
