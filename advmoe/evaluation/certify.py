"""How far choices of experts are proved: by the exact radius of half-spaces, or by bounds beside an attack.

Axes: `N` examples, `B` bits, `L` MoE layers. Radii are norms of perturbations of pixels in [0, 1] that stay there;
shares are fractions.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from advmoe.attacks.routed import Halfspaces, stride
from advmoe.attacks.routed.flips import changed_choices
from advmoe.attacks.routed.regions import distances, radii, reachable
from advmoe.errors import InputError
from advmoe.evaluation.bounds import ChoiceBounds
from advmoe.evaluation.boxes import Unbounded
from advmoe.evaluation.halfspaces import halfspace_router
from advmoe.evaluation.intervals import wilson
from advmoe.evaluation.scoring import OpenRouting, measuring, stream, take
from advmoe.evaluation.subject import Options, UnderAttack, open_subject, options_of
from advmoe.pool import threads_set
from advmoe.progress import tracked
from advmoe.rundir import CERTIFICATION, write_result
from advmoe.seeding import generator_for
from advmoe.text import by_layer, listing, percent, radius, show, tabular, wrapped
from advmoe.threat import ThreatModel

RADII = (2 / 255, 4 / 255, 8 / 255)
_QUANTILES = (5, 25, 50, 75, 95)


def certify_run(
    target: str | Path, options: Options | None = None, *, epsilons: Sequence[float] = RADII, **keywords: Any
) -> tuple[Path, dict[str, Any]]:
    """Within which radii the choices of a routed run are proved, on its test images.

    Args:
        epsilons: radii in the norm of the run's threat model.
        options, keywords: see `Options`; the attack on choices takes steps and restarts of `attack`.

    Writes `certification.json`; returns its folder and its content: `method` (`exact` for choices that are sides of
    hyperplanes, else `bounds` or, where none can be computed, `attack`, with `unbounded`, of what none are known),
    `pathways_in_use`, how many the images take (a constant route is proved too), and for each radius in `points` the
    shares of images whose every choice is `proved` (with a 95% `interval`), `changed` by some perturbation, and
    `unknown`. By bounds `points` also hold the share proved in each of the L `layers`. Exact results hold the `radius`
    of each image in both norms (null where nothing changes a choice) with `quantiles`, and in `points` the share of
    images by the number of `pathways` within reach. Raises `InputError` for a model without MoE layers and whatever
    else cannot be used.
    """
    options = options_of(options, keywords)
    if options.attacks is not None:
        rule = "left out: choices are attacked with the steps and restarts of `attack`"
        raise InputError(f"attacks to certify must be {rule}, got {show(options.attacks)}")
    subject = open_subject(target, options)
    attacked = subject.routed_under_pgd("certify")
    threats = ThreatModel.ascending(subject.threat.norm, epsilons)
    with threads_set(options.threads):
        attacked.check(options.allow)
        space = attacked.job.setting.halfspaces
        found = _by_attack(attacked, threats) if space is None else _exact(attacked, space, threats)
        found["pathways_in_use"] = _in_use(attacked)
    result = {
        **found, "num_examples": len(subject.data), "index": subject.index.tolist(),
        "threat": {"norm": subject.threat.norm}, "seed": subject.seed, **subject.described,
    }  # fmt: skip
    subject.home.mkdir(parents=True, exist_ok=True)
    return subject.home, write_result(subject.home / CERTIFICATION, result)


@torch.no_grad()
def _in_use(attacked: UnderAttack) -> int:
    """How many pathways the images take."""
    model = OpenRouting(attacked.predict)
    examples = stream(attacked.job.data, _batches(attacked), attacked.device)
    with closing(examples), measuring(attacked.predict, attacked.device):
        taken = [model(x).pathway.flatten(1).cpu().unique(dim=0) for x, _ in examples]
    return len(torch.cat(taken).unique(dim=0))


def _batches(attacked: UnderAttack) -> list[slice]:
    job = attacked.job
    return [job.examples(task) for task in job.tasks(attacked.names[:1])]


def _exact(attacked: UnderAttack, space: Halfspaces, threats: Sequence[ThreatModel]) -> dict[str, Any]:
    norm, parts, router = threats[0].norm, list[tuple[Tensor, ...]](), halfspace_router(attacked.predict)
    assert router is not None
    examples = stream(attacked.job.data, slices := _batches(attacked), attacked.device)
    with closing(examples), measuring(attacked.predict, attacked.device), torch.no_grad():
        for x, _ in tracked(examples, "radii", total=len(slices)):
            own, away = router.bits(x), distances(space, x)
            if bool(((own != (away > 0)) & (away.abs() > space.slack)).any()):
                raise RuntimeError("a choice is on another side of its hyperplane than computed: please report this")
            linf, l2 = (radii(space, x, each, own=own).amin(1) for each in ("linf", "l2"))
            kept, lost = (radii(space, x, norm, own=own, rounding=r).amin(1) for r in (-1, 1))
            reach = [torch.stack([able for _, able in reachable(space, x, threat)]).sum(0) for threat in threats]
            parts.append(tuple(each.cpu() for each in (linf, l2, kept, lost, *reach)))
    linf, l2, kept, lost, *numbers = (torch.cat(column) for column in zip(*parts, strict=True))
    points = [
        _point(threat.eps, kept > threat.eps, lost <= threat.eps)
        | {"pathways": {str(n): (number == n).double().mean().item() for n in number.unique().tolist()}}
        for threat, number in zip(threats, numbers, strict=True)
    ]
    per_image = {"linf": linf, "l2": l2}
    return {
        "method": "exact", "bits": len(space.weights), "points": points,
        "radius": {name: [v if v < torch.inf else None for v in each.tolist()] for name, each in per_image.items()},
        "quantiles": {name: _quantiles(each) for name, each in per_image.items()},
    }  # fmt: skip


def _quantiles(values: Tensor) -> dict[str, float | None]:
    ordered = values.sort().values
    chosen = {f"p{q}": ordered[min(len(ordered) - 1, q * len(ordered) // 100)].item() for q in _QUANTILES}
    return {name: value if value < torch.inf else None for name, value in chosen.items()}


def _by_attack(attacked: UnderAttack, threats: Sequence[ThreatModel]) -> dict[str, Any]:
    """Proved where bounds can be computed, changed where an attack changes a choice."""
    changed = _changed(attacked, threats)
    attack = attacked.job.setting.attack
    told = {"attack": {"steps": attack.steps, "restarts": attack.restarts}}
    try:
        proved = _proved(attacked, threats)
    except Unbounded as none:
        points = [_point(t.eps, torch.zeros_like(moved), moved) for t, moved in zip(threats, changed, strict=True)]
        return {"method": "attack", "unbounded": str(none), **told, "points": points}
    points = [
        _point(threat.eps, sure.all(1), moved) | {"layers": sure.double().mean(0).tolist()}
        for threat, sure, moved in zip(threats, proved, changed, strict=True)
    ]
    return {"method": "bounds", **told, "points": points}


def _proved(attacked: UnderAttack, threats: Sequence[ThreatModel]) -> list[Tensor]:
    """Which choices bounds prove at each radius, (N, L) booleans. Raises `Unbounded`."""
    predict, data, device = attacked.predict, attacked.job.data, attacked.device
    with measuring(predict, device):
        bounds = ChoiceBounds(predict)
        bounds.check(take(data, slice(0, 1), device)[0])
    proved: list[list[Tensor]] = [[] for _ in threats]
    with closing(stream(data, slices := _batches(attacked), device)) as examples:
        for x, _ in tracked(examples, "bounds", total=len(slices)):
            for threat, sure in zip(threats, proved, strict=True):
                sure.append(bounds.proved(x, threat.eps).cpu())
    return list(map(torch.cat, proved))


def _changed(attacked: UnderAttack, threats: Sequence[ThreatModel]) -> list[Tensor]:
    """Of which images an attack changes a choice within each radius, (N,) booleans."""
    predict, job, device = attacked.predict, attacked.job, attacked.device
    steps, restarts = job.setting.attack.steps, job.setting.attack.restarts
    changed: list[list[Tensor]] = [[] for _ in threats]
    slices = _batches(attacked)
    with closing(stream(job.data, slices, device)) as examples, measuring(predict, device):
        for index, (x, _) in zip(slices, tracked(examples, "choices", total=len(slices)), strict=True):
            before = torch.zeros(len(x), dtype=torch.bool, device=device)
            for threat, moved in zip(threats, changed, strict=True):
                sizes = [stride(float(job.setting.attack.step_size), steps, threat.eps)] * steps
                for restart in range(restarts):
                    generator = generator_for(job.seed, "choices", index.start, restart)
                    before = before | changed_choices(
                        OpenRouting(predict), x, threat=threat, sizes=sizes, generator=generator
                    )
                moved.append(before.cpu())  # a ball contains every smaller one
    return list(map(torch.cat, changed))


def _point(eps: float, proved: Tensor, changed: Tensor) -> dict[str, Any]:
    """One radius: what is proved, changed and unknown of each image, (N,) booleans, as shares."""
    total, sure, moved = len(proved), int(proved.sum()), int(changed.sum())
    if bool((proved & changed).any()):
        raise RuntimeError("an attack changed a choice that is proved: please report this")
    return {
        "eps": eps, "proved": sure / total, "interval": list(wilson(sure, total)), "changed": moved / total,
        "unknown": (total - sure - moved) / total,
    }  # fmt: skip


_METHODS = {
    "exact": "choices are sides of hyperplanes: exact radii",
    "bounds": "proved by interval bounds, changed by an attack",
    "attack": "no bounds are known of {unbounded}: changed by an attack, else unknown",
}


def table(result: dict[str, Any]) -> str:
    """A result of `certify_run` as aligned lines for a terminal; shares in percent."""
    norm, exact = result["threat"]["norm"], result["method"] == "exact"
    rows = [
        (
            radius(each["eps"], norm), f"{percent(each['proved'])} %", " to ".join(map(percent, each["interval"])),
            f"{percent(each['changed'])} %", f"{percent(each['unknown'])} %",
            *([", ".join(f"{n}: {percent(share)}" for n, share in each["pathways"].items())] if exact else []),
        )
        for each in result["points"]
    ]  # fmt: skip
    heads = ["eps", "proved", "95% interval", "changed", "unknown"]
    heads += ["images by pathways within reach, %"] if exact else []
    how = _METHODS[result["method"]].format_map(result)
    lines = [
        *wrapped(f"{result['num_examples']} images, {norm}; {how}"),
        f"pathways in use: {result['pathways_in_use']}", "",
        *tabular(heads, rows, "><><><"),
    ]  # fmt: skip
    layers = [(radius(each["eps"], norm), by_layer(each["layers"])) for each in result["points"] if "layers" in each]
    lines += ["", *listing([("eps", "proved in layer, %"), *layers], ">")] if layers else []
    for name, each in result.get("quantiles", {}).items():
        known = ", ".join(f"{q} {'none' if v is None else f'{v:.4f}'}" for q, v in each.items())
        lines += ["", *wrapped(f"smallest perturbation that changes a choice, {name}: {known}", "  ")]
    return "\n".join(lines)


def shares(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The three shares of each radius, for a figure."""
    norm = result["threat"]["norm"]
    return {
        radius(each["eps"], norm): {name: each[name] for name in ("proved", "unknown", "changed")}
        for each in result["points"]
    }
