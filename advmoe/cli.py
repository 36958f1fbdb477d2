"""The command line: parse, call, print.

A mistake of the user's (an unknown field, a value out of range, a missing data set) is one line on stderr and exit
code 2, with nothing created. Commands import what they run, so that `advmoe --help` needs no torch.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import json
import shlex
import sys
from argparse import SUPPRESS
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser

from advmoe import __version__
from advmoe import config as config_module
from advmoe.config import OWN_MODEL, Config, Pixels, merged, near_matches, parse_yaml, read_yaml, require, typed
from advmoe.evaluation.targets import home_of, is_source
from advmoe.recipes import METHODS, SETTINGS, describe_method, describe_setting, recipe, recipe_names

Accelerator = Literal["auto", "cpu", "cuda"]
Device = Literal["cpu", "cuda"]

# What `evaluate` may change of a run: how it is attacked and where its images lie, never the model.
EVALUATE_FIELDS = {"threat": None, "attack": None, "data": ("name", "root", "download", "image_size", "workers")}
COST_FIELDS = {"data": ("name", "root", "image_size", "workers")}


class _Parser(ArgumentParser):
    """Parsing errors are raised: `main` shows them as it shows every other mistake."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise ValueError(message)


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit code is 0, 1 (training diverged, or an exported file computes something else), 2 (a
    mistake in the input) or 130 (interrupted).
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = _parse(argv)
        command = args["command"]
        if command == "recipes":
            return _recipes()
        if command == "train":
            return _train(args[command], argv)
        commands = {
            "evaluate": _evaluate, "sweep-eps": _sweep, "dissect": _dissect, "cost": _cost, "push": _push,
            "export": _export,
        }  # fmt: skip
        return commands[command](args[command])
    except (ValueError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
        if not _is_ours(error):
            raise
        return _fail(error, 2)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)


def _train(args: dict[str, Any], argv: list[str]) -> int:
    overrides, resumed = _overrides(args), args.get("resume")
    model = overrides.get("model", {})
    devices, engine = _count("--devices", args.get("devices")), _engine(args)
    if resumed is not None:
        alone = not overrides or overrides == {"model": {"source": model.get("source")}}
        alone = alone and "config" not in args and "run_dir" not in args
        require(alone, "--resume", "without --config, --run-dir and fields (a run keeps its own)", resumed)
        run_dir = _existing_run("--resume", resumed)
        config = Config.load(run_dir / "config.yaml")
    else:
        name, values = _source(args.get("config"), model.get("source"))
        config = Config.from_dict(merged(values, overrides))
        for field in OWN_MODEL if config.model.source is not None else ():
            rule = "left out with a network of your own (--model)"
            require(field not in model, f"model.{field}", rule, model.get(field))
        run_dir = Path(args.get("run_dir", f"runs/{name}-{config.training.seed}"))
    if "print_config" in args:
        print(config.to_yaml(), end="")
        return 0
    if resumed is None:
        free = not run_dir.exists() or (run_dir.is_dir() and not any(run_dir.iterdir()))
        rule = "new or empty (--resume continues a run, --run-dir names another place)"
        require(free, "the run directory", rule, str(run_dir))

    named = model.get("source", config.model.source)
    own = f" --model {shlex.quote(named)}" if named is not None else ""
    with _interruptible(run_dir, f"advmoe train --resume {shlex.quote(str(run_dir))}{own}", "config.yaml"):
        from advmoe.training import run as runs
        from advmoe.training.trainer import TrainingDiverged

        try:
            if resumed is None:
                command = ["advmoe", *argv]
                runs.train(config, run_dir=run_dir, name=name, command=command, devices=devices or 1, **engine)
            else:
                runs.resume(run_dir, source=model.get("source"), devices=devices, **engine)
        except TrainingDiverged as error:
            return _fail(error, 1)
    print(f"run   {run_dir}\nnext  advmoe evaluate {shlex.quote(str(run_dir))}{own}")
    return 0


def _evaluate(args: dict[str, Any]) -> int:
    target, options = _measured(args)
    options["workers"] = _count("--workers", args.get("workers"))
    options["threads"] = options["threads"] or 1
    options["resume"] = "resume" in args

    from advmoe.evaluation.runs import evaluate_run

    home = home_of(target, options.get("out"))
    again = f"advmoe evaluate {shlex.quote(target)} --resume, with the same options"
    with _interruptible(home, again, ".evaluation"):
        result = evaluate_run(target, **options)
    print(_table(result))
    print(f"\nwritten to {home / 'evaluation.json'} and evaluation-examples.npz")
    return 0


def _sweep(args: dict[str, Any]) -> int:
    target, options = _measured(args)
    rule = "radii in pixels of [0, 1] separated by commas"
    require("eps" in args, "--eps", rule, None)
    epsilons = [float(Pixels(text)) for text in _words(args["eps"])]
    draw = _figures(args)

    from advmoe.evaluation.runs import sweep_run
    from advmoe.evaluation.sweep import table

    home, result = sweep_run(target, epsilons=epsilons, **options)
    for name, curve in result["curves"].items():
        print(f"{name}\n{table(curve)}\n")
    if draw is not None:
        draw.sweep_figure(result["curves"], home / "sweep.svg")
    print(f"written to {home / 'sweep.json'}" + (f" and {home / 'sweep.svg'}" if draw else ""))
    return 0


def _dissect(args: dict[str, Any]) -> int:
    target, options = _measured(args)
    draw = _figures(args)

    from advmoe.evaluation.runs import dissect_run

    home, found = dissect_run(target, **options)
    for name, dissection in found.items():
        print(f"{name}\n{dissection.table()}\n")
        if draw is not None:
            draw.dissection_figure(dissection.to_dict(), home / f"dissection-{name}.svg")
    print(f"written to {home / 'dissection.json'}" + (" and a figure beside it" if draw else ""))
    return 0


def _export(args: dict[str, Any]) -> int:
    options: dict[str, Any] = {
        "dynamic_batch": "dynamic_batch" in args,
        "opset": _count("--opset", args.get("opset")),
        "threads": _count("--threads", args.get("threads")),
        "num_examples": _count("--num-examples", args.get("num_examples", "100")),
        **{name: args[name] for name in ("format", "out", "source") if name in args},
    }

    from advmoe.export import ExportFailed, export_run

    try:
        path, report = export_run(args["run"], **options)
    except ExportFailed as error:
        return _fail(error, 1)
    print(_exported(report))
    print(f"\nwritten to {path} and {path.name}.json")
    return 0


def _cost(args: dict[str, Any]) -> int:
    numbers = ("input_size", "num_classes", "num_experts", "width")
    model: dict[str, Any] = {
        name: _count(f"--{name.replace('_', '-')}", args[name]) for name in numbers if name in args
    }
    model |= {"router": args["router"]} if "router" in args else {}
    model |= {"scale": typed("--scale", float, parse_yaml(args["scale"], "--scale"))} if "scale" in args else {}
    options: dict[str, Any] = {
        "model": model,
        "batches": [_count("--batch", text) for text in _words(args.get("batch", "1,32,128"))],
        "device": typed("--device", Device, args.get("device", "cpu")),
        "threads": _count("--threads", args.get("threads")),
        "seconds": typed("--seconds", float, parse_yaml(args.get("seconds", "10"), "--seconds")),
        "source": args.get("source"),
        "overrides": _overrides(args),
    }
    require(bool(options["batches"]), "--batch", "batch sizes separated by commas", args.get("batch"))
    out = Path(args["out"]) if "out" in args else None
    require(out is None or not out.is_dir(), "--out", "a file to write", str(out))

    from advmoe.evaluation.cost_report import cost_report, table
    from advmoe.files import write_text

    report = cost_report(args["target"], **options)
    print(table(report))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, json.dumps(report, indent=2) + "\n")
        print(f"written to {out}")
    return 0


def _push(args: dict[str, Any]) -> int:
    run = _existing_run("RUN", args["run"])

    from advmoe.hub import push_to_hub

    options = {name: args[name] for name in ("branch", "license", "source") if name in args}
    print(push_to_hub(run, args["repo"], private=True if "private" in args else None, **options))
    return 0


def _measured(args: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """What is measured, and the options that all measurements share; mistakes show before torch is imported."""
    target, overrides = args["target"], _overrides(args)
    below = {}
    if not is_source(target):
        below = Config.load(_existing_run("RUN", target) / "config.yaml").to_dict()
    Config.from_dict(merged(below, overrides))
    options = {
        "overrides": overrides,
        "num_examples": _count("--num-examples", args.get("num_examples")),
        "batch_size": _count("--batch-size", args.get("batch_size", "250")),
        "seed": _count("--seed", args.get("seed"), low=0),
        "attacks": _words(args["attacks"]) if "attacks" in args else None,
        "allow": _words(args.get("allow", "")),
        **_engine(args),
    }
    return target, options | {name: args[name] for name in ("out", "weights", "source") if name in args}


def _words(text: str) -> list[str]:
    return [word for word in (part.strip() for part in text.split(",")) if word]


def _figures(args: dict[str, Any]) -> Any:
    """The module that draws, unless no figure is wanted. Raises `ValueError` where it cannot."""
    if "no_figure" in args:
        return None
    from advmoe.report import figures

    figures.require_matplotlib()
    return figures


def _recipes() -> int:
    width = max(map(len, (*SETTINGS, *METHODS)))
    print("A recipe is a setting and a method, as in cifar10-resnet18-advmoe; any pair will do.")
    for title, names, describe in (("settings", SETTINGS, describe_setting), ("methods", METHODS, describe_method)):
        print(f"\n{title}")
        for name in names:
            print(f"  {name:<{width}}  {describe(name)}")
    return 0


def _table(result: dict[str, Any]) -> str:
    """What `evaluation.json` holds, as aligned lines: accuracies in percent with 95% intervals, then costs."""
    threat, gap = result["threat"], result.get("masking_gap")
    attacks = result.get("attacks", {})
    rows = [("clean", f"{100 * result['clean_accuracy']:.1f} %", "")]
    for name, value in result["robust_accuracy"].items():
        report = attacks.get(name, {})
        low, high = report.get("interval", (None, None))
        note = "" if low is None else f"{100 * low:.1f} to {100 * high:.1f}, {report['seconds']:.0f} s"
        rows.append((name, f"{100 * value:.1f} %", note))
        if len(parts := report.get("parts", {})) > 1:
            rows += [(f"  {part}", f"{n['broken']}", f"broken of {n['attempted']}") for part, n in parts.items()]
    rows.append(("worst case", f"{100 * result['worst_case']:.1f} %", ""))
    if "masking_gap" in result:
        rows.append(("masking gap", "-" if gap is None else f"{100 * gap:.1f} points", _GAP))
    rows += [(name.replace("_", " "), _plain(value), "") for name, value in result.get("cost", {}).items()]
    left, right = (max(len(row[column]) for row in rows) for column in (0, 1))
    lines = [f"{name:<{left}}  {value:>{right}}  {note}".rstrip() for name, value, note in rows]
    lines += [f"\n{name}: {report['skipped']}" for name, report in attacks.items() if "skipped" in report]
    lines += [f"flag  {name}: {flag}" for name, report in attacks.items() for flag in report.get("flags", ())]
    return "\n".join([f"{result['num_examples']} images, {threat['norm']} eps {threat['eps']:.4g}", "", *lines])


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
        rows.append(("GMACs", f"{report['gmacs']:.4g} per image"))
    for part in [check, *filter(None, [check.get("also")])]:
        routed = f", {part['pathways']} pathways" if "pathway" in report["outputs"] else ""
        rows.append(("check", f"{part['images']} {part['on']}{routed}: {part['largest_difference']:.2g} from PyTorch"))
        for tie in part["ties"]:
            where = f"image {tie['image']}, layer {tie['layer']}"
            rows.append(("tie", f"{where}: another expert, whose score is {tie['gap']:.2g} less"))
    speeds = f"PyTorch {times['pytorch_ms']:.3g}, exported {times['exported_ms']:.3g}: {times['speedup']:.2f}x as fast"
    note = f"batch 1, {times['threads']} threads, medians of {times['passes']}"
    rows.append(("ms/image", f"{speeds} ({note})"))
    return "\n".join(f"{name:<8}  {text}" for name, text in rows)


_GAP = "straight-through PGD less the worst case"


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _parse(argv: list[str]) -> dict[str, Any]:
    parser = _new_parser("Adversarially robust mixture-of-experts vision models.")
    parser.prog = "advmoe"
    parser.add_argument("--version", action="version", version=f"advmoe {__version__}")
    commands = parser.add_subcommands(dest="command", metavar="COMMAND")
    parsers = {
        "train": _train_parser(),
        "evaluate": _evaluate_parser(),
        "sweep-eps": _sweep_parser(),
        "dissect": _dissect_parser(),
        "cost": _cost_parser(),
        "push": _push_parser(),
        "export": _export_parser(),
        "recipes": _new_parser("List the recipes."),
    }
    for name, sub in parsers.items():
        commands.add_subcommand(name, sub, help=sub.description)
    try:
        args: dict[str, Any] = parser.parse_args(_in_full(argv)).as_dict()
    except ValueError as error:
        command = next((word for word in argv if word in parsers), None)
        if command is None and not any(word.startswith("-") for word in argv[:1]):
            got = repr(argv[0]) if argv else "nothing"  # the parser names but a few of those there are
            raise ValueError(f"COMMAND must be one of {', '.join(parsers)}, got {got}") from None
        raise _explained(str(error), command, parsers) from None
    return args


def _in_full(argv: list[str]) -> list[str]:
    """`argv` with the short options of `train` written out: the parser takes `--model` for the group of fields."""
    if argv[:1] != ["train"]:
        return argv
    full = {"--model": "--model.source", "--to-moe": "--model.to_moe"}
    words = ["--to-moe=true" if word == "--to-moe" else word for word in argv]
    parts = (word.partition("=") for word in words)
    return [full.get(option, option) + equals + rest for option, equals, rest in parts]


def _new_parser(description: str) -> _Parser:
    # No defaults: the parser reports what was given, and the help texts say the rest. --print_config is ours.
    return _Parser(description=description, argument_default=SUPPRESS, allow_abbrev=False, print_config=None)


def _train_parser() -> _Parser:
    parser = _new_parser(
        "Train a model, or continue a run. --model FILE.py:FACTORY and --to-moe, which converts it, are short for "
        "--model.source and --model.to_moe true."
    )
    add = parser.add_argument
    add("--config", metavar="RECIPE|YAML", help="a recipe by name (see `advmoe recipes`) or a YAML file")
    add("--run-dir", metavar="DIR", help="where the run is kept (default: runs/<recipe or file>-<seed>)")
    add("--resume", metavar="RUN", help="continue the run in this directory")
    add("--print_config", action="store_true", help="print the resolved configuration and stop")
    add("--devices", metavar="K", help="processes, each with a device of its own (default: 1, or the resumed run's)")
    _add_engine(parser)
    _add_fields(parser, dict.fromkeys(get_type_hints(Config)), defaults=True)
    return parser


def _evaluate_parser() -> _Parser:
    parser = _measuring_parser("Measure clean and robust accuracy of a run, or of a classifier of your own.")
    add = parser.add_argument
    add("--workers", metavar="K", help="processes that share the images (default: one per GPU or core)")
    add("--resume", action="store_true", help="continue an interrupted evaluation from its last finished batch")
    return parser


def _sweep_parser() -> _Parser:
    parser = _measuring_parser("Measure robust accuracy against the attack's radius, and whether it can be believed.")
    parser.add_argument("--eps", metavar="E,E,...", help="radii, as in 0,2/255,4/255,8/255,16/255")
    parser.add_argument("--no-figure", action="store_true", help="write the numbers alone")
    return parser


def _dissect_parser() -> _Parser:
    parser = _measuring_parser("Dissect an attack on a routed run: predictions and choices of experts that survive.")
    parser.add_argument("--no-figure", action="store_true", help="write the numbers alone")
    return parser


def _export_parser() -> _Parser:
    parser = _new_parser("Write a run's model as a file that runs without this library, checked against PyTorch.")
    add = parser.add_argument
    add("run", metavar="RUN", help="a run directory")
    add("--format", metavar="{onnx,torch-export}", help="ONNX (the extra `export`) or PyTorch's .pt2 (default: onnx)")
    add("--out", metavar="FILE", help="what to write (default: model.onnx or model.pt2 in the run)")
    add("--model", dest="source", metavar="FILE.py:FACTORY", help="the network of your own that RUN trained; executed")
    add("--dynamic-batch", action="store_true", help="any batch size; computes all experts, which is slower")
    add("--opset", metavar="K", help="of ONNX's standard operators, at least 18 (default: PyTorch's choice)")
    add("--num-examples", metavar="N", help="test images that the file is checked on (default: 100)")
    add("--threads", metavar="T", help="CPU threads in the check and the timing (default: PyTorch's choice)")
    return parser


def _cost_parser() -> _Parser:
    parser = _new_parser("Measure what a run or a backbone costs, beside its Dense and S-Dense forms.")
    add = parser.add_argument
    add("target", metavar="RUN_OR_NAME", help="a run directory, or a backbone such as resnet18 or wrn-28-10")
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
    section.add_argument("--router", metavar="{layer,embedding,image}", help="kind of router (default: layer)")
    section.add_argument("--num-experts", metavar="INT", help="experts per MoE layer (default: 2)")
    section.add_argument("--scale", metavar="NUMBER", help="share of the width that one pathway uses (default: 0.5)")
    _add_fields(parser, COST_FIELDS, defaults=False)
    return parser


def _push_parser() -> _Parser:
    parser = _new_parser("Upload a run's model with its card to the Hugging Face Hub (log in with `hf auth login`).")
    add = parser.add_argument
    add("run", metavar="RUN", help="a run directory")
    add("repo", metavar="OWNER/NAME", help="the repository, made if there is none")
    add("--model", dest="source", metavar="FILE.py:FACTORY", help="the network of your own that RUN trained; executed")
    add("--private", action="store_true", help="make a new repository private")
    add("--branch", metavar="BRANCH", help="what to commit to (default: main)")
    add("--license", metavar="ID", help="of the weights, as the Hub names it, e.g. apache-2.0 (default: unknown)")
    return parser


def _measuring_parser(description: str) -> _Parser:
    parser = _new_parser(description)
    add = parser.add_argument
    add("target", metavar="RUN|FILE.py:FACTORY", help="a run directory, or a function that makes your classifier")
    add("--weights", metavar="FILE", help="safetensors for FILE.py:FACTORY")
    add("--model", dest="source", metavar="FILE.py:FACTORY", help="the network of your own that RUN trained; executed")
    add("--out", metavar="DIR", help="where results go (default: the run, or evaluations/<file>-<factory>)")
    add(
        "--attacks", metavar="NAME,...",
        help="pgd-50, pgd-50-soft, pgd-50-margin, autoattack, autoattack-plus, autoattack-rand, "
        "autoattack:apgd-ce+square, routed (default: PGD, through soft routing too for a routed model)",
    )  # fmt: skip
    add("--num-examples", metavar="N", help="test images, drawn by --seed (default: all)")
    add("--batch-size", metavar="B", help="images attacked at once (default: 250)")
    add("--seed", metavar="SEED", help="of the images drawn and the attacks' random draws (default: the run's)")
    add("--allow", metavar="CHECK,...", help="checks made before an attack that may fail")
    _add_engine(parser)
    _add_fields(parser, EVALUATE_FIELDS, defaults=False)
    return parser


def _add_engine(parser: _Parser) -> None:
    accelerators = ",".join(get_args(Accelerator))
    parser.add_argument("--accelerator", metavar=f"{{{accelerators}}}", help="where to run (default: auto)")
    parser.add_argument("--threads", metavar="T", help="CPU threads per process (default: PyTorch's choice)")


def _add_fields(parser: _Parser, wanted: dict[str, Any], *, defaults: bool) -> None:
    """Make options of the fields of the groups in `wanted` (None: all of them)."""
    for group, names in wanted.items():
        cls = get_type_hints(Config)[group]
        section = parser.add_argument_group(group, description=inspect.getdoc(cls))
        hints, docs = get_type_hints(cls), _field_docs()[cls.__name__]
        for item in fields(cls):
            if names is None or item.name in names:
                default = item.default if item.default_factory is MISSING else item.default_factory()
                note = _shown(default) if defaults else "the run's"
                text = f"{docs[item.name]} (default: {note})".replace("%", "%%")
                option = f"--{group}.{item.name}"
                section.add_argument(option, metavar=_metavar(hints[item.name]), help=text)


@cache
def _field_docs() -> dict[str, dict[str, str]]:
    """The docstring after each field of each dataclass in `config.py`: Python itself does not keep them."""
    docs: dict[str, dict[str, str]] = {}
    for cls in ast.parse(inspect.getsource(config_module)).body:
        if isinstance(cls, ast.ClassDef):
            found = docs.setdefault(cls.name, {})
            for item, after in zip(cls.body, cls.body[1:], strict=False):
                match item, after:
                    case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                        found[name] = text
    return docs


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _metavar(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return f"{{{','.join(get_args(hint))}}}"
    base = next(iter(get_args(hint)), hint)
    return {bool: "{true,false}", int: "INT", float: "NUMBER", Pixels: "NUMBER|N/255", str: "TEXT"}[base]


def _overrides(args: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The fields given on the command line: numbers and truth values as YAML reads them, text as it is."""
    found: dict[str, dict[str, Any]] = {}
    for group, cls in get_type_hints(Config).items():
        hints = get_type_hints(cls)
        for name, text in (args.get(group) or {}).items():
            base = next(iter(get_args(hints[name])), hints[name])
            as_yaml = base in (bool, int, float) or (text == "null" and type(None) in get_args(hints[name]))
            value = parse_yaml(text, f"{group}.{name}") if as_yaml else text
            found.setdefault(group, {})[name] = value
    return found


def _source(text: str | None, own: str | None = None) -> tuple[str, dict[str, Any]]:
    """The name and the fields of `--config`: a recipe's, or a YAML file's; none are needed to train a network `own`."""
    names = recipe_names()
    prefix = f"{home_of(own).name}-" if own is not None else ""
    if text in names:
        return prefix + text, recipe(text)
    if text is not None and Path(text).is_file():
        return prefix + Path(text).stem, read_yaml(text)
    if text is None and own is not None:
        return prefix.removesuffix("-"), {}
    near = difflib.get_close_matches(text or "", names, n=1)
    got = "nothing" if text is None else f"{text!r} (did you mean {near[0]}?)" if near else repr(text)
    raise ValueError(f"--config must be a YAML file or a recipe (see `advmoe recipes`), got {got}")


def _existing_run(option: str, text: str) -> Path:
    require((Path(text) / "config.yaml").is_file(), option, "a run directory (one that holds a config.yaml)", text)
    return Path(text)


def _engine(args: dict[str, Any]) -> dict[str, Any]:
    """Where to compute: the options that commands share."""
    return {
        "accelerator": typed("--accelerator", Accelerator, args.get("accelerator", "auto")),
        "threads": _count("--threads", args.get("threads")),
    }


def _count(option: str, text: str | None, *, low: int = 1) -> int | None:
    if text is None:
        return None
    value: int = typed(option, int, parse_yaml(text, option))
    require(value >= low, option, f">= {low}", value)
    return value


def _explained(message: str, command: str | None, parsers: dict[str, _Parser]) -> ValueError:
    """The parser's complaint, with near matches where an option does not exist."""
    _, _, rest = message.partition("unrecognized arguments: ")
    if command is None or not rest.startswith("--"):
        return ValueError(message)
    word = rest.split()[0].split("=")[0]
    options = [text[2:] for action in parsers[command]._actions for text in action.option_strings if text[:2] == "--"]
    near = [f"--{name}" for name in near_matches(word[2:], options)]
    hint = f"did you mean {' or '.join(near)}?" if near else f"see advmoe {command} --help"
    return ValueError(f"{word} is no option of {command}: {hint}")


@contextmanager
def _interruptible(home: Path, again: str, mark: str) -> Iterator[None]:
    """Where an interruption leaves something to continue (`mark` exists in `home`), say how."""
    try:
        yield
    except KeyboardInterrupt:
        if not (home / mark).exists():
            raise
        code = _fail(f"interrupted; to continue: {again}", 130)
        raise SystemExit(code) from None


def _is_ours(error: BaseException) -> bool:
    """Whether this package raised the error itself: a library's `ValueError` is a bug and keeps its traceback."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__")).split(".")[0] == "advmoe"


def _fail(error: BaseException | str, code: int) -> int:
    text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
    print("advmoe: error:", " ".join(text.split()), file=sys.stderr)
    return code
