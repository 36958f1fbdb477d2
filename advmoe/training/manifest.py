"""What a run's numbers depend on besides its configuration: versions, hardware, threads, code, time."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from advmoe.errors import InputError
from advmoe.files import read_object, write_text
from advmoe.ops import kernels_used
from advmoe.precision import fp32_on, gpu_libraries
from advmoe.rundir import CONFIG_DIGEST, MANIFEST


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _git_commit() -> str | None:
    """The commit of the code that runs, `-dirty` where it was changed; None outside a checkout."""
    folder = Path(__file__).parent
    call = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        tracked = subprocess.run(
            ["git", "-C", str(folder), "ls-files", "--error-unmatch", __file__], capture_output=True
        )
        if tracked.returncode:
            return None
        return subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _omp_wait_policy() -> str | None:
    """What the environment tells OpenMP's threads to do while they wait for work; None where it leaves it to them."""
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    return " ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ) or None


def describe(*, name: str, seed: int, device: torch.device, devices: int, command: list[str] | None) -> dict[str, Any]:
    """The manifest of a run that starts now."""
    packages = ("advmoe", "torch", "numpy", "lightning-fabric", "safetensors", "pillow", "scikit-learn")
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "name": name,
        "command": command,
        "seed": seed,
        "versions": versions,
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "devices": devices,
        "fp32": fp32_on(device),
        "gpu": gpu_libraries(device),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": _omp_wait_policy(),
        "kernels": kernels_used() if device.type == "cpu" else None,
        "git_commit": _git_commit(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "finished": None,
        "wall_seconds": 0.0,
    }


def write(run_dir: Path, manifest: dict[str, Any]) -> None:
    """Write `manifest.json` whole or not at all."""
    write_text(run_dir / MANIFEST, json.dumps(manifest, indent=2) + "\n")


def read(run_dir: Path) -> dict[str, Any]:
    """The manifest of `run_dir`. Raises `ValueError` naming the file if it is damaged."""
    manifest = read_object(path := run_dir / MANIFEST)
    if missing := [name for name in ("name", "command", "devices", "threads") if name not in manifest]:
        raise InputError(f"{path} must hold what a run is resumed by, got no {', '.join(missing)}")
    return manifest


def noted(manifest: dict[str, Any], resumption: dict[str, Any]) -> dict[str, Any]:
    """`manifest` with what of `resumption` may differ from how the run began: versions, machine, code, time."""
    machine = ("versions", "platform", "cpu", "device", "devices", "fp32", "threads", "kernels", "omp_wait_policy")
    names = (*machine, "git_commit", "source_sha256", "data_notes", CONFIG_DIGEST, "started")
    earlier = manifest.get("resumed") or []
    return manifest | {"resumed": [*earlier, {name: resumption[name] for name in names if name in resumption}]}


_SHAPES_BITS = {
    "kernels": "kernels", "torch": "PyTorch", "advmoe": "advmoe", "git_commit": "code", "cpu": "CPU",
    "device": "device", "devices": "devices", "threads": "threads",
}  # fmt: skip
"""What the bits of a run's weights depend on besides its configuration, and the words for it."""


def differing(manifest: dict[str, Any], resumption: dict[str, Any]) -> str | None:
    """What differs between how a run goes on and how it went so far, in words; None where nothing does."""

    def of(part: dict[str, Any], name: str) -> Any:
        return part.get("versions", {}).get(name) if name in ("torch", "advmoe") else part.get(name)

    differences = []
    for name, called in _SHAPES_BITS.items():
        now = of(resumption, name)
        before = [of(part, name) for part in (manifest, *(manifest.get("resumed") or []))]
        if other := [each for each in before if each != now]:
            differences.append(f"{called} ({other[-1]}, now {now})")
    return ", ".join(differences) or None
