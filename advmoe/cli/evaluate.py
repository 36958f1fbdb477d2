"""`advmoe evaluate`."""

from __future__ import annotations

from typing import Any

from advmoe.cli.arguments import Parser, continuable, measuring_parser, number, target_and_options, to_run
from advmoe.cli.engine import add_engines, engine_of
from advmoe.config import Count, Processes
from advmoe.evaluation.targets import home_of
from advmoe.rundir import JOURNAL
from advmoe.text import MISSED, listing, macs_unit, percent, radius, wrapped

_GAP = "straight-through PGD less the worst case"


def parser() -> Parser:
    """The command's options."""
    parser = measuring_parser("Measure clean and robust accuracy of a run, or of a classifier of your own.", "1")
    add = parser.add_argument
    add("--workers", metavar="K", help="processes that share the images (default: one per GPU or core; elsewhere 8)")
    add("--eot", metavar="K", help="average a randomised model over K draws, in attacks and scores")
    add("--resume", action="store_true", help="continue an interrupted evaluation from its last finished batch")
    add_engines(parser)
    return parser


def run(args: dict[str, Any], argv: list[str]) -> int:
    """Run the command on its parsed options; returns the exit code."""
    target, options = target_and_options(args)
    options["workers"] = number("--workers", Processes, args.get("workers"))
    options["threads"] = options["threads"] or 1
    options["resume"] = "resume" in args
    if "eot" in args:
        options["eot"] = number("--eot", Count, args["eot"])
    options["engine"] = engine_of(args, options["accelerator"])
    options["engine"].require()

    from advmoe.evaluation.runs import evaluate_run

    home = home_of(target, options.get("out"))
    again = to_run(*argv, *([] if options["resume"] else ["--resume"]))
    with continuable(home, again, JOURNAL):
        result = evaluate_run(target, **options)
    print(_table(result))
    print(f"\nwritten to {home / 'evaluation.json'} and evaluation-examples.npz")
    return 0


def _table(result: dict[str, Any]) -> str:
    """What `evaluation.json` holds, as aligned lines: accuracies in percent with 95% intervals, then costs."""
    threat, gap = result["threat"], result.get("masking_gap")
    attacks = result.get("attacks", {})
    rows = [("clean", f"{percent(result['clean_accuracy'])} %", "")]
    for name, value in result["robust_accuracy"].items():
        report = attacks.get(name, {})
        low, high = report.get("interval", (None, None))
        note = "" if low is None else f"{percent(low)} to {percent(high)}, {report['seconds']:.0f} s"
        rows.append((name, f"{percent(value)} %", note))
        if len(parts := report.get("parts", {})) > 1:
            rows += [(f"  {part}", f"{n['broken']}", f"broken of {n['attempted']}") for part, n in parts.items()]
        if (routing := report.get("settings", {}).get("routing")) is not None:
            rows.append(("  routing", str(routing), f"every pathway within reach was attacked: {MISSED}"))
        if (known := report.get("settings", {}).get("pathways")) is not None and isinstance(known, dict):
            rows.append(("  pathways reached", f"{known['reached']}", f"of them attacked: {known['attacked']}"))
    rows.append(("worst case", f"{percent(result['worst_case'])} %", ""))
    if "masking_gap" in result:
        rows.append(("masking gap", "-" if gap is None else f"{percent(gap)} points", _GAP))
    passes = result.get("gradient_passes", {})
    if passes.get("worst_case") is not None:
        of_pgd = "" if passes["straight_through"] is None else f", {passes['straight_through']:,} of that PGD"
        rows.append(("gradient passes", f"{passes['worst_case']:,}", f"that a robust image withstood{of_pgd}"))
    for name, value in result.get("cost", {}).items():
        unit, factor = macs_unit([value]) if name == "gmacs" else (name.replace("_", " "), 1)
        rows.append((unit, _plain(value * factor if factor != 1 else value), ""))
    lines = listing(rows, "<><")
    for name, report in attacks.items():
        if "skipped" in report:
            lines += ["", *wrapped(f"{name}: {report['skipped']}", "  ")]
    flags = [f"flag  {name}: {flag}" for name, report in attacks.items() for flag in report.get("flags", ())]
    lines += [line for flag in flags for line in wrapped(flag, "      ")]
    return "\n".join(
        [f"{result['num_examples']} images, {threat['norm']} eps {radius(threat['eps'], threat['norm'])}", "", *lines]
    )


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
