"""Which pathways images take: how many there are, how classes share them, how an attack moves them, and what they have
in common with a static mask (Zhang et al., 2023, fig. 6) or with another model's.

Axes: `N` examples, `C` channels, `H W` size, `L` MoE layers, `T` tokens, `E` experts, `K` classes. Shares and IoU are
fractions, entropies are in bits.

Where tokens are routed one by one, a pathway is all choices of an image, (L, T); loads, class shares and flows count
tokens, and no pathway is listed.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from advmoe.attacks.pgd import Predict
from advmoe.errors import InputError
from advmoe.evaluation.accuracy import placed
from advmoe.evaluation.dissection import Dissection, dissect, expert_load
from advmoe.evaluation.distributions import random_masks, random_pathways, summary
from advmoe.evaluation.harness import tell_attack
from advmoe.evaluation.overlap import (
    Units,
    class_overlap,
    iou,
    mean_of_others,
    read_masks,
    require_same_banks,
    units_of,
)
from advmoe.evaluation.scoring import take
from advmoe.evaluation.subject import Options, digest_of, open_subject, options_of, require_pgd
from advmoe.files import write_arrays
from advmoe.models import Classifier
from advmoe.models.runs import load_run
from advmoe.moe.routing import pathway
from advmoe.pool import threads_set
from advmoe.progress import outermost
from advmoe.rundir import DIGEST, MASKS, PATHWAYS, require_plain, write_result
from advmoe.text import listing, percent, tabular, wrapped

EXAMPLES = "pathways-examples.npz"
"""Beside it: `index`, each image's position in the test set, and whether its pathway was left `unchanged`, (N,)."""

FREQUENT = 10
"""Pathways that are listed."""

Reference = tuple[Units, Dissection | None]
"""What pathways are compared with: a mask's units, or another model's and its choices on the same images."""


def pathway_statistics(
    model: nn.Module,
    x: Tensor,
    x_adv: Tensor,
    y: Tensor,
    *,
    against: nn.Module | str | Path | None = None,
    num_classes: int | None = None,
    batch_size: int = 250,
) -> dict[str, Any]:
    """Which pathways a routed model takes, on clean images and under an attack.

    Args:
        model: routed, (N, C, H, W) pixels -> logits; run under hard routing, in eval mode and fp32, and restored.
        x: clean images, (N, C, H, W) in [0, 1]. x_adv: an adversarial image for each, made by the caller.
        y: true classes, (N,), of 0 ... K - 1. num_classes: K, by default the highest of `y`, plus 1.
        against: another routed model of the same banks, which is shown the same images, or a sparse run's `masks.json`.
        batch_size: images per pass. Time grows with the square of the distinct pathways besides.

    Returns, ready for JSON:
        num_examples, num_classes, num_layers, num_experts, tokens: N, K, L, E, and T or None.
        clean, adversarial:
            distinct: pathways that occur. entropy: of their distribution. max_entropy: the most that it can be, of N
                images and so many experts.
            frequent: the most frequent pathways of two images or more, equals by their experts' indices: `pathway`
                (L), `count`, `share`, and `classes` of their images, each {class, share}, the largest first.
            load: share of images that each layer sends to each expert, L x E.
            class_shares: the same of each class's images, K x L x E; None for a class without any.
            flows: share of images that take expert i in layer l and j in layer l + 1, (L - 1) x E x E.
            class_iou: mean IoU of two images' pathways by their classes, K x K, to 6 decimals; None without two.
            iou_within_classes, iou_between_classes: the mean over all such pairs; None without any.
        attack: `unchanged`, the share of images whose every choice survives, and `iou` of each image's clean and
            adversarial pathway, a distribution.
        against: None, or `kind` (mask or pathways), the distributions of the IoU `clean` and `adversarial`, and of what
            chance gives: `random_pathways`, where every choice is random; for a mask `random_masks`, which keep as many
            rows of each layer; for pathways `other_images`, the mean IoU `clean` and `adversarial` of different images.
    A distribution is what `distributions.summary` returns.

    Raises `ValueError` for a model without MoE layers, data that do not match, or other banks than the model's.
    """
    choices = dissect(model, x, x_adv, y, batch_size=batch_size)
    reference: Reference | None = None
    if against is not None:
        units = _comparable(model, against, x[:1])
        theirs = dissect(against, x, x_adv, y, batch_size=batch_size) if isinstance(against, nn.Module) else None
        reference = units, theirs
    return statistics(choices, units_of(model), num_classes=num_classes, other=reference)


def _comparable(model: nn.Module, against: nn.Module | str | Path, x: Tensor) -> Units:
    """The units of `against`. Raises `ValueError` where its pathway of an image `x` (1, C, H, W) is of another kind."""
    units = units_of(against) if isinstance(against, nn.Module) else read_masks(Path(against))
    require_same_banks("against", units_of(model), units)
    for routed in (model, against):
        if isinstance(routed, nn.Module) and pathway(routed, x.to(next(routed.parameters()).device)).dim() == 3:
            rule = "against must be left out where tokens are routed one by one"
            raise InputError(f"{rule}, got {type(against).__name__ if routed is against else 'such a model'}")
    return units


def statistics(
    choices: Dissection, units: Units, *, num_classes: int | None = None, other: Reference | None = None
) -> dict[str, Any]:
    """What `pathway_statistics` returns, of choices that are known already.

    Args: choices: with labels. units: of the model, as of `overlap.units_of`. num_classes: K. other: of the same banks.
    """
    labels = choices.labels
    assert labels is not None
    highest = int(labels.max())
    num_classes = highest + 1 if num_classes is None else num_classes
    if highest >= num_classes or int(labels.min()) < 0:
        raise InputError(f"y must lie in 0 ... {num_classes - 1}, got {int(labels.min())} ... {highest}")
    kinds = {"clean": choices.clean_pathway, "adversarial": choices.adv_pathway}
    return {
        "num_examples": len(labels),
        "num_classes": num_classes,
        "num_layers": choices.clean_pathway.shape[1],
        "num_experts": choices.num_experts,
        "tokens": choices.clean_pathway.shape[2] if choices.clean_pathway.dim() == 3 else None,
        **{kind: _of_kind(pathways, labels, units, num_classes) for kind, pathways in kinds.items()},
        "attack": {
            "unchanged": int((~choices.flipped.any(1)).sum()) / len(labels),
            "iou": summary(iou(choices.clean_pathway, choices.adv_pathway, units, units).numpy()),
        },
        "against": None if other is None else _compared(kinds, units, *other),
    }


def _of_kind(pathways: Tensor, labels: Tensor, units: Units, num_classes: int) -> dict[str, Any]:
    """The statistics of the clean or the adversarial pathways, (N, L) or (N, L, T)."""
    experts, tokens = max(map(len, units)), pathways[0, 0].numel()
    _, inverse, counts = pathways.flatten(1).unique(dim=0, return_inverse=True, return_counts=True)
    shares = counts.double() / len(pathways)
    most = tokens * sum(math.log2(len(unit)) for unit in units)
    overlap = class_overlap(pathways, labels, units, num_classes)
    members = [pathways[labels == each] for each in range(num_classes)]
    return {
        "distinct": len(counts),
        "entropy": float(-(shares * shares.log2()).sum().clamp(max=0)),
        "max_entropy": min(most, math.log2(len(pathways))),
        "frequent": _frequent(pathways, labels, inverse, counts) if pathways.dim() == 2 else [],
        "load": expert_load(pathways, experts),
        "class_shares": [expert_load(own, experts) if len(own) else None for own in members],
        "flows": _flows(pathways, experts),
        "class_iou": [[None if math.isnan(v) else round(v, 6) for v in row] for row in overlap.means.tolist()],
        "iou_within_classes": overlap.within,
        "iou_between_classes": overlap.between,
    }


def _frequent(pathways: Tensor, labels: Tensor, inverse: Tensor, counts: Tensor) -> list[dict[str, Any]]:
    """The most frequent pathways. `inverse`: the distinct one of each image, (N,). `counts`: how often each occurs."""
    listed = []
    for which in counts.argsort(descending=True, stable=True)[:FREQUENT].tolist():
        among, count = inverse == which, int(counts[which])
        if count < 2:
            break
        of_class = torch.bincount(labels[among])
        order = of_class.argsort(descending=True, stable=True)[: int((of_class > 0).sum())].tolist()
        listed.append({
            "pathway": pathways[among][0].tolist(), "count": count, "share": count / len(pathways),
            "classes": [{"class": each, "share": int(of_class[each]) / count} for each in order],
        })  # fmt: skip
    return listed


def _flows(pathways: Tensor, experts: int) -> list[list[list[float]]]:
    """The share of `pathways`, (N, L) or (N, L, T), that goes from each expert of a layer to each of the next."""
    pairs = (pathways[:, :-1] * experts + pathways[:, 1:]).unbind(1)
    counts = [torch.bincount(pair.flatten(), minlength=experts**2) for pair in pairs]
    return [
        (count.double() / pair.numel()).view(experts, -1).tolist() for count, pair in zip(counts, pairs, strict=True)
    ]


def _compared(kinds: dict[str, Tensor], units: Units, others: Units, theirs: Dissection | None) -> dict[str, Any]:
    """The IoU of pathways with a mask, or with another model's pathways on the same images, and what chance gives."""
    if theirs is None:
        zeros = torch.zeros_like(kinds["clean"])
        overlap = {kind: summary(iou(each, zeros, units, others).numpy()) for kind, each in kinds.items()}
        chance = {"random_pathways": random_pathways(units, others), "random_masks": random_masks(units, others)}
        return {"kind": "mask", **overlap, **chance}
    pairs = {"clean": (kinds["clean"], theirs.clean_pathway), "adversarial": (kinds["adversarial"], theirs.adv_pathway)}
    return {
        "kind": "pathways",
        **{kind: summary(iou(*pair, units, others).numpy()) for kind, pair in pairs.items()},
        "random_pathways": random_pathways(units, others),
        "other_images": {kind: mean_of_others(*pair, units, others) for kind, pair in pairs.items()},
    }


def pathways_run(
    target: str | Path, options: Options | None = None, *, against: str | Path | None = None, **keywords: Any
) -> tuple[Path, dict[str, Any]]:
    """Which pathways a routed run takes, on its test images and under PGD.

    Args:
        against: a sparse run, whose mask its pathways are compared with, or a routed run of the same banks, which is
            shown the same images, clean and attacked.
        options, keywords: see `Options`; of attacks one of PGD's, as in `suite`.

    Every image is attacked, those that are wrong without an attack too. Writes `pathways.json`; returns its folder and
    its content: that of `pathway_statistics`, with `classes` (K names), `attack.name`, `threat`, `seed`, `data`, and
    `against.run`. Raises `InputError` for a model without MoE layers and whatever else cannot be used.
    """
    subject = open_subject(target, options := options_of(options, keywords))
    attacked = subject.routed_under_pgd("trace")
    device, predict, names = attacked.device, attacked.predict, attacked.names
    require_pgd("trace", names, single=True)
    if not isinstance(predict, nn.Module):
        raise InputError(f"a model to trace must be a torch.nn.Module, got {type(predict).__name__}")
    units = units_of(predict)
    other = None if against is None else _reference(Path(against), options.source, predict, device)
    compared = None if other is None else _comparable(predict, other, take(subject.data, slice(0, 1), device)[0])
    mine, theirs = [], []
    with threads_set(options.threads):
        attacked.check(options.allow)
        started = time.perf_counter()
        for batch in attacked.images(names[0]):
            mine.append(dissect(predict, *batch, batch_size=options.batch_size))
            if isinstance(other, nn.Module):
                theirs.append(dissect(other, *batch, batch_size=options.batch_size))
        reference = None if compared is None else (compared, Dissection.merge(theirs) if theirs else None)
        choices = Dissection.merge(mine)
        if outermost():
            share, seconds = choices.survived.double().mean().item(), time.perf_counter() - started
            tell_attack(names[0], share, subject.threat, seconds)
        result = statistics(choices, units, num_classes=len(subject.classes), other=reference)
    result["classes"] = list(subject.classes)
    result["attack"]["name"] = names[0]
    result |= {"threat": asdict(subject.threat), "seed": subject.seed, **subject.described}
    if against is not None:
        result["against"]["run"] = str(against)
        result["against"][DIGEST] = digest_of(other) if isinstance(other, nn.Module) else None
    subject.home.mkdir(parents=True, exist_ok=True)
    unchanged = ~choices.flipped.any(1)
    write_arrays(subject.home / EXAMPLES, {"index": subject.index.numpy(), "unchanged": unchanged.cpu().numpy()})
    return subject.home, write_result(subject.home / PATHWAYS, result, indent=None)


def _reference(path: Path, source: str | None, predict: Predict, device: torch.device) -> nn.Module | Path:
    """The masks of a sparse run, or the model of a routed one. Raises `ValueError` for a run that is neither."""
    require_plain(path)
    if (path / MASKS).is_file():
        return path / MASKS
    model = load_run(path, source)
    if not model.routed:
        raise InputError(f"against must be a sparse run (one that holds a {MASKS}) or a routed one, got {str(path)!r}")
    if isinstance(predict, Classifier):
        ours, theirs = ([each.spec[name] for name in ("in_channels", "input_size")] for each in (predict, model))
        if ours != theirs:
            raise InputError(f"against must take the run's images, of (channels, size) {ours}, got {theirs}")
    placed(model, device)
    return model


def table(result: dict[str, Any]) -> str:
    """A result of `pathways_run` as aligned lines for a terminal; shares in percent."""
    clean, adversarial, attack = result["clean"], result["adversarial"], result["attack"]
    per = f", of {result['tokens']} tokens routed one by one" if result["tokens"] else ""
    rows = [(title, *(_text(kind[name]) for kind in (clean, adversarial))) for name, title in _ROWS.items()]
    quantiles = ", ".join(f"{name} {value:.3f}" for name, value in attack["iou"]["quantiles"].items())
    return "\n".join([
        *wrapped(
            f"{result['num_examples']} images, attacked by {attack['name']}; {result['num_layers']} MoE layers of "
            f"{result['num_experts']} experts{per}"
        ),
        "",
        *tabular(("", "clean", "adversarial"), rows, "<>"),
        "",
        f"pathways unchanged by the attack: {percent(attack['unchanged'])} % of the images",
        *wrapped(f"IoU of the two pathways of an image: mean {attack['iou']['mean']:.3f}, {quantiles}", "  "),
        *_frequent_lines(result),
        *_against_lines(result["against"]),
    ])  # fmt: skip


_ROWS = {
    "distinct": "distinct pathways",
    "entropy": "their entropy (bits)",
    "max_entropy": "  at most",
    "iou_within_classes": "IoU of two images of one class",
    "iou_between_classes": "IoU of two images of two classes",
}


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def _frequent_lines(result: dict[str, Any]) -> list[str]:
    listed = result["clean"]["frequent"][:5]
    if not listed:
        return []
    rows = []
    for each in listed:
        pathway = ("" if result["num_experts"] <= 10 else ".").join(map(str, each["pathway"]))
        shares = (f"{result['classes'][k['class']]}: {percent(k['share'], 0)}" for k in each["classes"][:4])
        rows.append((f"{percent(each['share']):>5} %", pathway, ", ".join(shares)))
    head = "most frequent clean pathways (an expert per layer), and the classes of their images (%)"
    return ["", *wrapped(head, "  "), *listing(rows)]


def _against_lines(against: dict[str, Any] | None) -> list[str]:
    if against is None:
        return []
    names = [name for name in ("clean", "adversarial", "random_pathways", "random_masks") if name in against]
    heads = ["mean", "std", *against["clean"]["quantiles"]]
    rows = []
    for name in names:
        each = against[name]
        values = [each["mean"], each["std"], *each["quantiles"].values()]
        rows.append([name.replace("_", " "), *(f"{value:.3f}" for value in values)])
    for kind, value in against.get("other_images", {}).items():
        rows.append([f"{kind}, of different images", _text(value), *[""] * (len(heads) - 1)])
    what = "the mask of" if against["kind"] == "mask" else "the pathways of"
    return ["", f"IoU with {what} {against['run']}", *tabular(["", *heads], rows, "<>")]
