"""Results as they lie on disk: run directories and studies, read without the code that made them.

Axes: `N` images, `C` channels, `H W` size, `L` MoE layers, `T` tokens, `K` classes.
"""

from __future__ import annotations

import json
import shlex
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

Arrays = Mapping[str, "np.ndarray[Any, Any]"]

KINDS = {"moe": "MoE", "dense": "Dense", "s-dense": "S-Dense", "sparse": "Sparse"}
METHODS = {"advmoe": "AdvMoE", "at": "AT", "standard": "standard", "sparse": "AT (Sparse)"}

_GALLERY = (
    "index", "labels", "clean", "adversarial", "clean_prediction", "adversarial_prediction", "clean_confidence",
    "adversarial_confidence", "clean_pathway", "adversarial_pathway", "num_experts", "classes", "attack", "norm", "eps",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A run directory: what is there; None, or empty, is what is not."""

    path: Path
    """As it was named: commands shown to the reader name it so too."""
    label: str
    """Tells it from the other runs of the page."""
    config: dict[str, Any]
    config_text: str
    """`config.yaml` as it is."""
    manifest: dict[str, Any]
    epochs: list[dict[str, Any]]
    evaluation: dict[str, Any]
    sweep: dict[str, Any]
    dissection: dict[str, Any]
    pathways: dict[str, Any]
    gallery: Arrays | None = None
    no_gallery: str | None = None
    """Why there is no gallery, where something is known."""

    def field(self, group: str, name: str) -> Any:
        """A field of the configuration, None where it has none."""
        section = self.config.get(group)
        return section.get(name) if isinstance(section, dict) else None

    @property
    def method(self) -> str:
        """What it is called in the paper."""
        method, kind = self.field("training", "method"), str(self.field("model", "kind"))
        if method == "at":
            return f"AT ({KINDS.get(kind, kind)})"
        shown = METHODS.get(str(method), str(method))
        return shown if method in ("advmoe", "sparse") or kind == "moe" else f"{shown} ({KINDS.get(kind, kind)})"

    @property
    def model(self) -> str:
        """Backbone, and scale where it says something."""
        words = [str(self.field("model", "name") or "a network of the user's")]
        if self.field("model", "kind") in ("moe", "s-dense", "sparse"):
            words.append(f"r = {self.field('model', 'scale')}")
        if self.field("model", "kind") == "moe":
            words.append(f"N = {self.field('model', 'num_experts')}")
        if self.field("model", "width") is not None:
            words.append(f"width {self.field('model', 'width')}")
        return ", ".join(words)

    @property
    def routed(self) -> bool:
        """Whether it has routers, as far as its results tell."""
        layers = self.epochs[-1].get("layers") if self.epochs else None
        return self.field("model", "kind") == "moe" or bool(layers) or bool(self.field("model", "to_moe"))

    def commands(self) -> list[tuple[str, str | None, str]]:
        """What makes each result: its title, the file if it is there, the command."""
        run = shlex.quote(str(self.path))
        trained = self.manifest.get("command")
        train = shlex.join(map(str, trained)) if isinstance(trained, list) else ""
        config = shlex.quote(str(self.path / "config.yaml"))
        known = [
            ("training", bool(self.epochs), train or f"advmoe train --config {config}"),
            ("accuracy under attack", bool(self.evaluation), f"advmoe evaluate {run}{self._evaluated()}"),
            ("sweep over eps", bool(self.sweep), f"advmoe sweep-eps {run} --eps {self._radii()}"),
        ]
        if self.routed:
            known += [
                ("dissection of the attack", bool(self.dissection), f"advmoe dissect {run}"),
                ("pathways", bool(self.pathways), f"advmoe pathways {run}"),
            ]
        known.append(("gallery", self.gallery is not None, f"advmoe report {run}"))
        return [(title, "there" if there else None, command) for title, there, command in known]

    def _evaluated(self) -> str:
        """The options of the evaluation that is there."""
        if not self.evaluation:
            return ""
        words = []
        if attacks := list(self.evaluation.get("robust_accuracy") or {}):
            words += ["--attacks", ",".join(attacks)]
        if (count := self.evaluation.get("num_examples")) is not None:
            words += ["--num-examples", str(count)]
        eps, own = (self.evaluation.get("threat") or {}).get("eps"), _pixels(self.field("threat", "eps"))
        if eps is not None and own is not None and abs(eps - own) > 1e-9:
            words += ["--threat.eps", f"{eps:.6g}"]
        return f" {shlex.join(words)}" if words else ""

    def _radii(self) -> str:
        if not self.sweep:
            return "0,2/255,4/255,8/255,16/255"
        curve: dict[str, Any] = next(iter(self.sweep.get("curves", {}).values()), {})
        radii = [point["eps"] for point in curve.get("points", ())]
        if curve.get("norm") != "linf":
            return ",".join(f"{eps:.6g}" for eps in radii)
        return ",".join("0" if eps == 0 else f"{255 * eps:.6g}/255" for eps in radii)


@dataclass(frozen=True)
class Study:
    """A study's folder, with `study.json` as `advmoe study` writes it."""

    path: Path
    content: dict[str, Any]

    @property
    def title(self) -> str:
        """Its title, or its name where it has none."""
        return str(self.content.get("title") or self.content.get("study") or self.path.name)


def load_results(paths: Sequence[str | Path]) -> list[Run | Study]:
    """The run or the study in each directory, each directory once.

    Raises `ValueError` for a directory that is neither, or a file in it that cannot be read.
    """
    found: list[Run | Study] = []
    for path in dict.fromkeys(Path(each) for each in paths):
        if (path / "study.json").is_file():
            content = _json(path / "study.json")
            found.append(Study(path, content))
        elif (path / "config.yaml").is_file():
            found.append(_load_run(path))
        else:
            rule = "a run directory (one that holds a config.yaml) or a study (a study.json)"
            raise ValueError(f"RUN_OR_STUDY must be {rule}, got {str(path)!r}")
    labels = _labels([each.path for each in found])
    return [replace(each, label=labels[each.path]) if isinstance(each, Run) else each for each in found]


def _load_run(path: Path) -> Run:
    text = _text(path / "config.yaml")
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path / 'config.yaml'} must be YAML, got {' '.join(str(error).split())}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path / 'config.yaml'} must hold fields by name, got {type(config).__name__}")
    parts = {
        name: _json(path / f"{name}.json") for name in ("manifest", "evaluation", "sweep", "dissection", "pathways")
    }
    return Run(
        path=path, label="", config=config, config_text=text, epochs=_lines(path / "metrics.jsonl"),
        gallery=load_gallery(path / "gallery.npz"), **parts,
    )  # fmt: skip


def load_gallery(path: Path) -> Arrays | None:
    """The arrays of a gallery, None where there is no file. Raises `ValueError` where it is damaged."""
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in _GALLERY}
    except (KeyError, ValueError, OSError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{path} must be a gallery, got {' '.join(str(error).split())}") from None
    if len({len(arrays[name]) for name in _GALLERY[:10]}) != 1 or arrays["clean"].shape != arrays["adversarial"].shape:
        raise ValueError(f"{path} must hold as many of each thing as images, got arrays of unlike shapes")
    return arrays


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be text in UTF-8, got {error}") from None


def _json(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} must be JSON, got {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} must be a JSON object, got a {type(found).__name__}")
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; an unfinished last one, of a run that is being written, is left out."""
    lines = _text(path).splitlines() if path.is_file() else []
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{path} must hold JSON in every line, got {error} in line {number}") from None
    return [each for each in found if isinstance(each, dict)]


def _labels(paths: Sequence[Path]) -> dict[Path, str]:
    """The shortest ends of the paths that tell them apart."""
    whole = {path: path.resolve().parts for path in paths}
    for length in range(1, max(map(len, whole.values()), default=1) + 1):
        ends = {path: "/".join(parts[-length:]) for path, parts in whole.items()}
        if len(set(ends.values())) == len(ends):
            return ends
    return {path: str(path) for path in paths}


def _pixels(value: Any) -> float | None:
    """A number of pixels as configurations write it, as in 8/255; None where it is none."""
    try:
        top, _, bottom = str(value).partition("/")
        return float(top) / float(bottom or 1)
    except (ValueError, ZeroDivisionError):
        return None
