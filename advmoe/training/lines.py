"""What a run tells of its epochs, for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, SupportsFloat

from advmoe.text import aligned, duration, percent


def epoch_line(line: Mapping[str, Any], *, epochs: int, best: bool, left: float | None) -> str:
    """An epoch as it is told: `line` is its entry of `metrics.jsonl`.

    Of each level the means of its losses, of the last one its accuracy on clean images too (under PGD-AT on attacked
    ones); the validation's accuracies (in percent), clean and under attack, and whether they are the `best` yet; the
    mean over MoE layers of the largest expert's share, and how many experts no image chose; the epoch's seconds, and
    about how many are `left`.
    """
    words = [f"epoch {line['epoch']}/{epochs}", *([line["phase"]] if "phase" in line else [])]
    # Experts last, whichever level an epoch began with.
    levels = sorted(line["train"].items(), key=lambda level: level[0] == "experts")
    for i, (part, means) in enumerate(levels):
        words.append(_level(part, means, last=i == len(levels) - 1))
    if (val := line["val"]) is not None:
        robust = f" / robust {percent(val['robust_accuracy'])}" if "robust_accuracy" in val else ""
        words.append(f"val {percent(val['clean_accuracy'])}{robust}{' (best)' if best else ''}")
    if layers := line["layers"]:
        load = sum(max(layer["load"]) for layer in layers) / len(layers)
        dead = sum(len(layer["dead_experts"]) for layer in layers)
        words.append(f"load {load:.2f}{f' ({dead} dead)' if dead else ''}")
    words.append(duration(line["seconds"]))
    if left:
        words.append(f"left {duration(left)}")
    return "  ".join(words)


def _level(part: str, means: Mapping[str, float], *, last: bool) -> str:
    shown = {name: value for name, value in means.items() if name != "accuracy" and (last or name != "ce")}
    terms = [f"{name} {value:.2f}" for name, value in (shown or means).items() if name != "accuracy"]
    if last and "accuracy" in means:
        terms.append(f"acc {percent(means['accuracy'])}%")
    return " ".join([part, *terms])


def terms_line(terms: Mapping[str, SupportsFloat]) -> str:
    """A step's loss terms as the bar shows them."""
    return " ".join(f"{name} {float(value):.3g}" for name, value in terms.items())


def summary(progress: Mapping[str, Any], *, epochs: int, steps: int) -> str:
    """What a finished run came to: `progress` is its last checkpoint's; `steps` of the validation's attack."""
    best, rows = progress["best"], []
    if best is not None and (val := best["val"]) is not None:
        told = f"clean {percent(val['clean_accuracy'])} %"
        if "robust_accuracy" in val:
            told += f", robust {percent(val['robust_accuracy'])} % under PGD-{steps}"
        rows.append(["best", f"epoch {best['epoch']} of {epochs}: {told} (validation)"])
    rows.append(["time", duration(progress["wall_seconds"])])
    return "\n".join(aligned(rows))
