"""CUDA devices made of host memory, for a CPU build of PyTorch: tests run every CUDA path without a GPU.

`PRETENDED_CUDA=2 PYTHONPATH=tests/cuda/site python ...` has two devices, and so have all processes that it starts. The
library is built by `python tests/cuda/pretended.py`, once for each PyTorch. What it covers: see `device.cpp`.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SOURCE = HERE / "device.cpp"


def _torch() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit("pretended.py: needs PyTorch")
    return Path(spec.origin).parent


def library() -> Path:
    """Where the library lies that is built of this source for this PyTorch."""
    digest = hashlib.sha256(SOURCE.read_bytes() + version("torch").encode()).hexdigest()[:16]
    return HERE.parents[1] / "build" / f"pretended-{digest}.so"


def build() -> Path:
    """Compile the library, unless it is there. Needs g++; takes about half a minute."""
    path, torch = library(), _torch()
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        includes = [f"-I{torch / 'include'}", f"-I{torch / 'include/torch/csrc/api/include'}"]
        command = ["g++", "-std=c++20", "-O0", "-shared", "-fPIC", *includes, str(SOURCE), f"-L{torch / 'lib'}"]
        subprocess.run([*command, "-ltorch_cpu", "-lc10", "-o", str(unfinished)], check=True)
        unfinished.replace(path)
    return path


@dataclass
class Counts:
    """What a GPU would have done: launches and waits of the host by operator, and the devices in use."""

    launches: dict[str, int] = field(default_factory=dict)
    waits: dict[str, int] = field(default_factory=dict)
    devices: set[int] = field(default_factory=set)

    @property
    def launched(self) -> int:
        return sum(self.launches.values())

    @property
    def waited(self) -> int:
        return sum(self.waits.values())


_loaded: list[Any] = []


def present() -> bool:
    """Whether this process has pretended devices."""
    return bool(_loaded)


@contextmanager
def counting() -> Iterator[Counts]:
    """Counts what the block launches and waits for, in this process; filled at its end."""
    counts = Counts()
    _loaded[0].pretended_reset()
    yield counts
    for line in _loaded[0].pretended_report().decode().splitlines():
        kind, name, count = line.split("\t")
        if kind == "device":
            counts.devices.add(int(name))
        else:
            (counts.launches if kind == "launch" else counts.waits)[name] = int(count)


def on_host(x: Any) -> Any:
    """The memory of a device's tensor `x`, which is the host's, as a tensor of the CPU without its shape."""
    import torch

    memory = (ctypes.c_char * (x.numel() * x.element_size())).from_address(x.data_ptr())
    return torch.frombuffer(memory, dtype=x.dtype)


def install() -> None:
    """Give this process the devices, before anything imports torch."""
    if "torch" in sys.modules:
        raise RuntimeError("pretended devices must come before torch")
    ctypes.CDLL(str(_torch() / "lib" / "libtorch_cpu.so"), ctypes.RTLD_GLOBAL)
    so = ctypes.CDLL(str(library()))
    so.pretended_report.restype = ctypes.c_char_p
    _loaded.append(so)
    import torch
    import torch._dynamo  # registers with the devices that it finds: before there are any

    so.pretended_allocator()
    _stand_in(torch, so)


def _count() -> int:
    number, visible = int(os.environ["PRETENDED_CUDA"]), os.environ.get("CUDA_VISIBLE_DEVICES")
    return number if visible is None else min(number, len([each for each in visible.split(",") if each.strip()]))


def _stand_in(torch: Any, so: Any) -> None:
    """Puts what `torch.cuda` asks of the driver in its place."""

    def index(device: Any) -> int:
        if isinstance(device, int):
            return device if device >= 0 else int(so.pretended_current())
        chosen = None if device is None else torch.device(device).index
        return int(so.pretended_current()) if chosen is None else int(chosen)

    def current() -> int:
        return int(so.pretended_current())

    def choose(device: Any) -> None:
        so.pretended_set_current(index(device))

    def exchange(device: int) -> int:
        before = current()
        if device >= 0:
            choose(device)
        return before

    generators = tuple(torch.Generator(f"cuda:{i}") for i in range(int(os.environ["PRETENDED_CUDA"])))

    def seed_all(seed: int) -> None:
        for generator in generators:
            generator.manual_seed(seed)

    def nothing(*_: Any, **__: Any) -> None:
        pass

    python = {
        "is_available": lambda: _count() > 0,
        "device_count": _count,
        "current_device": current,
        "set_device": choose,
        "synchronize": nothing,
        "get_device_name": lambda device=None: "Pretended",
        "get_device_capability": lambda device=None: (9, 0),
        "is_bf16_supported": lambda including_emulation=True: True,
        "is_initialized": lambda: True,
        "_lazy_init": nothing,
        "_is_in_bad_fork": lambda: False,
        "init": nothing,
        "empty_cache": nothing,
        "reset_peak_memory_stats": nothing,
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "get_rng_state": lambda device="cuda": generators[index(device)].get_state(),
        "set_rng_state": lambda state, device="cuda": generators[index(device)].set_state(state),
        "manual_seed": lambda seed: generators[current()].manual_seed(seed),
        "manual_seed_all": seed_all,
        "_initialized": True,
        "default_generators": generators,
    }
    for module in (torch.cuda, torch.cuda.random):
        for name, value in python.items():
            if module is torch.cuda or hasattr(module, name):
                setattr(module, name, value)
    torch.accelerator.is_available = lambda: _count() > 0

    def clone(storage: Any) -> Any:
        """A storage's copy, which a build without CUDA cannot make."""
        if storage.device.type == "cpu":
            return of_the_cpu(storage)
        return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).clone().untyped_storage()

    of_the_cpu, torch.UntypedStorage.clone = torch.UntypedStorage.clone, clone
    native = {
        "_cuda_getDevice": current,
        "_cuda_setDevice": choose,
        "_cuda_getDeviceCount": _count,
        "_cuda_init": nothing,
        "_cuda_exchangeDevice": exchange,
        "_cuda_maybeExchangeDevice": exchange,
    }
    for name, value in native.items():
        setattr(torch._C, name, value)


if __name__ == "__main__":
    print(build())
