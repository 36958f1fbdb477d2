"""`advmoe dissect`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from advmoe.cli.arguments import Parser, any_pgd, drawing, measuring_parser, target_and_options
from advmoe.report.words import class_shares
from advmoe.rundir import DISSECTION
from advmoe.text import listing, percent, tabular, wrapped


def parser() -> Parser:
    """The command's options."""
    parser = measuring_parser(
        "Dissect an attack on a routed run: predictions and choices of experts that survive.",
        attacks=f"PGD's: {any_pgd()} (default: PGD as configured)",
    )
    parser.add_argument("--no-figure", action="store_true", help="write the numbers alone")
    return parser


def run(args: dict[str, Any], argv: list[str]) -> int:
    """Run the command on its parsed options; returns the exit code."""
    target, options = target_and_options(args)
    draw = drawing(args)

    from advmoe.evaluation.runs import dissect_run
    from advmoe.files import read_object

    home, dissections = dissect_run(target, **options)
    written = read_object(home / DISSECTION)
    for name, dissection in dissections.items():
        print(f"{name}\n{dissection.table()}\n\n{_by_class(written[name])}\n")
        for flag in written[name]["flags"]:
            print("\n".join(wrapped(f"flag  {name}: {flag}", "      ")), end="\n\n")
        if draw is not None:
            draw.dissection_figure(dissection.to_dict(), home / f"dissection-{name}.svg")
    if (gap := next(iter(written.values()))["masking_gap"]) is not None:
        note = "straight-through PGD less the worst case of these attacks"
        print("\n".join(listing([("masking gap", f"{percent(gap)} points", note)])), end="\n\n")
    print(f"written to {home / 'dissection.json'}" + (" and a figure beside it" if draw else ""))
    return 0


def _by_class(result: Mapping[str, Any]) -> str:
    """What survived in each class, of an entry of `dissection.json`."""
    rows = [
        (each["name"], str(each["num_examples"]), *(f"{percent(each[part])} %" for part in ("model", "routers")))
        for each in class_shares(result)
    ]
    return "\n".join(tabular(("class", "images", "model robust", "routers robust"), rows, "<>"))
