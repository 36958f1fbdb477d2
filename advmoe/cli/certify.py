"""`advmoe certify`."""

from __future__ import annotations

from typing import Any

from advmoe.cli.arguments import Parser, drawing, measuring_parser, radii, target_and_options


def parser() -> Parser:
    """The command's options."""
    parser = measuring_parser("Prove within which radii a routed run keeps its choices of experts.", attacks=None)
    parser.add_argument("--radii", metavar="E,E,...", help="radii (default: 2/255,4/255,8/255)")
    parser.add_argument("--no-figure", action="store_true", help="write the numbers alone")
    return parser


def run(args: dict[str, Any], argv: list[str]) -> int:
    """Run the command on its parsed options; returns the exit code."""
    target, options = target_and_options(args)
    if "radii" in args:
        options["epsilons"] = radii("--radii", args["radii"])
    draw = drawing(args)

    from advmoe.evaluation.certify import certify_run, shares, table
    from advmoe.rundir import CERTIFICATION

    home, result = certify_run(target, **options)
    print(f"{table(result)}\n")
    if draw is not None:
        draw.stacked_figure(shares(result), home / "certification.svg", xlabel="images (%)")
    print(f"written to {home / CERTIFICATION}" + (f" and {home / 'certification.svg'}" if draw else ""))
    return 0
