"""Options of an engine, as every command that has them reads them."""

import pytest

from advmoe.cli.engine import engine_of
from advmoe.engines import EngineOptions


def test_all_are_passed_on():
    args = {"engine": "slurm", "task_gpus": "2", "task_cpus": "8", "task_hours": "1.5", "partition": "p"}
    expected = EngineOptions(engine="slurm", gpus=2, cpus=8, hours=1.5, partition="p")
    assert engine_of(args, "auto") == expected
    assert engine_of({"engine": "ray", "ray_address": "a:1"}, "auto") == EngineOptions(engine="ray", ray_address="a:1")


@pytest.mark.parametrize(
    ("args", "accelerator", "gpus"),
    [
        ({"engine": "slurm"}, "cuda", 1), ({"engine": "slurm"}, "auto", 0), ({"engine": "ray"}, "cpu", 0),
        ({}, "cuda", 0),
        ({"engine": "slurm", "task_gpus": "0"}, "cuda", 0),
    ],
)  # fmt: skip
def test_a_task_has_a_gpu_where_that_is_asked_for(args, accelerator, gpus):
    assert engine_of(args, accelerator).gpus == gpus
