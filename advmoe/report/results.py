"""Results on disk: run directories and studies, read without the code that writes them.

Axes: `N` images, `C` channels, `H W` size, `L` MoE layers, `T` tokens, `K` classes.
"""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from advmoe.documents import MOST_YAML, parse_yaml, read_arrays, read_text
from advmoe.errors import InputError
from advmoe.rundir import (
    CONFIG,
    DIGEST,
    GALLERY,
    MANIFEST,
    METRICS,
    MODEL,
    STUDY,
    Epochs,
    digest_at,
    read_result,
    require_plain,
    stale,
    unsealed,
)
from advmoe.tables import KINDS, METHODS, ROUTERS
from advmoe.tables.plugins import named
from advmoe.text import radius

Arrays = Mapping[str, "np.ndarray[Any, Any]"]

_ARRAYS = (
    "index", "labels", "clean", "adversarial", "clean_prediction", "adversarial_prediction", "clean_confidence",
    "adversarial_confidence", "clean_pathway", "adversarial_pathway", "num_experts", "classes", "attack", "norm", "eps",
)  # fmt: skip

_KINDS = dict(zip(_ARRAYS, "iiffiiffiiiUUUf", strict=True)) | {DIGEST: "U"}
_AXES = dict(zip(_ARRAYS, (*[(1,)] * 2, *[(4,)] * 2, *[(1,)] * 4, *[(2, 3)] * 2, (0,), (1,), *[(0,)] * 3), strict=True))
"""What kind of array each is (whole numbers, fractions, text), and how many axes it has."""

_MOST_GALLERY = 256_000_000
"""Bytes of all arrays: some 400 images of 224 pixels a side."""
_MOST_IMAGES, _MOST_LAYERS = 1000, 4096

_BATCH = 250
"""Images that `advmoe evaluate` attacks at once, unless told otherwise."""


@dataclass(frozen=True)
class ResultState:
    """A result that a run may have."""

    title: str
    state: str
    """`there`, `missing`, or how far it is."""
    command: str
    """What makes it, or makes it again."""


@dataclass(frozen=True)
class RunFolder:
    """The contents of a run directory; what is missing is None or empty."""

    path: Path
    """As the user named it: commands on the page name it so too."""
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
    classes: tuple[str, ...] = ()
    """Their names, where the model has them."""
    notes: tuple[str, ...] = ()
    """What is wrong with its files: epochs that are damaged, results of other weights, which are left out."""
    certification: dict[str, Any] = field(default_factory=dict)
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
        network = KINDS[kind].label if kind in KINDS else kind
        if method == "at":
            return f"AT ({network})"
        shown = METHODS[str(method)].label if str(method) in METHODS else str(method)
        return shown if method in ("advmoe", "sparse") or kind == "moe" else f"{shown} ({network})"

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

    def result_states(self) -> list[ResultState]:
        """Every result that the run can have, with how far it is and its command."""
        run = shlex.quote(str(self.path))
        source = self.field("model", "source")
        own = f" --model {shlex.quote(str(source))}" if source is not None else ""
        own += "".join(f" --plugin {shlex.quote(file)}" for file in named())
        evaluate, sweep, dissect, trace = self._evaluated(), self._swept(), self._dissected(), self._traced()
        wanted: list[tuple[str, object, str]] = [
            ("accuracy under attack", self.evaluation, f"evaluate {run}{own}{evaluate}"),
            ("sweep over eps", self.sweep, f"sweep-eps {run}{own}{sweep}"),
        ]
        if self.routed:
            wanted += [
                ("dissection of the attack", self.dissection, f"dissect {run}{own}{dissect}"),
                ("pathways", self.pathways, f"pathways {run}{own}{trace}"),
            ]
        if self.certification or (str(router := self.field("model", "router")) in ROUTERS and ROUTERS[router].pixels):
            wanted.append(("proved routing", self.certification, f"certify {run}{own}{self._certified()}"))
        wanted.append(("gallery", self.gallery, f"report {run}{own}"))
        return [
            self._trained(own),
            *(
                ResultState(title, "there" if result else "missing", f"advmoe {command}")
                for title, result, command in wanted
            ),
        ]

    def _trained(self, own: str) -> ResultState:
        """The state of its training, with the command that continues it where it is unfinished."""
        run, config = (shlex.quote(str(path)) for path in (self.path, self.path / CONFIG))
        if self.manifest and not self.manifest.get("finished"):
            return ResultState("training", f"{len(self.epochs)} epochs so far", f"advmoe train --resume {run}{own}")
        command = self.manifest.get("command")
        # A run directory is trained into once: the same again goes elsewhere.
        anew = f"advmoe train --config {config}{own} --run-dir {run}-again"
        again = shlex.join(map(str, command)) if isinstance(command, list) else anew
        return ResultState("training", "there" if self.epochs else "missing", again)

    def _evaluated(self) -> str:
        evaluation = self.evaluation
        attacks = evaluation.get("attacks") or evaluation.get("robust_accuracy") or ()
        return self._options(attacks, evaluation.get("num_examples"), evaluation)

    def _swept(self) -> str:
        curves = self.sweep.get("curves") or {}
        curve: dict[str, Any] = next(iter(curves.values()), {})
        radii = [radius(point["eps"], curve["norm"]) for point in curve.get("points", ())]
        attacks = [name for name in curves if name != "worst case"]
        eps = ",".join(radii) or "0,2/255,4/255,8/255,16/255"
        return f" --eps {eps}{self._options(attacks, curve.get('num_examples'), self.sweep)}"

    def _dissected(self) -> str:
        first: dict[str, Any] = next((each for each in self.dissection.values() if isinstance(each, dict)), {})
        setting = {"threat": first.get("threat"), "attack": {"seed": (first.get("attack") or {}).get("seed")}}
        return self._options(self.dissection, first.get("num_examples"), setting)

    def _traced(self) -> str:
        pathways = self.pathways
        attacks = [name] if (name := (pathways.get("attack") or {}).get("name")) is not None else []
        setting = {"threat": pathways.get("threat"), "attack": {"seed": pathways.get("seed")}}
        against = (pathways.get("against") or {}).get("run")
        compared = "" if against is None else f" --against {shlex.quote(str(against))}"
        return compared + self._options(attacks, pathways.get("num_examples"), setting)

    def _certified(self) -> str:
        result = self.certification
        norm = str((result.get("threat") or {}).get("norm"))
        radii = [radius(point["eps"], norm) for point in result.get("points", ())]
        setting = {"threat": result.get("threat"), "attack": {"seed": result.get("seed")}}
        words = f" --radii {','.join(radii)}" if radii else ""
        return words + self._options((), result.get("num_examples"), setting)

    def _options(self, attacks: Iterable[str], count: int | None, result: Mapping[str, Any]) -> str:
        """The options that make `result` again, where they differ from the run's own settings."""
        words = ["--attacks", ",".join(attacks)] if attacks else []
        words += [] if count is None else ["--num-examples", str(count)]
        threat, attack = result.get("threat") or {}, dict(result.get("attack") or {})
        seed, size = attack.pop("seed", None), attack.pop("batch_size", None)
        for group, fields in (("threat", threat), ("attack", attack)):
            for name, value in fields.items():
                if not _same(value, self.field(group, name)):
                    shown = radius(value, str(threat.get("norm"))) if name == "eps" else value
                    words += [f"--{group}.{name}", str(shown)]
        if seed not in (None, self.field("training", "seed")):
            words += ["--seed", str(seed)]
        if size not in (None, _BATCH):
            words += ["--batch-size", str(size)]
        if failed := [str(each["name"]) for each in result.get("checks") or () if not each.get("passed")]:
            words += ["--allow", ",".join(failed)]
        return "".join(f" {shlex.quote(word)}" for word in words)


@dataclass(frozen=True)
class StudyFolder:
    """A study's folder, with `study.json` as `advmoe study` writes it."""

    path: Path
    content: dict[str, Any]
    label: str | None = None
    """What tells it from another one of the same name and scale."""

    @property
    def title(self) -> str:
        """Its title, or its name where it has none, its scale and its label: a study may be there several times."""
        title = str(self.content.get("title") or self.content.get("study") or self.path.name)
        which = [str(each) for each in (self.content.get("scale"), self.label) if each is not None]
        return f"{title} ({', '.join(which)})" if which else title


def load_results(paths: Sequence[str | Path]) -> list[RunFolder | StudyFolder]:
    """The run or the study in each directory, each directory once.

    Raises `ValueError` for a directory that is neither, or a file in it that cannot be read.
    """
    once: dict[Path, Path] = {}
    for path in map(Path, paths):
        once.setdefault(path.resolve(), path)
    for path in once.values():
        require_plain(path)
    labels = _labels(list(once))
    results = {whole: _load(path, labels[whole]) for whole, path in once.items()}
    titles = Counter(each.title for each in results.values() if isinstance(each, StudyFolder))
    return [
        replace(each, label=labels[whole]) if isinstance(each, StudyFolder) and titles[each.title] > 1 else each
        for whole, each in results.items()
    ]


def _load(path: Path, label: str) -> RunFolder | StudyFolder:
    if (path / STUDY).is_file():
        return StudyFolder(path, _json(path / STUDY))
    if (path / CONFIG).is_file():
        return _load_run(path, label)
    rule = "a run directory (one that holds a config.yaml) or a study (a study.json)"
    raise InputError(f"RUN_OR_STUDY must be {rule}, got {str(path)!r}")


def _load_run(path: Path, label: str) -> RunFolder:
    text = read_text(path / CONFIG, MOST_YAML, "YAML")
    config = parse_yaml(text, str(path / CONFIG))
    if not isinstance(config, dict):
        raise InputError(f"{path / CONFIG} must hold fields by name, got {type(config).__name__}")
    digest, epochs = digest_at(path), Epochs.read(path / METRICS, strict=True)
    results = {
        name: _json(path / f"{name}.json")
        for name in ("evaluation", "sweep", "dissection", "pathways", "certification")
    }
    results["dissection"] = {
        attack: unsealed(each, f"{path / 'dissection.json'}: {attack}") if isinstance(each, dict) else each
        for attack, each in results["dissection"].items()
    }
    others = [name for name, result in results.items() if any(stale(each, digest) for each in _parts(result))]
    results |= {name: {} for name in others}
    return RunFolder(
        path=path,
        label=label,
        config=config,
        config_text=text,
        manifest=_json(path / MANIFEST),
        epochs=epochs.lines,
        evaluation=results["evaluation"],
        sweep=results["sweep"],
        dissection=results["dissection"],
        pathways=results["pathways"],
        certification=results["certification"],
        classes=_classes(path / MODEL),
        notes=(*epochs.problems, *(f"{name}.json is of other weights than these, and left out" for name in others)),
        gallery=_current_gallery(path),
    )


def _parts(result: dict[str, Any]) -> list[dict[str, Any]]:
    """A result, or of a dissection those of its attacks."""
    return [result, *(each for each in result.values() if isinstance(each, dict))]


def with_gallery(run: RunFolder, reason: str | None = None) -> RunFolder:
    """The run with the gallery that lies in its directory now; `reason`: why there is none."""
    return replace(run, gallery=_current_gallery(run.path), no_gallery=reason)


def _current_gallery(path: Path) -> Arrays | None:
    """The gallery in a run directory; None where there is none, or one of other weights than are there now."""
    arrays, digest = load_gallery(path / GALLERY), digest_at(path)
    return None if arrays is None or (digest is not None and str(arrays[DIGEST]) != digest) else arrays


def load_gallery(path: Path) -> Arrays | None:
    """The arrays of a gallery, None where there is no file. Raises `ValueError` where it is damaged."""
    if not path.is_file():
        return None
    try:
        content = read_arrays(path, (*_ARRAYS, DIGEST), _MOST_GALLERY)
        arrays = {name: content[name] for name in _ARRAYS}
        arrays[DIGEST] = content.get(DIGEST, np.array(""))  # an old gallery has none
    except (KeyError, ValueError) as error:
        raise InputError(f"{path} must be a gallery, got {type(error).__name__}: {error}") from None
    _require_kinds(arrays, path)
    lengths = {arrays[name].shape[:1] for name in _ARRAYS[:10]}
    paired = all(arrays[f"clean{kind}"].shape == arrays[f"adversarial{kind}"].shape for kind in ("", "_pathway"))
    if len(lengths) != 1 or arrays["clean"].ndim != 4 or not paired:
        raise InputError(f"{path} must hold as many of each thing as images, got arrays of unlike shapes")
    return arrays


def _require_kinds(arrays: Arrays, path: Path) -> None:
    """Raise `ValueError` unless each array is of its kind, and they are no more than a page shows."""
    for name, array in arrays.items():
        if array.dtype.kind != _KINDS[name] or array.ndim not in _AXES.get(name, (0,)):
            got = f"{name} of {array.ndim} axes of {array.dtype}"
            raise InputError(f"{path} must hold the arrays of a gallery, got {got}")
    if 0 in arrays["clean"].shape[1:]:
        raise InputError(f"{path} must hold images, got arrays of shape {arrays['clean'].shape}")
    images, layers = len(arrays["labels"]), arrays["clean_pathway"].shape[1]
    if images > _MOST_IMAGES or layers > _MOST_LAYERS:
        rule = f"hold at most {_MOST_IMAGES} images and {_MOST_LAYERS} layers"
        raise InputError(f"{path} must {rule}, got {images} and {layers}")


def _json(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no file."""
    return read_result(path) if path.is_file() else {}


def _classes(model: Path) -> tuple[str, ...]:
    """The names of a model's classes; none where its description is damaged, which is not shown."""
    try:
        names = _json(model).get("classes")
    except ValueError:
        return ()
    return tuple(map(str, names)) if isinstance(names, list) else ()


def _labels(paths: Sequence[Path]) -> dict[Path, str]:
    """The shortest ends of the paths, all of one length, that tell them apart."""
    longest = max((len(path.parts) for path in paths), default=1)
    ends = ({path: "/".join(path.parts[-length:]) for path in paths} for length in range(1, longest + 1))
    return next(labels for labels in ends if len(set(labels.values())) == len(labels))


def _same(value: str | float, own: Any) -> bool:
    """Whether a value is that of the configuration, which may write numbers of pixels as in 8/255."""
    if isinstance(value, str):
        return value == str(own)
    try:
        top, _, bottom = str(own).partition("/")
        return math.isclose(float(top) / float(bottom or 1), value, abs_tol=1e-9)
    except (ValueError, ZeroDivisionError):
        return False
