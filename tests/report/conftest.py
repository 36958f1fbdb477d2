"""Results as `advmoe` writes them, small and made up, and pages taken apart."""

import json
from collections.abc import Callable
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from advmoe.config import Config
from advmoe.report.album import Album
from advmoe.report.html import joined

VOID = {"img", "meta", "br", "hr"}


class Parsed(HTMLParser):
    """The elements of a page in their order; every one must be closed where it was opened."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self._open: list[int] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), []))
        if tag not in VOID:
            self._open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), []))

    def handle_endtag(self, tag: str) -> None:
        assert self.elements[self._open.pop()][0] == tag

    def handle_data(self, data: str) -> None:
        for at in self._open:
            self.elements[at][2].append(data)

    def texts(self, tag: str, kind: str | None = None) -> list[str]:
        """What the elements of a name, and of a class, hold, without space around."""
        return ["".join(words).strip() for name, at, words in self.elements if name == tag and _is(at, kind)]

    def attributes(self, tag: str, name: str) -> list[str]:
        """The values of an attribute that elements of a name have."""
        return [at[name] or "" for element, at, _ in self.elements if element == tag and name in at]


def _is(attributes: dict[str, str | None], kind: str | None) -> bool:
    return kind is None or kind in (attributes.get("class") or "").split()


@pytest.fixture
def parsed() -> Callable[..., Parsed]:
    """Takes a page's file, or what a section returned, apart."""
    return lambda *content: Parsed(content[0].read_text() if isinstance(content[0], Path) else joined(*content))


@pytest.fixture
def album(tmp_path: Path) -> Album:
    """An album that draws into a folder of its own."""
    folder = tmp_path / "drawn"
    folder.mkdir()
    return Album(folder)


def layer(number: int, *load: float) -> dict[str, Any]:
    return {"layer": number, "load": load, "entropy": 0.5, "dead_experts": [e for e, s in enumerate(load) if s == 0]}


def epoch(number: int, routed: bool) -> dict[str, Any]:
    losses = {"ce": 2.0 / number, "kl": 0.25 * number, "accuracy": 0.5}
    return {
        "epoch": number, "lr": 0.1, "train": {"routers": losses, "experts": losses} if routed else {"all": losses},
        "val": {"clean_accuracy": 0.25 * number, "robust_accuracy": 0.125 * number}, "seconds": 4.0,
        "images_per_second": 320.0, "layers": [layer(0, 0.25, 0.75), layer(1, 1.0, 0.0)] if routed else [],
    }  # fmt: skip


def report(share: float, low: float, high: float, **parts: tuple[int, int]) -> dict[str, Any]:
    return {
        "robust_accuracy": share, "interval": [low, high], "examples": 40, "seconds": 12.5, "flags": {},
        "parts": {name: {"attempted": tried, "broken": broken} for name, (tried, broken) in parts.items()},
    }  # fmt: skip


def evaluation() -> dict[str, Any]:
    return {
        "clean_accuracy": 0.875, "robust_accuracy": {"pgd-10": 0.5, "routed": 0.375}, "worst_case": 0.35,
        "num_examples": 40, "masking_gap": 0.15, "threat": {"norm": "linf", "eps": 8 / 255},
        "attack": {"steps": 10, "step_size": 2 / 255, "restarts": 1, "seed": 0},
        "attacks": {
            "pgd-10": report(0.5, 0.352, 0.648, pgd=(35, 15)),
            "routed": report(0.375, 0.242, 0.53, soft=(35, 12), search=(23, 8)),
        },
        "checks": [{"name": "pixels", "passed": True, "value": 0, "detail": "from 0 to 1"}],
        "data": {"name": "digits", "split": "test"},
        "cost": {"gmacs": 0.139, "parameters": 11_173_962, "ms_per_image": 4.25, "batch": 128, "device": "cpu",
                 "threads": 2},
    }  # fmt: skip


def curve(*shares: float, reasons: tuple[str, ...] = ()) -> dict[str, Any]:
    points = [
        {"eps": 4 * at / 255, "robust_accuracy": share, "interval": [max(0.0, share - 0.1), min(1.0, share + 0.1)]}
        for at, share in enumerate(shares)
    ]
    return {
        "norm": "linf", "num_examples": 40, "points": points, "probe": {**points[-1], "eps": 1.0},
        "masking": {"suspected": bool(reasons), "reasons": list(reasons)},
    }  # fmt: skip


def dissection() -> dict[str, Any]:
    shares = {"both_survive": 0.25, "only_routing_fails": 0.25, "only_prediction_fails": 0.125, "both_fail": 0.375}
    return {
        "num_examples": 40, "num_clean_correct": 35, "num_layers": 2, "num_experts": 2, "categories": shares,
        "categories_of_clean_correct": shares, "flip_rate": [0.05, 0.3],
        "load": {"clean": [[0.25, 0.75], [1.0, 0.0]], "adversarial": [[0.5, 0.5], [0.9, 0.1]]},
    }  # fmt: skip


def gallery(layers: int = 2, classes: tuple[str, ...] = ("cat", "dog")) -> dict[str, Any]:
    """Two images: a surviving one whose pathway changes in its last layer, and a broken one whose stays."""
    clean = np.zeros((2, 1, 8, 8), np.float16)
    clean[:, :, 2:6, 2:6] = 0.75
    adversarial = clean.copy()
    adversarial[0, 0, 0, 0] = 0.125
    after = np.zeros((2, layers), np.int64)
    after[0, -1:] = 1
    return {
        "index": [7, 31], "labels": [0, 1], "clean": clean, "adversarial": adversarial, "clean_prediction": [0, 1],
        "adversarial_prediction": [0, 0], "clean_confidence": [0.75, 0.5], "adversarial_confidence": [0.625, 0.875],
        "clean_pathway": np.zeros((2, layers), np.int64), "adversarial_pathway": after, "num_experts": 2,
        "classes": classes, "attack": "pgd-10", "norm": "linf", "eps": 8 / 255,
    }  # fmt: skip


@pytest.fixture(scope="session")
def write_run() -> Callable[..., Path]:
    """Writes run directories into a folder: `only` some of the results, `changed` by file's name."""

    def write(folder: Path, name: str, *, routed: bool = True, only: set[str] | None = None, **changed: Any) -> Path:
        path = folder / "runs" / name
        path.mkdir(parents=True)
        config = Config()
        config.model.kind = "moe" if routed else "dense"
        config.training.method = "advmoe" if routed else "at"
        config.training.epochs, config.data.name = 2, "digits"
        config.attack.steps = 10
        config.dump(path / "config.yaml")
        files: dict[str, Any] = {
            "manifest": {"name": name, "command": ["advmoe", "train", "--run-dir", f"runs/{name}"], "seed": 0,
                         "versions": {"torch": "2.13.0"}, "cpu": "a processor", "finished": "2026-01-01T00:00:00"},
            "evaluation": evaluation(), "sweep": {"curves": {"pgd-10": curve(0.875, 0.7, 0.5),
                                                             "worst case": curve(0.875, 0.6, 0.35)}},
            "dissection": {"pgd-10": dissection()} if routed else {}, "metrics": [epoch(n, routed) for n in (1, 2)],
            "gallery": gallery(2 if routed else 0),
        } | changed  # fmt: skip
        for kind, content in files.items():
            if not content or not (only is None or kind in only):
                continue
            if kind == "metrics":
                (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in content))
            elif kind == "gallery":
                np.savez(path / "gallery.npz", **content)
            else:
                (path / f"{kind}.json").write_text(json.dumps(content))
        return path

    return write


@pytest.fixture
def make_run(write_run: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Writes run directories for one test."""
    return partial(write_run, tmp_path)


def compared(less: str, more: str, *differences: float) -> dict[str, Any]:
    return {
        "less": less, "more": more, "p": 0.03125, "test": "over 5 seeds", "mean_less": 0.4, "mean_more": 0.5,
        "differences": {str(seed): each for seed, each in enumerate(differences)},
    }  # fmt: skip


@pytest.fixture(scope="session")
def write_study() -> Callable[..., Path]:
    """Writes a study's folder: a table beside the paper's, a figure, a claim; `changed` parts of its content."""

    def write(folder: Path, name: str = "table1", **changed: Any) -> Path:
        path = folder / "studies" / name
        path.mkdir(parents=True)
        points = [{"x": 1, "y": 20.0}, {"x": 2, "y": 30.0}]
        numbers = {"AT < AdvMoE": compared("AT", "AdvMoE", 0.0875, 0.1125)}
        content = {
            "study": name, "title": f"The paper's {name}", "shows": "AdvMoE against AT.", "scale": "smoke",
            "seeds": [0, 1], "notes": ["Seed 1 is short."], "command": f"advmoe study {name}", "seconds": 5400.0,
            "made_on": {"cpu": ["a processor"], "device": ["cpu"], "threads": [2], "torch": ["2.13.0"]},
            "shown_by": {"versions": {"torch": "2.13.0"}},
            "created": "2026-01-01T00:00:00", "settings": {"training": {"epochs": 2}},
            "tables": [{
                "title": "Methods", "caption": "Mean and standard deviation.", "columns": [
                    {"key": "method", "title": "Method", "better": None},
                    {"key": "ra", "title": "RA %", "better": "higher"},
                    {"key": "ms", "title": "ms/image", "better": "lower"},
                ],
                "rows": [
                    {"method": "AT", "ra": {"mean": 40.0, "std": 1.25, "n": 2, "paper": 48.5, "paper_std": 0.2},
                     "ms": {"mean": 9.5, "std": None, "n": 1, "paper": None, "paper_std": None}},
                    {"method": "AdvMoE", "ra": {"mean": 50.0, "std": 2.5, "n": 2, "paper": 51.8, "paper_std": None},
                     "ms": None},
                ],
            }],
            "figures": [{"id": "epochs", "title": "By epoch", "caption": "Rising.", "kind": "lines",
                         "data": {"AdvMoE": points}, "options": {"xlabel": "epoch", "ylabel": "%"},
                         "svg": "figures/epochs.svg", "png": "figures/epochs.png"}],
            "claims": [{"name": "ordering", "statement": "AT < AdvMoE.", "source": "sec. 4", "verdicts": [
                {"measure": "PGD", "verdict": "holds", "p_value": 0.03125, "test": "over 5 seeds", "numbers": numbers,
                 "note": ""},
                {"measure": "worst case", "verdict": "undecided", "p_value": None, "test": "none: 1 seed",
                 "numbers": {}, "note": "Too little data."},
            ]}],
            "runs": [
                {"name": "AT", "key": "aa", "seed": 0, "status": "finished", "seconds": 60.0, "path": "runs/aa",
                 "error": None},
                {"name": "AdvMoE", "key": "bb", "seed": 1, "status": "failed", "seconds": None, "path": "runs/bb",
                 "error": "loss is NaN"},
            ],
        } | changed  # fmt: skip
        (path / "study.json").write_text(json.dumps(content))
        return path

    return write


@pytest.fixture
def make_study(write_study: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Writes studies for one test."""
    return partial(write_study, tmp_path)
