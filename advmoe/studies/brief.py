"""What a finished task of a study came to, in a few words. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from advmoe.rundir import METRICS, Epochs, read_result
from advmoe.studies.plan import PlannedRun, StudyTask
from advmoe.studies.results import pace_bounds
from advmoe.text import macs, percent


def brief(task: StudyTask) -> str:
    """The numbers that tell most of a finished task; empty where its results say none of them."""
    try:
        if isinstance(task, PlannedRun):
            return _trained(Epochs.read(task.path / METRICS).lines)
        return _MEASURED[task.kind](read_result(task.result))
    except (OSError, ValueError, LookupError, TypeError):  # a line less, and no study lost
        return ""


def _trained(epochs: list[dict[str, Any]]) -> str:
    val, number = epochs[-1]["val"], f"{len(epochs)} epoch{'s' * (len(epochs) > 1)}"
    return number if val is None else f"{number}, val {_accuracies(val)}"


def _accuracies(found: Mapping[str, Any]) -> str:
    robust = found.get("robust_accuracy")
    clean = f"clean {percent(found['clean_accuracy'])} %"
    return clean if robust is None else f"{clean}, robust {percent(robust)} %"


def _evaluated(found: dict[str, Any]) -> str:
    attacks = [f"{name} {percent(share)} %" for name, share in found["robust_accuracy"].items()]
    worst = [f"worst case {percent(found['worst_case'])} %"] if len(attacks) > 1 else []
    return ", ".join([f"clean {percent(found['clean_accuracy'])} %", *attacks, *worst])


def _swept(found: dict[str, Any]) -> str:
    points = found["curves"]["worst case"]["points"]
    suspected = any(curve["masking"]["suspected"] for curve in found["curves"].values())
    shares = " ".join(percent(point["robust_accuracy"]) for point in points)
    return f"worst case over {len(points)} radii {shares} %{', masking suspected' if suspected else ''}"


def _dissected(found: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {percent(each['robust_accuracy'])} %, routers {percent(each['router_robustness'])} %"
        for name, each in found.items()
    )


def _traced(found: dict[str, Any]) -> str:
    unchanged = percent(found["attack"]["unchanged"])
    return f"{found['clean']['distinct']} pathways, unchanged by the attack {unchanged} %"


def _costed(found: dict[str, Any]) -> str:
    kind, last = next(iter(found["models"])), found["batches"][-1]
    return f"{macs(found['models'][kind]['gmacs'])}, {last['ms_per_image'][kind]:.3g} ms/image"


def _paced(found: dict[str, Any]) -> str:
    bounds = pace_bounds(found)
    spread = "" if bounds is None else f" ({bounds[0]:.2f} to {bounds[1]:.2f})"
    return f"{found['ratio']:.2f} of the other's time{spread}"


_MEASURED: Mapping[str, Callable[[dict[str, Any]], str]] = {
    "evaluate": _evaluated, "sweep": _swept, "dissect": _dissected, "pathways": _traced, "cost": _costed,
    "pace": _paced,
}  # fmt: skip
