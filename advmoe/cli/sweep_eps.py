"""`advmoe sweep-eps`."""

from __future__ import annotations

from typing import Any

from advmoe.cli.arguments import Parser, drawing, measuring_parser, number, radii, target_and_options
from advmoe.config import Count, require
from advmoe.text import wrapped


def parser() -> Parser:
    """The command's options."""
    parser = measuring_parser("Measure robust accuracy against the attack's radius, and whether it can be believed.")
    parser.add_argument("--eps", metavar="E,E,...", help="radii, as in 0,2/255,4/255,8/255,16/255")
    parser.add_argument("--eot", metavar="K", help="average a randomised model over K draws, in attacks and scores")
    parser.add_argument("--no-figure", action="store_true", help="write the numbers alone")
    return parser


def run(args: dict[str, Any], argv: list[str]) -> int:
    """Run the command on its parsed options; returns the exit code."""
    target, options = target_and_options(args)
    rule = "radii in pixels of [0, 1] separated by commas"
    require("eps" in args, "--eps", rule, None)
    epsilons = radii("--eps", args["eps"])
    if "eot" in args:
        options["eot"] = number("--eot", Count, args["eot"])
    draw = drawing(args)

    from advmoe.evaluation.runs import sweep_run
    from advmoe.evaluation.sweep import table

    home, result = sweep_run(target, epsilons=epsilons, **options)
    for name, curve in result["curves"].items():
        print(f"{name}\n{table(curve)}\n")
        points = (*curve["points"], curve["probe"])
        for flag in dict.fromkeys(flag for point in points for flag in point.get("flags", ())):
            print("\n".join(wrapped(f"flag  {name}: {flag}", "      ")), end="\n\n")
    if draw is not None:
        draw.sweep_figure(result["curves"], home / "sweep.svg")
    print(f"written to {home / 'sweep.json'}" + (f" and {home / 'sweep.svg'}" if draw else ""))
    return 0
