"""`advmoe export`."""

from __future__ import annotations

from typing import Annotated, Any

from advmoe.cli.arguments import Parser, fail, new_parser, number, opened_run
from advmoe.config import Count, Threads, Within
from advmoe.text import listing, macs_unit
from advmoe.zoo import PREFIX


def parser() -> Parser:
    """The command's options."""
    parser = new_parser("Write a run's model as a file that runs without this library, checked against PyTorch.")
    add = parser.add_argument
    add("run", metavar="RUN", help="a run directory, or zoo:NAME")
    add("--format", metavar="{onnx,torch-export}", help="ONNX (the extra `export`) or PyTorch's .pt2 (default: onnx)")
    add("--out", metavar="FILE", help="what to write (default: model.onnx or model.pt2 in the run, NAME.onnx here)")
    add("--model", dest="source", metavar="FILE.py:FACTORY", help="the network of your own that RUN trained; executed")
    add("--dynamic-batch", action="store_true", help="any batch size; computes all experts, which is slower")
    add("--opset", metavar="K", help="of ONNX's standard operators, at least 18 (default: PyTorch's choice)")
    add("--num-examples", metavar="N", help="test images that the file is checked on (default: 100)")
    add("--threads", metavar="T", help="CPU threads in the check and the timing (default: PyTorch's choice)")
    return parser


def run(args: dict[str, Any], argv: list[str]) -> int:
    """Run the command on its parsed options; returns the exit code."""
    options: dict[str, Any] = {
        "dynamic_batch": "dynamic_batch" in args,
        "opset": number("--opset", Annotated[int, Within(18, 99)], args.get("opset")),
        "threads": number("--threads", Threads, args.get("threads")),
        "num_examples": number("--num-examples", Count, args.get("num_examples", "100")),
        **{name: args[name] for name in ("format", "out", "source") if name in args},
    }

    run = args["run"]
    if run.startswith(PREFIX):
        name, run = run.removeprefix(PREFIX), opened_run("RUN", run)
        options.setdefault("out", name + {"torch-export": ".pt2"}.get(options.get("format", ""), ".onnx"))

    from advmoe.export import ExportFailed, export_run

    try:
        path, report = export_run(run, **options)
    except ExportFailed as error:
        return fail(error, 1)
    print(_exported(report))
    print(f"\nwritten to {path} and {path.name}.json")
    return 0


def _exported(report: dict[str, Any]) -> str:
    """What an export's report holds, as aligned lines."""
    check, times = report["check"], report["time"]
    opset = f"opset {report['opset']}, " if "opset" in report else ""
    sides = "x".join(map(str, report["input"]["shape"]))
    rows = [
        ("file", f"{report['format']}, {opset}{report['bytes'] / 1e6:.1f} MB, computes {report['computes']}"),
        ("input", f"{report['input']['name']} {sides} {report['input']['type']}, {report['input']['meaning']}"),
        ("outputs", ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in report["outputs"].items())),
    ]
    if "gmacs" in report:
        unit, factor = macs_unit([report["gmacs"]])
        rows.append((unit, f"{report['gmacs'] * factor:.4g} per image"))
    for part in [check, *filter(None, [check.get("also")])]:
        routed = f", {part['pathways']} pathways" if "pathway" in report["outputs"] else ""
        rows.append(("check", f"{part['images']} {part['on']}{routed}: {part['largest_difference']:.2g} from PyTorch"))
        for tie in part["ties"]:
            where = f"image {tie['image']}, layer {tie['layer']}"
            rows.append(("tie", f"{where}: another expert, whose score is {tie['gap']:.2g} less"))
    speeds = f"PyTorch {times['pytorch_ms']:.3g}, exported {times['exported_ms']:.3g}: {times['speedup']:.2f}x as fast"
    note = f"batch 1, {times['threads']} threads, medians of {times['passes']}"
    rows.append(("ms/image", f"{speeds} ({note})"))
    return "\n".join(listing(rows))
