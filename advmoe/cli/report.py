"""`advmoe report`."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

from advmoe.cli.arguments import Parser, add_engine, add_fields, config_fields, engine_options, new_parser
from advmoe.config import Config
from advmoe.progress import tell

REPORT_FIELDS = {"data": ("root", "workers")}


def parser() -> Parser:
    """The command's options."""
    parser = new_parser("Show runs and studies on one HTML page that needs nothing but itself, with figures beside it.")
    add = parser.add_argument
    add("results", metavar="RUN_OR_STUDY", nargs="+", help="run directories and studies, in the order to be shown")
    add("-o", "--out", metavar="FILE", help="the page (default: report.html)")
    add("--title", metavar="TEXT", help="of the page (default: made from the names of the results)")
    add("--no-gallery", action="store_true", help="make no gallery of attacked images of runs that have none yet")
    add("--model", dest="source", metavar="FILE.py:FACTORY", help="the network of your own that RUN trained; executed")
    add_engine(parser)
    add_fields(parser, REPORT_FIELDS, defaults=False)
    return parser


def run(args: dict[str, Any], argv: list[str]) -> int:
    """Run the command on its parsed options; returns the exit code."""
    overrides = config_fields(args)
    Config.from_dict(overrides)
    options = {"source": args.get("source"), "overrides": overrides, **engine_options(args)}

    from advmoe.report.page import figures_of, write_report
    from advmoe.report.results import load_results

    out = Path(args.get("out", "report.html"))
    figures_of(out)  # what cannot be written shows before anything is computed
    results = [_judged(each) for each in load_results(args["results"])]
    if "no_gallery" not in args:
        results = [_with_gallery(each, options) for each in results]
    folder = write_report(results, out, title=args.get("title"), made_by=shlex.join(["advmoe", *argv]))
    print(f"written to {out}" + (f", its figures to {folder}" if folder is not None else ""))
    return 0


def _judged(result: Any) -> Any:
    """A study with its verdicts by the present rule; a run as it is."""
    from advmoe.report.results import StudyFolder
    from advmoe.studies.claim_list import judged_anew

    return replace(result, content=judged_anew(result.content)) if isinstance(result, StudyFolder) else result


def _with_gallery(result: Any, options: dict[str, Any]) -> Any:
    """A run with the gallery that it lacked, or with the reason why there is none; anything else as it is."""
    from advmoe.report.results import RunFolder, with_gallery

    if not isinstance(result, RunFolder) or result.gallery is not None:
        return result
    from advmoe.evaluation.gallery import gallery_run

    try:
        gallery_run(result.path, **options)
    except Exception as error:  # the rest of the page is worth having, whatever fails here
        reason = " ".join(str(error).split()) or type(error).__name__
        tell(f"note  no gallery of {result.path}: {reason}")
        return with_gallery(result, reason)
    return with_gallery(result)
