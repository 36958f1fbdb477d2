"""The claims of the paper beside what stored studies say of them: read, judged, and put into words.

Verdicts are made anew from the numbers of each comparison, so that results stored under an older rule are judged by
the present one. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from advmoe.errors import InputError
from advmoe.files import read_object
from advmoe.rundir import STUDY
from advmoe.studies.claims import ENOUGH_SEEDS, LEVEL, MARGIN, judged
from advmoe.studies.comparisons import saving
from advmoe.studies.efficiency import PRICE, VARIANTS, cheap, twice
from advmoe.studies.paper_claims import PAPER_CLAIMS, PaperClaim
from advmoe.studies.section4 import BY_ITSELF, ROBUST_FROM, too_short
from advmoe.studies.section4 import M1 as STANDARD
from advmoe.studies.significance import sign_flip
from advmoe.text import one_line, percent, wrapped

NOT_RUN, NOT_JUDGED = "not run at this size", "not judged at this size"


@dataclass(frozen=True)
class Judgement:
    """What one stored study says of a claim, under one measure."""

    run: str = ""
    """The study's folder and, where it has several, the setting."""
    measure: str = ""
    found: str = ""
    """Means."""
    models: str = NOT_RUN
    """The verdict over trained models."""
    these: str = ""
    """The verdict over images of the models that were trained; empty where images were not compared."""


def stored(folder: Path) -> dict[str, dict[str, Any]]:
    """The studies in a folder, or in its folder `studies`, by the names of theirs.

    Raises `ValueError` for a folder without any, or a file that is no study's.
    """
    files = sorted(file for pattern in (STUDY, f"*/{STUDY}", f"studies/*/{STUDY}") for file in folder.glob(pattern))
    if not files:
        raise InputError(f"--out must be a folder of studies (a {STUDY} in each), got {str(folder)!r}")
    return {file.parent.resolve().name: _checked(file) for file in files}


def _checked(file: Path) -> dict[str, Any]:
    content = read_object(file)
    for claim in _objects(content, "claims", file):
        for verdict in _objects(claim, "verdicts", file):
            numbers = verdict.get("numbers")
            if not isinstance(numbers, dict) or not isinstance(claim.get("name"), str):
                raise InputError(f"{file} must hold a study's claims, each with verdicts and their numbers, got others")
    for table in _objects(content, "tables", file):
        _objects(table, "rows", file)
    return content


def _objects(content: Mapping[str, Any], name: str, file: Path) -> list[dict[str, Any]]:
    entries = content.setdefault(name, []) if isinstance(content, dict) else None
    if not isinstance(entries, list) or not all(isinstance(each, dict) for each in entries):
        raise InputError(f"{file} must hold a list of objects under {name}, got {type(entries).__name__}")
    return entries


def judge(studies: Mapping[str, Mapping[str, Any]]) -> list[tuple[PaperClaim, list[Judgement]]]:
    """Every claim with what each stored study says of it; one judgement, of `NOT_RUN`, where none does."""
    listed = []
    for claim in PAPER_CLAIMS:
        of_study = {name: content for name, content in studies.items() if content.get("study") == claim.study}
        found = [each for name, content in of_study.items() for each in _named(claim, name, content)]
        listed.append((claim, found or [Judgement()]))
    return listed


def _named(claim: PaperClaim, folder: str, content: Mapping[str, Any]) -> list[Judgement]:
    try:
        return _of_study(claim, folder, content)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        rule = "must hold a study's numbers as `advmoe study` writes them"
        raise InputError(f"{folder}/{STUDY} {rule}, got others for {claim.claim} ({one_line(error)})") from error


def _of_study(claim: PaperClaim, folder: str, content: Mapping[str, Any]) -> list[Judgement]:
    entries = [
        (setting, verdict)
        for entry in content["claims"]
        for name, _, rest in [entry["name"].partition(", ")]
        for setting in [f"{rest}{', ' * bool(rest)}statistics kept" if name.endswith(KEPT) else rest]
        if name.removesuffix(KEPT) == claim.claim and claim.setting in setting
        for stored_verdict in entry["verdicts"]
        for verdict in _by_measure(stored_verdict)
        if str(verdict.get("measure")).startswith(claim.measure) and _speaks(claim, verdict["numbers"])
    ]
    several = len({setting for setting, _ in entries}) > 1
    judgements = []
    for setting, verdict in entries:
        run = f"{folder}, {setting}" if several and setting else folder
        judgements.append(_judgement(claim, run, verdict))
    return judgements or ([] if claim.setting or claim.measure else _from_table(claim, folder, content))


def _judgement(claim: PaperClaim, run: str, verdict: Mapping[str, Any]) -> Judgement:
    numbers, measure = verdict["numbers"], str(verdict.get("measure"))
    kept = {
        name: each
        for name, each in numbers.items()
        if not isinstance(each, dict) or not claim.comparisons or name in claim.comparisons
    }
    compared = [each for each in kept.values() if isinstance(each, dict) and "test" in each]
    if not compared:  # counted or timed
        shown = str(verdict.get("note") or "").removesuffix(".") or ", ".join(
            _time(value) if name == "price" else f"{name} {value:.4g}"
            for name, value in numbers.items()
            if isinstance(value, float | int)
        )
        return Judgement(run, measure, shown, str(verdict.get("verdict")), "")
    result, found = _anew({**verdict, "numbers": kept}), [text for each in compared if (text := _means(each))]
    if isinstance(cost := kept.get("price"), float | int):
        found.insert(0, _time(cost))
    if "price" in kept and (cheap(kept) or {}).get("verdict") == "does not hold":
        return Judgement(run, measure, "; ".join(found), f"does not hold (takes more than {PRICE} of the time)", "")
    number = min((len(each["seeds"]) for each in compared if "seeds" in each), default=0)
    alone = number >= ENOUGH_SEEDS and not all("p_crossed" in each for each in compared)
    seeds = _count(number, "seed") + " alone" * alone
    these = result["these_models"]
    images = "" if these is None else _words(these, _count(max(each["images"] for each in compared), "image"))
    return Judgement(run, measure, "; ".join(found), _words(result, seeds), images)


def _time(ratio: float) -> str:
    return f"{ratio:.2f} of AT (MoE)'s time"


def judged_anew(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a `study.json`, its verdicts made anew from its numbers by the present rule; what cannot be, and
    the rest, as it is.
    """
    claims = content.get("claims")
    if not isinstance(claims, list):
        return dict(content)
    anew = [_claim_anew(claim) for claim in claims]
    notes = content.get("notes")
    if isinstance(notes, list):
        notes = [each for each in notes if not str(each).startswith(_SUPERSEDED)]
    return {**content, "claims": anew, "notes": notes}


KEPT = "-keep"
"""How the names of claims end that are made under `training.frozen_norms=keep`."""
_SUPERSEDED = "The cheapest variant that loses nothing at this size"
"""How a note began that concluded from the older rule."""


def _claim_anew(claim: Any) -> Any:
    try:
        return {**claim, "verdicts": [_anew(each) for verdict in claim["verdicts"] for each in _by_measure(verdict)]}
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return claim  # of another's making


def _anew(verdict: Mapping[str, Any]) -> dict[str, Any]:
    """A stored verdict by the present rule; one that compares nothing as it is."""
    numbers = verdict["numbers"]
    compared = {name: each for name, each in numbers.items() if isinstance(each, dict) and "test" in each}
    if not compared:
        return dict(verdict)
    result = judged(compared)
    if "price" in numbers:
        result |= {"these_models": None}
        result |= cheap(numbers) or {}
    if any(name.startswith(f"{STANDARD} <") for name in compared) and numbers.get(BY_ITSELF, 0.0) >= ROBUST_FROM:
        result |= too_short(result)
    return {**verdict, **result}


def _speaks(claim: PaperClaim, numbers: Mapping[str, Any]) -> bool:
    """Whether a verdict has what the claim is made of."""
    return not claim.comparisons or any(name in numbers for name in claim.comparisons)


def _by_measure(verdict: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A stored verdict. One of the first form on a variant's price, of what it loses under all measures together, is
    split by measure, its losses turned into tests of non-inferiority.
    """
    price, *rest = verdict["numbers"].items() or [("", None)]
    losses = [(name, each) for name, each in rest if isinstance(each, Mapping)]
    if price[0] != "price" or not losses or any("margin" in each for _, each in losses):
        return [verdict]
    return [
        {
            **verdict,
            "measure": f"{verdict.get('measure')}, {measure}",
            "numbers": dict([price, (measure, _turned(each))]),
        }
        for measure, each in losses
    ]


def _turned(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """That the second of two is not below the first by more than `MARGIN`, from that the first exceeds it."""
    if "differences" not in numbers:
        return dict(numbers)
    differences = {seed: -each for seed, each in numbers["differences"].items()}
    shifted = [each + MARGIN for each in differences.values()]
    return {
        "more": numbers["less"], "less": numbers["more"], "seeds": numbers["seeds"], "margin": MARGIN,
        "among": len(VARIANTS) - 1,
        "mean_more": numbers["mean_less"], "mean_less": numbers["mean_more"], "differences": differences,
        "p_seeds": sign_flip(shifted), "p_seeds_opposite": sign_flip([-each for each in shifted]),
        "test": numbers["test"],
    }  # fmt: skip


def _means(each: Mapping[str, Any]) -> str:
    if "mean_less" not in each:
        return ""
    by_seed, unit = list(each["differences"].values()), each.get("unit")
    shown = percent if unit is None else "{:.4g}".format
    spread = f" ({_signed(min(by_seed), unit)} to {_signed(max(by_seed), unit)})" if len(by_seed) > 1 else ""
    return f"{shown(each['mean_less'])} against {shown(each['mean_more'])} {unit or '%'}{spread}"


def _signed(difference: float, unit: str | None) -> str:
    return f"{100 * difference:+.1f}" if unit is None else f"{difference:+.3g}"


def _words(result: Mapping[str, Any], number: str) -> str:
    p = "" if result["p_value"] is None else f", p = {result['p_value']:.2g}"
    return f"{result['verdict']} ({number}{p})"


_ROBUST = (("PGD", "ra_pgd", "%"), ("worst case", "worst", "%"))
_COLUMNS: Mapping[str, Sequence[tuple[str, str, str]]] = {
    "far-from-the-mask": (("IoU, clean", "clean", "IoU"), ("IoU under PGD", "attacked", "IoU")),
    "diverse-pathways": (
        ("spread of the IoU", "spread", "IoU"), ("distinct pathways", "distinct", "pathways"),
        ("entropy", "entropy", "bits"),
    ),
}  # fmt: skip
"""Measure, column and unit of what a study's first table tells of a claim; robust accuracy of others."""
_PAIRS = {
    "above-dense": ("AT (Dense) < AdvMoE",),
    "above-dense-by-a-point": ("AT (Dense) < AdvMoE",),
    "above-baselines-by-a-point": ("AT (S-Dense) < AdvMoE", "AT (Sparse) < AdvMoE", "AT (MoE) < AdvMoE"),
    "far-from-the-mask": ("AdvMoE < AT (MoE)",),
    "diverse-pathways": ("AT (MoE) < AdvMoE",),
}
"""The methods compared by claims that do not name them."""


def _from_table(claim: PaperClaim, folder: str, content: Mapping[str, Any]) -> list[Judgement]:
    """What the first table of a study tells that was stored before the claim was: means, and what is counted or timed.
    Means of too few seeds leave it undecided; of enough it cannot be judged without their pairs.
    """
    rows = dict[Any, list[dict[str, Any]]]()
    for row in content["tables"][0]["rows"] if content["tables"] else ():
        for name in {row.get("method"), row.get("variant") or row.get("method")}:
            rows.setdefault(name, []).append(row)

    def cell(name: str, column: str) -> tuple[float, int] | None:
        match rows.get(name):
            case [{**row}] if isinstance(found := row.get(column), dict):
                return (found["mean"], int(found.get("n") or 0)) if found.get("mean") is not None else None
        return None

    def mean(name: str, column: str) -> float | None:
        return None if (found := cell(name, column)) is None else found[0]

    if claim.claim == "half-the-cost":
        return [_judgement(claim, folder, saving(mean("AT (Dense)", "gmacs"), mean("AdvMoE", "gmacs")))]
    if claim.claim == "twice-the-time":
        return [_judgement(claim, folder, twice(mean(VARIANTS[0], "ratio")))]
    judgements = []
    for measure, column, unit in _COLUMNS.get(claim.claim, _ROBUST):
        pairs = (each.split(" < ", 1) for each in claim.comparisons or _PAIRS.get(claim.claim, ()))
        cells = [(less, more) for pair in pairs if (less := cell(pair[0], column)) and (more := cell(pair[1], column))]
        if cells:
            digits = ".1f" if unit == "%" else ".4g"
            found = "; ".join(f"{less:{digits}} against {more:{digits}} {unit}" for (less, _), (more, _) in cells)
            seeds = min(number for pair in cells for _, number in pair)
            few = f"undecided ({_count(seeds, 'seed')})" if seeds < ENOUGH_SEEDS else NOT_JUDGED
            judgements.append(Judgement(folder, measure, found, few))
    return judgements or [Judgement(folder, "", "", NOT_JUDGED)]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


_RULE = (
    f"A verdict speaks of training again and of other images: a t test at {100 * LEVEL:g}% takes both the seeds and "
    "the images, the same for all, as drawn from many. What is stored without its images has an exact sign-flip test "
    'over seeds ("seeds alone"), which speaks of these images. A collapse of training too rare to be among the seeds '
    f"is not seen. Fewer than {ENOUGH_SEEDS} seeds decide nothing. Tests are one-sided, made in both directions, and "
    "not corrected for the number of claims: of those where nothing differs about one in "
    f"{round(1 / (2 * LEVEL))} is decided by chance. If a claim needs only one of several variants, its p-value is "
    "multiplied by their number. What is told of these models tests them on other images, and says nothing of training "
    f"again. Losing nothing is a test of non-inferiority with a margin of {100 * MARGIN:g} point. Not judged is what "
    "was run, but stored without the numbers that the test needs."
)


def as_text(listed: Iterable[tuple[PaperClaim, Sequence[Judgement]]]) -> str:
    """The list for a terminal."""
    lines = wrapped(_RULE)
    for claim, judgements in listed:
        lines += ["", *wrapped(claim.statement), *wrapped(f"  {claim.place}; study {claim.study}", "    ")]
        for each in judgements:
            where = " ".join(filter(None, [each.run, f"{each.measure}:" if each.measure else ""]))
            said = [each.models, f"these models: {each.these}" if each.these else "", each.found]
            lines += wrapped(f"  {where} {'; '.join(filter(None, said))}".replace("   ", "  "), "      ")
    return "\n".join(lines)


def as_page(listed: Iterable[tuple[PaperClaim, Sequence[Judgement]]], studies: Mapping[str, Mapping[str, Any]]) -> str:
    """The list as a page of Markdown."""
    lines = [
        "# Claims", "", "Every claim of the paper, where it stands, and what the stored studies say of it. Written by",
        "`advmoe study claims --page docs/results/claims.md`; none of it is written by hand.", "", _RULE,
        "The claim has the second mean above the first or, where it is to lose at most a point, less than a point",
        "below. In brackets: the second less the first, for the seed with the smallest difference and that with the",
        "largest.", "",
        "| claim | where | study | measure | means | trained models, other images | these models, over images |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for claim, judgements in listed:
        first = [claim.statement, claim.place]
        for each in judgements:
            cells = [*first, each.run or claim.study, each.measure, each.found, each.models, each.these]
            lines.append(f"| {' | '.join(cell.replace('|', ' ') for cell in cells)} |")
            first = ["", ""]
    lines += ["", "The studies:", ""]
    for name, content in studies.items():
        seeds, size = content.get("seeds") or [], content.get("size")
        about = f"`{name}`: {len(seeds)} seed{'s' * (len(seeds) != 1)}{f', {size}' if size else ''}"
        lines.append(f"- {about}; `{content.get('command')}`")
    return "\n".join(lines) + "\n"
