"""What several test modules need."""

import copy
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from advmoe.attacks.pgd import LOSSES
from advmoe.config import Config
from advmoe.evaluation.suite import ATTACKS
from advmoe.models import Classifier, create_model, save_model
from advmoe.moe import pathway
from advmoe.tables import ALTERNATIONS, BACKBONES, DATASETS, METHODS, ROUTERS, plugins

# Processes that tests start import this tree, wherever they work.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
# `advmoe` is found by its name, as where an environment is activated.
os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
# Notes and errors alone on stderr: what is told of progress has tests of its own.
os.environ["ADVMOE_LOG_FORMAT"] = "quiet"

if "PYTEST_XDIST_WORKER" in os.environ:  # one thread for each of the processes that share the cores, and for theirs
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    # Of one cache, a process may read what another is writing ("file too short").
    user, worker = getattr(os, "getuid", int)(), os.environ["PYTEST_XDIST_WORKER"]
    own = os.path.join(tempfile.gettempdir(), f"torchinductor-{user}-{worker}")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", own)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What launches kernels of Triton is told apart by the fixture that it uses."""
    for item in items:
        if {"launched", "gpu_kernels"} & {*getattr(item, "fixturenames", ())}:
            item.add_marker("triton")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that a test launches, in Triton's interpreter, to which few large tiles are cheap. Skips
    where there is none.
    """
    pytest.importorskip("triton", reason="needs Triton (extra triton): `make triton`")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs Triton's interpreter: `make triton`")
    from advmoe.ops import triton_conv

    monkeypatch.setattr(triton_conv, "ROWS", 1024)
    names: list[str] = []
    launch = triton_conv._launch

    def counted(kernel: Any, *arguments: Any, **constants: Any) -> None:
        names.append(kernel.fn.__name__.lstrip("_"))
        launch(kernel, *arguments, **constants)

    monkeypatch.setattr(triton_conv, "_launch", counted)
    return names


@pytest.fixture
def nothing_stays_registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is registered in a test, and the plugins that it names, are forgotten after it."""
    monkeypatch.setenv(plugins.PLUGINS, "")
    tables = (ALTERNATIONS, ATTACKS, BACKBONES, DATASETS, LOSSES, METHODS, ROUTERS)
    before = [(table, dict(table)) for table in tables]
    executed = set(plugins._executed)
    yield
    plugins._executed.intersection_update(executed)
    for table, entries in before:
        table.clear()
        table.update(entries)


@pytest.fixture(scope="session")
def make_images() -> Callable[..., Tensor]:
    """Makes channels-last images (N, 3, 16, 16) in [0, 1] that differ in brightness, colour and shapes."""

    def make(n: int = 12, seed: int = 1) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        light = torch.rand(n, 3, 1, 1, generator=generator)
        shapes = F.interpolate(torch.rand(n, 3, 4, 4, generator=generator), 16, mode="bilinear")
        noise = torch.rand(n, 3, 16, 16, generator=generator)
        return (0.5 * light + 0.3 * shapes + 0.2 * noise).contiguous(memory_format=torch.channels_last)

    return make


@pytest.fixture
def shallow_backbones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every backbone at two blocks, for what takes its time for each layer; no two blocks of one differ in kind."""
    few: dict[str, Callable[[Any], Any]] = {"depths": lambda old: (1,) * min(2, len(old)), "depth": lambda old: 2}
    for name, found in BACKBONES.items():
        assert isinstance(found.build, partial)
        keywords = {key: few[key](value) if key in few else value for key, value in found.build.keywords.items()}
        monkeypatch.setitem(BACKBONES, name, replace(found, build=partial(found.build, **keywords)))


@pytest.fixture(scope="session")
def make_routed(make_images: Callable[..., Tensor]) -> Callable[..., Classifier]:
    """Makes small routed ResNet-18s (5 classes, channels-last, eval mode) that send `make_images()` several ways.

    Their batch norms have seen images: running statistics are what spreads samples before anything is learnt.
    """
    made: dict[str, Classifier] = {}

    def warm(seed: int, **kwargs: Any) -> Classifier:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            settings = {"num_classes": 5, "width": 8, "input_size": 16, **kwargs}
            model = create_model("resnet18", **settings).to(memory_format=torch.channels_last)
            for each in range(12):
                model(make_images(16, seed=100 + each))
        return model.eval()

    def make(**kwargs: Any) -> Classifier:
        key = repr(sorted(kwargs.items()))
        if key not in made:
            candidates = (warm(seed, **kwargs) for seed in range(20))
            made[key] = next(m for m in candidates if len(pathway(m, make_images()).unique(dim=0)) > 1)
        return copy.deepcopy(made[key])

    return make


@pytest.fixture(scope="session")
def make_digits_run() -> Callable[..., Path]:
    """Makes run directories of untrained ResNet-18s on digits; their batch norms have seen random images."""

    def make(folder: Path, seed: int = 0, **model: Any) -> Path:
        settings = {"width": 8, "kind": "moe", **model}
        config = Config.from_dict(
            {
                "model": settings,
                "data": {"name": "digits", "image_size": 8, "augment": False},
                "threat": {"eps": "0.1"},
                "training": {"method": "at"},
                "attack": {"steps": 2, "step_size": 0.1},
            }
        )
        folder.mkdir()
        config.dump(folder / "config.yaml")
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            made = create_model("resnet18", num_classes=10, in_channels=1, input_size=8, **settings)
            for _ in range(4):
                made(torch.rand(32, 1, 8, 8))
        save_model(made.eval(), folder)
        return folder

    return make
