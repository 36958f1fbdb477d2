"""`advmoe pathways`."""

from __future__ import annotations

from typing import Any

from advmoe.cli.arguments import Parser, any_pgd, drawing, measuring_parser, opened_run, target_and_options


def parser() -> Parser:
    """The command's options."""
    parser = measuring_parser(
        "Trace the pathways of a routed run: how many, how classes share them, how an attack moves them.",
        attacks=f"one of PGD's: {any_pgd()} (default: PGD as configured)",
    )
    parser.add_argument(
        "--against", metavar="RUN", help="a sparse run, or a routed one of the same banks: how much is in common"
    )
    parser.add_argument("--no-figure", action="store_true", help="write the numbers alone")
    return parser


def run(args: dict[str, Any], argv: list[str]) -> int:
    """Run the command on its parsed options; returns the exit code."""
    target, options = target_and_options(args)
    if "against" in args:
        options["against"] = opened_run("--against", args["against"])
    draw = drawing(args)

    from advmoe.evaluation.pathways import pathways_run, table
    from advmoe.report.pathways import draw_pictures
    from advmoe.rundir import PATHWAYS

    home, result = pathways_run(target, **options)
    print(f"{table(result)}\n")
    figures = draw_pictures(result, home) if draw is not None else []
    print(
        f"written to {home / PATHWAYS}" + (f" and {len(figures)} figures beside it, pathways-*.svg" if figures else "")
    )
    return 0
