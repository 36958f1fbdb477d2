"""The command line: parse, call, print.

A mistake of the user's (an unknown field, a value out of range, a missing data set) is one line on stderr and exit
code 2, with nothing created. Commands import what they run, so that `advmoe --help` needs no torch.
"""

from __future__ import annotations

import ast
import difflib
import inspect
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
from advmoe.config import Config, Pixels, merged, near_matches, parse_yaml, read_yaml, require, typed
from advmoe.evaluation.targets import home_of, is_source
from advmoe.recipes import describe, recipe, recipe_names

Accelerator = Literal["auto", "cpu", "cuda"]

# What `evaluate` may change of a run: how it is attacked and where its images lie, never the model.
EVALUATE_FIELDS = {"threat": None, "attack": None, "data": ("name", "root", "download", "image_size")}


class _Parser(ArgumentParser):
    """Parsing errors are raised: `main` shows them as it shows every other mistake."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise ValueError(message)


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit code is 0, 1 (training diverged), 2 (a mistake in the input) or 130 (interrupted)."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = _parse(argv)
        command = args["command"]
        if command == "recipes":
            return _recipes()
        if command == "train":
            return _train(args[command], argv)
        commands = {"evaluate": _evaluate, "sweep-eps": _sweep, "dissect": _dissect}
        return commands[command](args[command])
    except (ValueError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
        if not _is_ours(error):
            raise
        return _fail(error, 2)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)


def _train(args: dict[str, Any], argv: list[str]) -> int:
    overrides, resumed = _overrides(args), args.get("resume")
    devices, engine = _count("--devices", args.get("devices")), _engine(args)
    if resumed is not None:
        alone = not overrides and "config" not in args and "run_dir" not in args
        require(alone, "--resume", "without --config, --run-dir and fields (a run keeps its own)", resumed)
        run_dir = _existing_run("--resume", resumed)
        config = Config.load(run_dir / "config.yaml")
    else:
        name, values = _source(args.get("config"))
        config = Config.from_dict(merged(values, overrides))
        run_dir = Path(args.get("run_dir", f"runs/{name}-{config.training.seed}"))
    if "print_config" in args:
        print(config.to_yaml(), end="")
        return 0
    if resumed is None:
        free = not run_dir.exists() or (run_dir.is_dir() and not any(run_dir.iterdir()))
        rule = "new or empty (--resume continues a run, --run-dir names another place)"
        require(free, "the run directory", rule, str(run_dir))

    with _interruptible(run_dir, f"advmoe train --resume {shlex.quote(str(run_dir))}", "config.yaml"):
        from advmoe.training import run as runs
        from advmoe.training.trainer import TrainingDiverged

        try:
            if resumed is None:
                command = ["advmoe", *argv]
                runs.train(config, run_dir=run_dir, name=name, command=command, devices=devices or 1, **engine)
            else:
                runs.resume(run_dir, devices=devices, **engine)
        except TrainingDiverged as error:
            return _fail(error, 1)
    print(f"run   {run_dir}\nnext  advmoe evaluate {shlex.quote(str(run_dir))}")
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
    return target, options | {name: args[name] for name in ("out", "weights") if name in args}


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
    names = recipe_names()
    width = max(map(len, names))
    for name in names:
        print(f"{name:<{width}}  {describe(name)}")
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
        "recipes": _new_parser("List the recipes."),
    }
    for name, sub in parsers.items():
        commands.add_subcommand(name, sub, help=sub.description)
    try:
        args: dict[str, Any] = parser.parse_args(argv).as_dict()
    except ValueError as error:
        command = next((word for word in argv if word in parsers), None)
        raise _explained(str(error), command, parsers) from None
    return args


def _new_parser(description: str) -> _Parser:
    # No defaults: the parser reports what was given, and the help texts say the rest. --print_config is ours.
    return _Parser(description=description, argument_default=SUPPRESS, allow_abbrev=False, print_config=None)


def _train_parser() -> _Parser:
    parser = _new_parser("Train a model, or continue a run.")
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


def _measuring_parser(description: str) -> _Parser:
    parser = _new_parser(description)
    add = parser.add_argument
    add("target", metavar="RUN|FILE.py:FACTORY", help="a run directory, or a function that makes your classifier")
    add("--weights", metavar="FILE", help="safetensors for FILE.py:FACTORY")
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


def _source(text: str | None) -> tuple[str, dict[str, Any]]:
    """The name and the fields of `--config`: a recipe's, or a YAML file's."""
    names = recipe_names()
    if text in names:
        return text, recipe(text)
    if text is not None and Path(text).is_file():
        return Path(text).stem, read_yaml(text)
    near = difflib.get_close_matches(text or "", names, n=1)
    got = "nothing" if text is None else f"{text!r} (did you mean {near[0]}?)" if near else repr(text)
    raise ValueError(f"--config must be a YAML file or one of the recipes {', '.join(names)}, got {got}")


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
