"""A model's entry in a zoo, and its files, made from a run and its evaluations: no number is typed."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from advmoe.documents import read_arrays
from advmoe.errors import InputError
from advmoe.evaluation.outcomes import classified, make_job
from advmoe.evaluation.subject import Subject, open_subject
from advmoe.files import checksum, read_object, require_writable, write_text, write_whole
from advmoe.hub.card import Record, model_card
from advmoe.models import Classifier
from advmoe.models.runs import load_run
from advmoe.models.state import digest, savable, write_tensors
from advmoe.rundir import CONFIG, DIGEST, EXAMPLES, MODEL, WEIGHTS, digest_at
from advmoe.text import show
from advmoe.zoo import FILES, INDEX, NAME, Entry, online

LEAST_AGREEMENT = 0.99
"""The share of the evaluated images on which rounded weights must predict what the evaluated ones did."""
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Evaluated:
    """An evaluation of a run's model: its numbers, and the images and predictions behind them."""

    folder: Path
    result: Mapping[str, Any]
    index: npt.NDArray[Any]
    """The place of each image in the test set, (N,)."""
    predicted: npt.NDArray[Any]
    """Classes without an attack, (N,)."""

    @staticmethod
    def read(folder: Path, model: str | None) -> Evaluated:
        """The evaluation in `folder`. Raises `ValueError` where it is missing, damaged or of another model than the one
        with the digest `model`.
        """
        record = Record.read(folder, model)
        if record.evaluation is None:
            why = "one of other weights" if record.note else "none"
            raise InputError(f"an evaluation of the run's model must lie in {folder} (advmoe evaluate), got {why}")
        arrays = read_arrays(folder / EXAMPLES, ("index", "clean_predicted"))
        if len(arrays) < 2 or len({len(each) for each in arrays.values()} | {record.evaluation["num_examples"]}) > 1:
            raise InputError(f"{folder / EXAMPLES} must hold every image of the evaluation beside it, got other ones")
        return Evaluated(folder, record.evaluation, arrays["index"], arrays["clean_predicted"])


def numbers(evaluations: Sequence[Mapping[str, Any]], hardware: str | None = None) -> dict[str, Any]:
    """What an index says was measured of a model.

    SA and RA by attack are from the evaluation with the most images that has them; the worst case, the masking gap,
    flags and cost from the one with the most attacks. The time of an image is kept where `hardware` says on what it was
    taken. Raises `ValueError` for evaluations under several threat models.
    """
    threats = [{"norm": each["threat"]["norm"], "eps": each["threat"]["eps"]} for each in evaluations]
    if any(each != threats[0] for each in threats):
        raise InputError(f"evaluations must be under one threat model, got {show(threats)}")
    accuracy: dict[str, dict[str, Any]] = {}
    for each in sorted(evaluations, key=lambda each: -int(each["num_examples"])):
        for name, value in {"clean": each["clean_accuracy"], **each["robust_accuracy"]}.items():
            accuracy.setdefault(name, {"value": value, "images": each["num_examples"]})
    strongest = _strongest(evaluations)
    if "cost" not in strongest:
        raise InputError("the evaluation with the most attacks must hold the model's cost, got one without")
    flags = {name: list(report["flags"]) for name, report in strongest["attacks"].items() if report.get("flags")}
    cost, kept = strongest["cost"], ["gmacs", "parameters", "active_parameters"]
    if hardware is not None:
        kept += ["ms_per_image", "batch", "device", "threads", "precision", "kernels"]
    return {
        "threat": threats[0],
        "accuracy": accuracy,
        "worst_case": {
            "value": strongest["worst_case"], "images": strongest["num_examples"],
            "attacks": list(strongest["robust_accuracy"]),
        },
        "masking_gap": strongest["masking_gap"],
        **{name: strongest[name] for name in ("gradient_passes",) if name in strongest},
        "flags": flags,
        "cost": {name: cost[name] for name in kept if name in cost} | ({"hardware": hardware} if hardware else {}),
    }  # fmt: skip


def _strongest(evaluations: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The one with the most attacks, of those the one with the most images."""
    return max(evaluations, key=lambda each: (len(each["robust_accuracy"]), each["num_examples"]))


def _together(evaluations: Sequence[Mapping[str, Any]], known: Mapping[str, Any]) -> Mapping[str, Any]:
    """The evaluations as a card shows them, with the numbers that the index has (`numbers`)."""
    accuracy = known["accuracy"]
    robust = {name: each["value"] for name, each in accuracy.items() if name != "clean"}
    told = {"clean_accuracy": accuracy["clean"]["value"], "robust_accuracy": robust, "cost": known["cost"]}
    images = {name: each["images"] for name, each in accuracy.items()}
    return {**_strongest(evaluations), **told, **({"images": images} if len(set(images.values())) > 1 else {})}


def rounded(model: Classifier) -> tuple[Classifier, dict[str, Tensor]]:
    """A model with its weights rounded to float16, in float32 as it computes, and its state as float16. Raises
    `ValueError` for a weight beyond float16's range.
    """
    small = copy.deepcopy(model)
    state = {name: value.half() if value.is_floating_point() else value for name, value in small.state_dict().items()}
    if beyond := [name for name, value in state.items() if not value.isfinite().all()]:
        raise InputError(f"weights must be finite and at most 65504 to be rounded to float16, got {beyond[0]} beyond")
    small.load_state_dict(state)
    return small, state


@dataclass(frozen=True)
class Label:
    """What an entry says of a model that no file of a run does."""

    name: str
    """In the zoo: small letters, digits and hyphens."""
    title: str
    """What the model is, in words."""
    licence: str
    """Of the weights, as `apache-2.0`."""
    data: str
    """What the test images are, in words."""
    url: str | None = None
    """The address of the folder where the files are to lie; by default they are read from the zoo."""
    hardware: str | None = None
    """On what the evaluations' `ms_per_image` was taken; without it the time is left out."""


def make_entry(
    run: str | Path,
    label: Label,
    *,
    evaluations: Sequence[str | Path] = (),
    out: str | Path = "zoo",
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[Entry, Path]:
    """Put a run's model into the zoo `out`, new or existing, and return its entry and its folder there.

    Args:
        label: with the name; an entry of that name is replaced.
        evaluations: folders of evaluations of this run (`advmoe evaluate --out`); by default the run.
        overrides: fields that replace those of the run's configuration: where the test images lie.

    Weights are rounded to float16, which must leave at least 99% of the predictions as the evaluations have them; how
    many it left is in the entry. Raises `ValueError` for what cannot be used, before anything is written.
    """
    run, out = Path(run), Path(out)
    if not NAME.fullmatch(label.name):
        rule = "small letters and digits, in words joined by -"
        raise InputError(f"name must be {rule}, got {show(label.name)}")
    if label.url and not (online(label.url) or NAME.fullmatch(label.url)):
        raise InputError(f"url must be an http(s) address or a folder's name, got {show(label.url)}")
    model = load_run(run)
    if "source" in model.spec:
        raise InputError(f"a zoo's model must be of a backbone of this library's, got {run} with a network of its own")
    record = Record.read(run, digest_at(run))
    if record.config is None:
        raise InputError(f"a run directory must hold {CONFIG}, got {str(run)!r}")
    measured = [Evaluated.read(Path(each), digest_at(run)) for each in evaluations or [run]]
    results = [each.result for each in measured]
    known = numbers(results, label.hardware)
    subject = open_subject(run, overrides=overrides, accelerator="cpu", writes=False)
    small, state = rounded(model)
    small.spec.setdefault("classes", list(subject.classes))
    agreements = [_agreement(small, subject, each) for each in measured]
    told = {
        "title": label.title, "url": label.url or label.name, "licence": label.licence, "data": label.data,
        "architecture": model.spec["name"], "kind": model.spec["kind"], "method": record.config.training.method,
        **known, "agreement": max(agreements, key=lambda each: each["images"]), "model_sha256": digest(small),
    }  # fmt: skip
    shown = replace(record, evaluation=_together(results, known), note=None)
    texts = {
        CONFIG: record.texts[CONFIG], MODEL: json.dumps(small.spec, indent=2) + "\n",
        "README.md": model_card(small.spec, shown, name=label.name, license=label.licence),
    }  # fmt: skip
    return _write(out, label.name, told, texts, state), out / label.name


def _write(out: Path, name: str, told: dict[str, Any], texts: Mapping[str, str], state: Mapping[str, Tensor]) -> Entry:
    """Write an entry's files and weights into the zoo `out`, and its line of the index last."""
    index = read_object(out / INDEX) if (out / INDEX).is_file() else {"models": {}}
    if not isinstance(index.get("models"), dict):
        raise InputError(f"{out / INDEX} must hold an object `models`, got {show(index.get('models'))}")
    Entry.of(name, told | {"files": dict.fromkeys(FILES, "0" * 64)}, out)
    folder = out / name
    require_writable("--out", folder)
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in texts.items():
        write_text(folder / file, text)
    write_whole(folder / WEIGHTS, lambda path: write_tensors(path, savable(state), {DIGEST: told["model_sha256"]}))
    told = told | {"files": {file: checksum(folder / file) for file in FILES}}
    index["models"][name] = told
    write_text(out / INDEX, json.dumps(index, indent=2) + "\n")
    return Entry.of(name, told, out)


def _agreement(model: Classifier, subject: Subject, evaluated: Evaluated) -> dict[str, int]:
    """On how many of the evaluated images `model` predicts what the evaluated model did."""
    if evaluated.index.max() >= len(subject.data):
        raise InputError(f"data must be the test images of {evaluated.folder}, got {len(subject.data)} images")
    images = subject.data.subset(torch.from_numpy(evaluated.index))
    job, _ = make_job(model, images, subject.measurement(), _CPU)
    same = int((classified(model, job, _CPU).predicted.numpy() == evaluated.predicted).sum())
    if same < LEAST_AGREEMENT * len(evaluated.index):
        rule = f"be of this model and these images: at least {LEAST_AGREEMENT:.0%} of its predictions must be the same"
        raise InputError(f"{evaluated.folder} must {rule} as float16, got {same} of {len(evaluated.index)}")
    return {"images": len(evaluated.index), "same": int(same)}
