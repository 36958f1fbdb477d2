"""`advmoe predict`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from advmoe.cli.arguments import Parser, new_parser, number, opened_run
from advmoe.config import Threads, Within
from advmoe.errors import InputError
from advmoe.text import WIDTH, aligned, percent, wrapped


def parser() -> Parser:
    """The command's options."""
    parser = new_parser("Name what pictures show, by a run's model or an exported ONNX file.")
    add = parser.add_argument
    add("model", metavar="RUN|FILE.onnx", help="a run directory, zoo:NAME, or a file that `advmoe export` wrote")
    add("images", metavar="IMAGE", nargs="+", help="pictures, of any size")
    add("--top", metavar="K", help="classes shown of each picture (default: 5)")
    add("--json", action="store_true", help="print names, probabilities and pathways as JSON")
    add("--model", dest="source", metavar="FILE.py:FACTORY", help="the network of your own that RUN trained; executed")
    add("--threads", metavar="T", help="CPU threads (default: PyTorch's choice)")
    return parser


def run(args: dict[str, Any], argv: list[str]) -> int:
    """Run the command on its parsed options; returns the exit code."""
    top = number("--top", Annotated[int, Within(1, 1_000_000)], args.get("top", "5"))
    threads = number("--threads", Threads, args.get("threads"))
    path, source = Path(args["model"]), args.get("source")
    exported = path.is_file()
    if exported and source is not None:
        raise InputError(f"--model must go with a run (an ONNX file holds its network), got {source!r}")
    if not exported:
        path = opened_run("RUN|FILE.onnx", args["model"])

    from advmoe.pool import threads_set

    with threads_set(threads):
        model: Any
        if exported:
            from advmoe.exported import ExportedModel

            model = ExportedModel(path)
        else:
            from advmoe.models.runs import load_run

            model = load_run(path, source)
        told = model.predict(args["images"], top=top)
    if "json" in args:
        print(json.dumps([_entry(image, one) for image, one in zip(args["images"], told, strict=True)], indent=2))
        return 0
    rows = [[image, *_shares(one)] for image, one in zip(args["images"], told, strict=True)]
    width = max(len(row[0]) for row in rows)
    for line, row in zip(aligned(rows), rows, strict=True):
        hang = " " * min(width + 2, 24)
        print(line if len(line) <= WIDTH else "\n".join(wrapped(f"{row[0]:{width}}  {', '.join(row[1:])}", hang)))
    return 0


def _shares(one: Any) -> list[str]:
    return [f"{name} {percent(share)} %" for name, share in zip(one.classes, one.probabilities, strict=True)]


def _entry(image: str, one: Any) -> dict[str, Any]:
    classes = [
        {"class": name, "probability": share} for name, share in zip(one.classes, one.probabilities, strict=True)
    ]
    return {"image": image, "classes": classes, "pathway": None if one.pathway is None else list(one.pathway)}
