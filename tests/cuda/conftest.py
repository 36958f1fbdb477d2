"""Tests of every path on a GPU: on a real one, or on devices that host memory stands in for (`make cuda`)."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from advmoe.config import Config, merged
from advmoe.ops import kernels_missing
from advmoe.recipes import recipe
from advmoe.training.run import train

SMALL = {
    "model": {"width": 4, "experts_init": "shared"},
    "data": {"name": "digits", "image_size": 8, "train_examples": 64, "val_fraction": 0.2, "augment": True},
    "threat": {"eps": "0.1"},
    "training": {
        "epochs": 1, "batch_size": 16, "lr": 0.02, "attack_steps": 2, "step_size": 0.05, "val_attack_steps": 2,
        "alternation": "both", "compute": "masked",
    },
}  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests below need a GPU, and are told apart by that."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker("gpu")
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device: real, or `make cuda`"))


@pytest.fixture(scope="session")
def pretended() -> ModuleType:
    """The module `pretended`; skips where the devices are real."""
    if "pretended" not in sys.modules:
        pytest.skip("counts what devices of host memory are asked to do")
    return importlib.import_module("pretended")


@pytest.fixture
def gpu_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels in Triton: a real device's, or interpreted on what stands in for one. Skips where there are none."""
    if "pretended" in sys.modules:
        pretended, _ = map(request.getfixturevalue, ("pretended", "launched"))
        from advmoe.ops import triton_conv

        launch = triton_conv._launch

        def interpret(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
            launch(
                kernel,
                grid,
                *(pretended.on_host(a) if isinstance(a, torch.Tensor) else a for a in arguments),
                **constants,
            )

        monkeypatch.setattr(triton_conv, "_launch", interpret)
    elif (missing := kernels_missing(torch.device("cuda"))) is not None:
        pytest.skip(f"needs {missing}")


@pytest.fixture(scope="session")
def exact() -> bool:
    """Whether devices compute as the CPU does, bit for bit: those of host memory do, without kernels."""
    return "pretended" in sys.modules


def small(**groups: dict) -> Config:
    """A configuration of a few seconds."""
    return Config.from_dict(merged(merged(recipe("digits-advmoe"), SMALL), groups))


@pytest.fixture(scope="session")
def make_config() -> Callable[..., Config]:
    """Makes a configuration of a few seconds; keywords: groups of fields to change."""
    return small


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An AdvMoE run that was trained on a CUDA device."""
    return train(small(), run_dir=tmp_path_factory.mktemp("cuda") / "run", accelerator="cuda", threads=1)
