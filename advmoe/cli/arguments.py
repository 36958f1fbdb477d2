"""What the commands share: parsers, options, and mistakes shown as one line."""

from __future__ import annotations

import ast
import inspect
import json
import os
import shlex
import shutil
import sys
from argparse import SUPPRESS, Action, ArgumentParser, HelpFormatter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import MISSING, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from advmoe.config import (
    Accelerator,
    Batch,
    Config,
    Count,
    Pixels,
    Seed,
    Threads,
    is_source,
    near_matches,
    network,
    overlaid,
    require,
    require_path,
    require_text,
    sections,
    typed,
)
from advmoe.documents import parse_yaml
from advmoe.errors import InputError, of_machine, reason
from advmoe.progress import log_format
from advmoe.rundir import CONFIG, require_plain
from advmoe.tables import Table
from advmoe.tables.plugins import executed
from advmoe.text import MOST_OF_A_VALUE, as_option, cut, show, split_words, wrapped
from advmoe.training.launchers import rank
from advmoe.zoo import PREFIX, find

_LONGEST = 1000
"""Characters of a mistake's line: a path may be long, what else is shown of the input is cut where it is told."""

# What `evaluate` may change of a run: how it is attacked and where its images lie, never the model.
EVALUATE_FIELDS = {"threat": None, "attack": None, "data": ("name", "root", "download", "image_size", "workers")}


FAILED = 3
"""The exit code where the machine failed: a full disk, a file or permission that went, no memory, no descriptors."""


class Parser(ArgumentParser):
    """Parsing errors are raised: `main` shows them as it shows every other mistake."""

    def error(self, message: str) -> NoReturn:
        """Raise the message as an `InputError`."""
        raise InputError(message)


class _Help(HelpFormatter):
    """Help in the width of a terminal: no field in the line on usage, and long choices on lines of their own."""

    def add_usage(
        self, usage: str | None, actions: Iterable[Action], groups: Iterable[Any], prefix: str | None = None
    ) -> None:
        """Usage without the configuration's fields, of which there are dozens."""
        named = [each for each in actions if not any("." in option for option in each.option_strings)]
        super().add_usage(usage, named, groups, prefix)

    def _format_action_invocation(self, action: Action) -> str:
        text = super()._format_action_invocation(action)
        indent = " " * self._current_indent
        if len(indent + text) <= self._width:
            return text
        option, _, choices = text.partition(" ")
        parts = choices.replace(",", ", ").split()
        lines = wrapped(" ".join(parts), width=self._width - len(indent) - 4)
        return f"\n{indent}    ".join([option, *(line.replace(", ", ",") for line in lines)])


USUAL_THREADS = "PyTorch's choice"


def new_parser(description: str) -> Parser:
    """A parser that reports only what the user wrote: the help texts tell the defaults."""
    return Parser(description=description, argument_default=SUPPRESS, allow_abbrev=False, formatter_class=_Help)


def any_pgd() -> str:
    """Names of PGD, for help: those of losses that plugins have added too, and without any nothing is imported."""
    names = ["pgd-50", "pgd-50-soft", "pgd-50-margin"]
    if executed():
        from advmoe.attacks.pgd import LOSSES

        names += [f"pgd-50-{loss}" for loss in LOSSES if LOSSES.added(loss)]
    return ", ".join(names)


def measuring_parser(description: str, threads: str = USUAL_THREADS, *, attacks: str | None = "") -> Parser:
    """A parser with the options of all commands that attack a run, or a classifier of the user's own.

    `threads`: see `add_engine`. `attacks`: the help of `--attacks`, by default what names any; None without it.
    """
    parser = new_parser(description)
    add = parser.add_argument
    add("target", metavar="RUN|FILE.py:FACTORY", help="a run, zoo:NAME, or a function that makes your classifier")
    add("--weights", metavar="FILE", help="safetensors for FILE.py:FACTORY")
    add("--model", dest="source", metavar="FILE.py:FACTORY", help="the network of your own that RUN trained; executed")
    add("--out", metavar="DIR", help="where results go (default: the run, or evaluations/<file>-<factory>)")
    if attacks is not None:
        every = (
            f"{any_pgd()}, autoattack, autoattack-plus, autoattack-rand, autoattack:apgd-ce+square, restarts, routed"
            f"{_added_attacks()} (default: PGD, and through soft routing or, of a plain model, on the margin)"
        )
        add("--attacks", metavar="NAME,...", help=attacks or every)
    add("--num-examples", metavar="N", help="test images, drawn by --seed (default: all)")
    add("--batch-size", metavar="B", help="images attacked at once, which share random draws (default: 250)")
    add("--seed", metavar="SEED", help="of the images drawn and the attacks' random draws (default: the run's)")
    add("--allow", metavar="CHECK,...", help="checks made before an attack that may fail")
    add_engine(parser, threads)
    add_fields(parser, EVALUATE_FIELDS, defaults=False)
    return parser


def _added_attacks() -> str:
    """The attacks that plugins have added, for help; without any nothing is imported for that."""
    if not executed():
        return ""
    from advmoe.evaluation.suite import ATTACKS

    return "".join(f", {name}" for name in ATTACKS if ATTACKS.added(name))


def target_and_options(args: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The run or classifier to measure, and the options of all measurements; mistakes show before torch is imported."""
    target, overrides = args["target"], config_fields(args)
    below = {}
    if not is_source(target):
        run = opened_run("RUN", target)
        below = Config.load(run / CONFIG).to_dict()
        if target.startswith(PREFIX):  # its folder is not for results
            target, args = str(run), {"out": f"evaluations/{target.removeprefix(PREFIX)}", **args}
    Config.from_dict(overlaid(below, overrides))
    options = {
        "overrides": overrides,
        "num_examples": number("--num-examples", Count, args.get("num_examples")),
        "batch_size": number("--batch-size", Batch, args.get("batch_size", "250")),
        "seed": number("--seed", Seed, args.get("seed")),
        "attacks": split_words(args["attacks"]) if "attacks" in args else None,
        "allow": split_words(args.get("allow", "")),
        **engine_options(args),
    }
    return target, options | {name: args[name] for name in ("out", "weights", "source") if name in args}


def radii(option: str, text: str) -> list[float]:
    """The radii, in the unit of pixels, that an `option` lists. Raises `ValueError` for one that is none."""
    listed = [float(typed(option, Pixels, word)) for word in split_words(text)]
    require(bool(listed) and min(listed) >= 0, option, "at least one radius >= 0", text)
    return listed


def drawing(args: dict[str, Any]) -> Any:
    """The module that draws, unless no figure is wanted. Raises `ValueError` where it cannot."""
    if "no_figure" in args:
        return None
    from advmoe.report import figures

    figures.require_matplotlib()
    return figures


def add_engine(parser: Parser, threads: str = USUAL_THREADS) -> None:
    """Add the options that `engine_options` reads; `threads`: the default, as the help says it."""
    accelerators = ",".join(get_args(Accelerator))
    parser.add_argument("--accelerator", metavar=f"{{{accelerators}}}", help="where to run (default: auto)")
    parser.add_argument("--threads", metavar="T", help=f"CPU threads per process (default: {threads})")


def engine_options(args: dict[str, Any]) -> dict[str, Any]:
    """Where to compute: the options that commands share."""
    return {
        "accelerator": typed("--accelerator", Accelerator, args.get("accelerator", "auto")),
        "threads": number("--threads", Threads, args.get("threads")),
    }


def add_fields(parser: Parser, wanted: dict[str, Any], *, defaults: bool) -> None:
    """Make options of the fields of the groups in `wanted` (None: all of them)."""
    for group, names in wanted.items():
        cls = get_type_hints(Config)[group]
        section = parser.add_argument_group(group, description=inspect.getdoc(cls))
        hints, docs = get_type_hints(cls, include_extras=True), field_docs()[cls.__name__]
        for item in fields(cls):
            if names is None or item.name in names:
                default = item.default if item.default_factory is MISSING else item.default_factory()
                note = _shown(default) if defaults else "the run's"
                text = f"{docs[item.name]} (default: {note})".replace("%", "%%")
                option = f"--{group}.{item.name}"
                section.add_argument(option, metavar=_metavar(hints[item.name]), help=text)


@cache
def field_docs() -> dict[str, dict[str, str]]:
    """The docstring after each field of each section of the settings: Python itself does not keep them."""
    docs: dict[str, dict[str, str]] = {}
    for cls in (each for module in (network, sections) for each in ast.parse(inspect.getsource(module)).body):
        if isinstance(cls, ast.ClassDef):
            by_field = docs.setdefault(cls.name, {})
            for item, after in zip(cls.body, cls.body[1:], strict=False):
                match item, after:
                    case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                        by_field[name] = text
    return docs


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _table(hint: Any) -> Table[Any] | None:
    """The table that a field's values are names of, if they are."""
    return next((each for each in getattr(hint, "__metadata__", ()) if isinstance(each, Table)), None)


def _metavar(hint: Any) -> str:
    if type(None) in get_args(hint):  # `T | None`
        hint = get_args(hint)[0]
    if get_origin(hint) is Literal:
        return f"{{{','.join(get_args(hint))}}}"
    if (table := _table(hint)) is not None:
        return f"{{{','.join([*table, *(each.spelling.split()[0] for each in table.families)])}}}"
    while get_args(hint):  # `Annotated`
        hint = get_args(hint)[0]
    if get_args(hint):
        return f"{{{','.join(get_args(hint))}}}"
    return {bool: "{true,false}", int: "INT", float: "NUMBER", Pixels: "NUMBER|N/255", str: "TEXT"}[hint]


def config_fields(args: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The configuration's fields on the command line: numbers and truth values as YAML reads them, text as it is."""
    overrides: dict[str, dict[str, Any]] = {}
    for group, cls in get_type_hints(Config).items():
        hints = get_type_hints(cls)
        for name, text in (args.get(group) or {}).items():
            base = next(iter(get_args(hints[name])), hints[name])
            as_yaml = base in (bool, int, float) or (text == "null" and type(None) in get_args(hints[name]))
            value = parse_yaml(text, f"{group}.{name}") if as_yaml else text
            overrides.setdefault(group, {})[name] = value
    return overrides


def require_sound(parser: Parser, args: dict[str, Any]) -> None:
    """Raise `ValueError`, which names the option, for text that is none, or a path that no file system has."""
    for action in parser._actions:
        group, _, field = action.dest.rpartition(".")
        texts, shape = (args.get(group, {}) if group else args).get(field), str(action.metavar)
        name = next((each for each in action.option_strings if each.startswith("--")), shape)
        for text in texts if isinstance(texts, list) else [texts]:
            if isinstance(text, str) and any(word in shape for word in ("RUN", "DIR", "FILE", "YAML")):
                # What is written stands under a longer name until it is whole.
                require_path(name, text, 200 if (name, shape) == ("--out", "FILE") else 255)
            elif isinstance(text, str):
                require_text(name, text, empty=True)


def existing_run(option: str, text: str) -> Path:
    """The run directory that `option` names. Raises `ValueError` where it is none, or holds links."""
    require((Path(text) / CONFIG).is_file(), option, "a run directory (one that holds a config.yaml)", text)
    require_plain(Path(text))
    return Path(text)


def opened_run(option: str, text: str) -> Path:
    """The run directory that `option` names, or the folder of a zoo's model; to be read. Raises `ValueError`."""
    return find(text).folder() if text.startswith(PREFIX) else existing_run(option, text)


def number(option: str, hint: Any, text: str | None) -> Any:
    """The number in the `text` of an `option`, of a type such as `config.Count`; None of None.

    Raises `ValueError` for anything else.
    """
    return None if text is None else typed(option, hint, parse_yaml(text, option))


def only_one_of(args: dict[str, Any], *names: str) -> str | None:
    """The one of the options `names` that was given, if any. Raises `InputError` for several."""
    given = [name for name in names if name in args]
    if len(given) > 1:
        raise InputError(
            f"{as_option(given[0])} must stand without {as_option(given[1])}: each prints something and stops"
        )
    return given[0] if given else None


def grouped(options: dict[str, Any]) -> dict[str, Any]:
    """`options` with those of a group (`data.root`) in a dictionary under its name."""
    nested: dict[str, Any] = {}
    for name, value in options.items():
        group, dot, field = name.partition(".")
        if dot:
            nested.setdefault(group, {})[field] = value
        else:
            nested[name] = value
    return nested


def unknown_option(words: list[str], command: str, parser: Parser) -> InputError:
    """The error for `words` of a command line that its parser does not know, with near matches of an option."""
    word = cut(words[0].split("=")[0], MOST_OF_A_VALUE)
    if not word.startswith("--"):
        return InputError(f"{command} must get no more than `advmoe {command} --help` names, got {show(word)} too")
    options = [text[2:] for action in parser._actions for text in action.option_strings if text[:2] == "--"]
    near = [f"--{name}" for name in near_matches(word[2:], options)]
    hint = f"did you mean {' or '.join(near)}?" if near else f"see advmoe {command} --help"
    return InputError(f"{word} is no option of {command}: {hint}")


class Unfinished(Exception):
    """Work was interrupted by its cause, and can be continued: the text says by which command."""


@contextmanager
def continuable(home: Path, again: str, mark: str) -> Iterator[None]:
    """Inside, an interruption that leaves something to continue (`mark` exists in `home`) becomes `Unfinished`."""
    try:
        yield
    except (KeyboardInterrupt, Exception) as error:
        if os.path.lexists(home / mark) and (isinstance(error, KeyboardInterrupt) or of_machine(error)):
            note = "" if isinstance(error, KeyboardInterrupt) else f"what {home} holds is kept; "
            raise Unfinished(f"{note}to continue: {again}") from error
        raise


def fail(error: BaseException | str, code: int) -> int:
    """Show a mistake as one line on stderr, if anybody still reads there; returns `code`. The line of one of several
    processes that were started together says which.
    """
    text = reason(error) if isinstance(error, BaseException) else error
    if number := rank():
        text = f"process {number}: {text}"
    line = f"advmoe: error: {cut(' '.join(text.split()), _LONGEST)}"
    if log_format() == "json":
        line = json.dumps({"event": "error", "exit_code": code, "text": line})
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)
    return code


def to_run(*words: str | Path, plugins_of: Sequence[str] = ()) -> str:
    """The command line `advmoe WORD...` as a shell takes it, called as this one was; with the plugins of another."""
    plugins: list[str] = []
    for word, following in zip(plugins_of, [*plugins_of[1:], ""], strict=False):
        option, equals, value = word.partition("=")
        if option == "--plugin":
            plugins += [option, value if equals else following]
    # A path may begin like an option.
    plain = [f"./{word}" if isinstance(word, Path) and str(word).startswith("-") else str(word) for word in words]
    return shlex.join([*_program(), *plain, *plugins])


def _program() -> list[str]:
    """What calls this command line again: `advmoe` where a shell finds it, else its path, or Python's."""
    called, python = Path(sys.argv[0]), Path(sys.executable)
    found = shutil.which("advmoe")
    as_module = called.name == "__main__.py" and called.parent.name == "advmoe"
    if not (as_module or called.stem == "advmoe"):  # from Python, or a test
        return ["advmoe"]
    script = python.with_name("advmoe") if as_module else Path(os.path.abspath(called))
    if found is not None and Path(found).parent == script.parent:
        return ["advmoe"]
    if not as_module:
        return [_short(script)]
    on_path = shutil.which(python.name)
    return [python.name if on_path is not None and Path(on_path) == python else _short(python), "-m", "advmoe"]


def _short(path: Path) -> str:
    """A program's path, from the working directory where it lies below."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
