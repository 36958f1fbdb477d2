"""`advmoe cost`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from advmoe.cli.arguments import Parser, add_fields, config_fields, new_parser, number, opened_run
from advmoe.config import Batch, Classes, Experts, Share, Side, Threads, Width, Within, require, typed
from advmoe.files import require_writable, write_text
from advmoe.text import as_option, split_words
from advmoe.zoo import PREFIX

Device = Literal["cpu", "cuda"]

COST_FIELDS = {"data": ("name", "root", "image_size", "workers")}


def parser() -> Parser:
    """The command's options."""
    parser = new_parser("Measure what a run or a backbone costs, beside its Dense and S-Dense forms.")
    add = parser.add_argument
    add("target", metavar="RUN_OR_NAME", help="a run directory, zoo:NAME, or a backbone such as resnet18 or wrn-28-10")
    add("--batch", metavar="B,B,...", help="batch sizes (default: 1,32,128)")
    add("--device", metavar="{cpu,cuda}", help="where to run (default: cpu)")
    add("--threads", metavar="T", help="CPU threads (default: PyTorch's choice)")
    add("--seconds", metavar="S", help="of timing for each batch size, 3 to 50 rounds (default: 10)")
    add("--out", metavar="FILE", help="a JSON file to write the figures to")
    add("--model", dest="source", metavar="FILE.py:FACTORY", help="the network of your own that RUN trained; executed")
    section = parser.add_argument_group("of a backbone", description="A run's model is what it is.")
    section.add_argument("--input-size", metavar="INT", help="side of the images in pixels (default: 32)")
    section.add_argument("--num-classes", metavar="INT", help="classes (default: 10)")
    section.add_argument("--width", metavar="INT", help="channels of the first stage (default: the backbone's own)")
    section.add_argument("--router", metavar="NAME", help="kind of router, as model.router (default: layer)")
    section.add_argument("--num-experts", metavar="INT", help="experts per MoE layer (default: 2)")
    section.add_argument("--scale", metavar="NUMBER", help="share of the width that one pathway uses (default: 0.5)")
    add_fields(parser, COST_FIELDS, defaults=False)
    return parser


def run(args: dict[str, Any], argv: list[str]) -> int:
    """Run the command on its parsed options; returns the exit code."""
    numbers = {"input_size": Side, "num_classes": Classes, "num_experts": Experts, "width": Width, "scale": Share}
    model: dict[str, Any] = {
        name: number(as_option(name), hint, args[name]) for name, hint in numbers.items() if name in args
    }
    model |= {"router": args["router"]} if "router" in args else {}
    options: dict[str, Any] = {
        "model": model,
        "batches": [number("--batch", Batch, text) for text in split_words(args.get("batch", "1,32,128"))],
        "device": typed("--device", Device, args.get("device", "cpu")),
        "threads": number("--threads", Threads, args.get("threads")),
        "seconds": number("--seconds", Annotated[float, Within(0, 86_400)], args.get("seconds", "10")),
        "source": args.get("source"),
        "overrides": config_fields(args),
    }
    require(bool(options["batches"]), "--batch", "batch sizes separated by commas", args.get("batch"))
    out = Path(args["out"]) if "out" in args else None
    require(out is None or not out.is_dir(), "--out", "a file to write", str(out))
    if out is not None:
        require_writable("--out", out.parent)

    target = args["target"]
    if target.startswith(PREFIX):
        target = opened_run("RUN_OR_NAME", target)

    from advmoe.evaluation.cost_report import cost_report, table

    report = cost_report(target, **options)
    print(table(report))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, json.dumps(report, indent=2) + "\n")
        print(f"written to {out}")
    return 0
