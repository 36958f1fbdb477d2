"""The order of a zoo's models, and the page made of it."""

import re
from dataclasses import replace

import pytest

from advmoe.zoo import PACKED, Entry, Measured, entries_of
from advmoe.zoo.leaderboard import interval, leaderboard, missing_attacks, rankings

ANY = entries_of(PACKED)["advmoe"]
ALL = ("pgd-50", "autoattack", "routed")


def entry(name: str, worst: float, clean: float = 0.5, attacks: tuple[str, ...] = ALL, **more: object) -> Entry:
    changes = {"accuracy": {"clean": Measured(clean, 100)}, "worst_case": Measured(worst, 100), "attacks": attacks}
    return replace(ANY, name=name, **changes | more)  # type: ignore[arg-type]


def test_models_are_ranked_by_worst_case_within_data_and_threat_model() -> None:
    models = [
        entry("low", 0.1), entry("b", 0.3, 0.5), entry("a", 0.3, 0.6), entry("best", 0.4), entry("most", 0.9, eps=0.1),
        entry("pgd", 0.8, attacks=("pgd-50", "routed")),
    ]  # fmt: skip
    first, second = rankings(models)
    assert first.title == "CIFAR-10 (JPEG), linf 8/255" and second.title == "CIFAR-10 (JPEG), linf 0.1"
    assert [(place, each.name) for place, each in first.places] == [
        (1, "best"), (2, "a"), (2, "b"), (4, "low"), (None, "pgd"),
    ]  # fmt: skip
    assert [(place, each.name) for place, each in second.places] == [(1, "most")]


@pytest.mark.parametrize(
    ("attacks", "routed", "missing"),
    [
        (ALL, True, []),
        (("autoattack-plus", "routed"), True, []),
        (("autoattack",), True, ["routed"]),
        (("autoattack",), False, []),
        (("pgd-50",), True, ["autoattack", "routed"]),
        (("autoattack:square", "routed"), True, ["autoattack"]),
    ],
)
def test_what_counts_for_a_place(attacks: tuple[str, ...], routed: bool, missing: list[str]) -> None:
    assert missing_attacks(entry("a", 0.1, attacks=attacks, routed=routed)) == missing


def test_an_interval_by_hand() -> None:
    # 490 of 2000: (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)
    assert interval(Measured(0.245, 2000)) == "22.7 to 26.4"


def test_the_page_holds_every_packed_model_with_its_numbers() -> None:
    known = entries_of(PACKED)
    page = leaderboard(known)
    lines = [line for line in page.splitlines() if line.startswith("|") and "](#" in line]
    rows = {re.findall("`(.+)`", cells[1])[0]: cells for cells in map(row, lines)}
    assert set(rows) == set(known) and len(lines) == len(known)
    for name, each in known.items():
        cells = rows[name]
        assert cells[2] == f"{100 * each.worst_case.value:.1f}" and cells[4] == f"{each.worst_case.images:,}"
        assert cells[9:11] == [f"{each.gmacs:.4f}", f"{each.parameters:,}"]
        assert f"\n### {name}\n" in page and all(flag.split(": ", 1)[1] in page for flag in each.flags)
    assert rows["at-s-dense"] == [
        "1", "[`at-s-dense`](#at-s-dense)", "24.5", "21.9 to 27.3", "1,000", "47.1", "26.0", "24.5", "4.2", "0.0089",
        "176,402", "-",
    ]  # fmt: skip
    assert rows["moe-vit"][0] == "1"  # alone at its radius
    untried = entry("few", 0.1, attacks=("pgd-50", "routed"))
    assert "- `few` has no place: autoattack was not tried on it." in leaderboard({"few": untried})


def row(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]
