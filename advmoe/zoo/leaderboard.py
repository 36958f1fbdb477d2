"""The models of a zoo ranked by their worst case: as a page, as lines on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from advmoe.evaluation.intervals import wilson
from advmoe.text import aligned, passes, percent, radius
from advmoe.zoo import PREFIX, Entry, Measured

STRONG = ("autoattack", "autoattack-plus")
"""Attacks of which a ranked worst case must hold one."""
_MISSING = "-"


@dataclass(frozen=True)
class Ranking:
    """The models of one data set and threat model, in their order."""

    title: str
    places: tuple[tuple[int | None, Entry], ...]
    """Each model with its place; None where too few attacks were tried on it."""


def rankings(entries: Iterable[Entry]) -> list[Ranking]:
    """Models ranked by worst case, then by clean accuracy, among those of the same data set and threat model; equal
    worst cases have the same place. Those on which not all that counts was tried come last, without a place.
    """
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(f"{entry.data}, {entry.norm} {radius(entry.eps, entry.norm)}", []).append(entry)
    return [Ranking(title, tuple(_placed(groups[title]))) for title in sorted(groups, key=lambda t: -len(groups[t]))]


def _placed(group: list[Entry]) -> Iterable[tuple[int | None, Entry]]:
    group = sorted(group, key=lambda each: (-each.worst_case.value, -each.accuracy["clean"].value))
    ranked = [each for each in group if not missing_attacks(each)]
    for each in ranked:
        yield 1 + sum(other.worst_case.value > each.worst_case.value for other in ranked), each
    yield from ((None, each) for each in group if missing_attacks(each))


def missing_attacks(entry: Entry) -> list[str]:
    """What was not tried on a model and counts for a place: AutoAttack, and of a routed model `routed`."""
    missing = [] if any(name in STRONG for name in entry.attacks) else ["autoattack"]
    return missing + (["routed"] if entry.routed and "routed" not in entry.attacks else [])


def interval(measured: Measured) -> str:
    """The 95% interval (Wilson) of a measured share, in percent."""
    low, high = wilson(measured.count, measured.images)
    return f"{percent(low)} to {percent(high)}"


def lines(entries: Iterable[Entry]) -> list[str]:
    """The models as a terminal of 80 columns shows them."""
    shown = list[str]()
    for ranking in rankings(entries):
        rows = [["", "model", "worst case %", "clean %", "gap", "MMACs", "parameters"]]
        for place, entry in ranking.places:
            rows.append([
                str(place or _MISSING), entry.name, percent(entry.worst_case.value),
                percent(entry.accuracy["clean"].value), percent(entry.masking_gap), f"{1000 * entry.gmacs:.3g}",
                f"{entry.parameters:,}",
            ])  # fmt: skip
        shown += [ranking.title, *aligned(rows, "><>"), ""]
    return shown


def leaderboard(entries: Mapping[str, Entry]) -> str:
    """The leaderboard in Markdown."""
    parts = [_HEAD]
    head = ["", "model", "worst case %", "95% interval", "images", "SA %", "RA PGD-50 %", "RA AutoAttack %"]
    head += ["masking gap", "GMACs", "parameters", "ms/image"]
    hardware, unranked = dict[str, None](), list[str]()
    for ranking in rankings(entries.values()):
        parts.append(f"## {ranking.title}")
        table = [head, ["---"] * len(head)]
        for place, entry in ranking.places:
            table.append([str(place or _MISSING), f"[`{entry.name}`](#{entry.name})", *_numbers(entry)])
            if entry.time is not None:
                hardware[entry.time.setting] = None
            if missing := missing_attacks(entry):
                unranked.append(f"`{entry.name}` has no place: {' and '.join(missing)} was not tried on it.")
        parts.append("\n".join(f"| {' | '.join(row)} |" for row in table))
    notes = [f"ms/image: {'; '.join(hardware)}."] if hardware else []
    parts += ["\n".join(f"- {note}" for note in notes + unranked)] if notes + unranked else []
    parts.append("## The models")
    parts += [_described(entry) for entry in entries.values()]
    return "\n\n".join(parts) + "\n"


_HEAD = f"""# Leaderboard

The models of the zoo, ranked by worst case: the share of images on which the model is right under every attack.
Beside it stands what one image costs, routers included. `advmoe zoo list` prints the same, and
`advmoe.load("{PREFIX}NAME")` loads a model. [How to use the zoo, and to submit a model](../how-to/zoo.md).

SA and RA are from the largest evaluation that has them, the worst case and the masking gap from the one with the most
attacks, on as many images as stand there. Intervals that overlap do not tell two models apart.
Nor do gaps under other attacks, for part of a gap is what more steps find on any model: each model's stand below."""


def _numbers(entry: Entry) -> list[str]:
    accuracy, worst = entry.accuracy, entry.worst_case
    autoattack = next((accuracy[name] for name in reversed(STRONG) if name in accuracy), None)
    shares = [accuracy["clean"], accuracy.get("pgd-50"), autoattack]
    sa, pgd, aa = (percent(None if each is None else each.value) for each in shares)
    return [
        percent(worst.value), interval(worst), f"{worst.images:,}", sa, pgd, aa, percent(entry.masking_gap),
        f"{entry.gmacs:.4f}", f"{entry.parameters:,}", _MISSING if entry.time is None else f"{entry.time.ms:.2f}",
    ]  # fmt: skip


def _described(entry: Entry) -> str:
    measured = ", ".join(f"{name} {percent(each.value)} ({each.images:,})" for name, each in entry.accuracy.items())
    flags = [f"- Flag of `{attack}`:{flag}" for attack, _, flag in (each.partition(":") for each in entry.flags)]
    same = f"{entry.same.count:,} of {entry.same.images:,}"
    return "\n".join([
        f"### {entry.name}",
        "",
        f"{entry.title}: {entry.model}. Licence: {entry.licence}.",
        "",
        f"- Accuracy in % (images): {measured}.",
        f"- Worst case over {', '.join(entry.attacks)}. {passes(entry.told)}".rstrip(),
        f"- Weights as float16: on {same} evaluated images they predict what the evaluated ones did.",
        *flags,
    ])  # fmt: skip
