"""The command line: parse, call, print.

A mistake of the user's (an unknown field, a value out of range, a missing data set) is one line on stderr and exit
code 2, with nothing created; a failure of the machine's is one line too, and says how to go on. Commands import what
they run, so that `advmoe --help` needs no torch.

A command is a module here, with a `parser` and a `run`, and an entry in `COMMANDS`.
"""

from __future__ import annotations

import io
import math
import os
import re
import sys
from contextlib import redirect_stdout, suppress
from typing import Any, NoReturn, TextIO, cast

from advmoe import __version__
from advmoe.cli import (
    certify,
    cost,
    data,
    dissect,
    evaluate,
    export,
    init,
    pathways,
    predict,
    push,
    recipes,
    report,
    search,
    study,
    sweep_eps,
    train,
    zoo,
)
from advmoe.cli.arguments import FAILED, Unfinished, fail, grouped, new_parser, require_sound, unknown_option
from advmoe.config import require_one_of, require_path
from advmoe.errors import InputError, lacking, of_machine, reason
from advmoe.progress import LOG_FORMAT, LOG_FORMATS, log_format, shown, warnings_told
from advmoe.signals import described, raised
from advmoe.tables.plugins import add_plugin
from advmoe.text import nearest, show
from advmoe.training.launchers import require_ranks

COMMANDS: dict[str, Any] = {
    "train": train,
    "predict": predict,
    "evaluate": evaluate,
    "sweep-eps": sweep_eps,
    "dissect": dissect,
    "pathways": pathways,
    "certify": certify,
    "cost": cost,
    "push": push,
    "export": export,
    "report": report,
    "data": data,
    "init": init,
    "recipes": recipes,
    "zoo": zoo,
    "study": study,
    "search": search,
}
"""The module of each command."""

SHELLS = ("bash", "zsh", "fish")

CLOSED = 141
"""The exit code where the output was closed early: what a shell shows of a command that a broken pipe has ended."""

MEMORY_TO_START = 2**30
"""Bytes of address space: PyTorch and what we import take 0.65 GiB. With less, libraries end the process."""
ROOM_FOR_BYTECODE = 64 * 2**20
"""Bytes of a disk that bytecode may need: PyTorch's and ours."""


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit code is 0, 1 (training diverged, an exported file computes something else, or a part of
    a study failed), 2 (a mistake in the input), 3 (the machine failed: see `FAILED`), 85 (training stopped as it was
    told to, and can go on), 129, 130 or 143 (ended by SIGHUP, Ctrl-C or SIGTERM) or 141 (nobody reads the output). A
    bug's traceback is shown, with Python's own exit code 1.
    """
    argv = sys.argv[1:] if argv is None else argv
    _accept_any_text()
    _wait_passively()
    _spare_bytecode()
    try:
        with raised():
            words = _without_common(argv)
            with shown(), warnings_told(), redirect_stdout(cast(TextIO, _Output(sys.stdout))):
                command, options = _parse(words)
                if command != "recipes":
                    _require_memory()
                    require_ranks()
                code: int = COMMANDS[command].run(options, argv)
            return code if _flushed() else code or CLOSED
    except (KeyboardInterrupt, Exception) as error:
        ended = _told(error, argv)
        if ended is None:
            raise
        return ended


def _told(error: BaseException, argv: list[str]) -> int | None:
    """Show what ended a command as one line; the exit code, None for a bug."""
    cause, left = (error.__cause__, f"; {error}") if isinstance(error, Unfinished) else (error, "")
    assert cause is not None
    if isinstance(cause, _OutputClosed):
        # Whoever reads (head, say) has seen enough. Commands print when their work is done.
        _flushed()
        return CLOSED
    if isinstance(cause, BrokenPipeError):  # other pipes are other bugs
        return None
    if isinstance(cause, KeyboardInterrupt):
        said, code = described(cause)
        return fail(said + left, code)
    if isinstance(cause, InputError) or _named(cause, argv):
        return fail(cause, 2)
    if not of_machine(cause):
        return None
    with suppress(OSError):  # what this could not print either
        _flushed()
    return fail(reason(cause) + (left or "; what was there before is kept: try again once that is mended"), FAILED)


def _named(error: BaseException, argv: list[str]) -> bool:
    """Whether a file that the user named is missing, or no file, or not to be read."""
    kinds = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)
    words = {part for word in argv for part in (word, word.partition("=")[2])}
    return isinstance(error, kinds) and error.filename is not None and os.fsdecode(error.filename) in words


def _wait_passively() -> None:
    """Have OpenMP's threads sleep while they wait for work, before PyTorch loads: those that spin take the cores from
    whatever else runs there. Nothing is changed of what the user has set.
    """
    if not any(name in os.environ for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")):
        os.environ["OMP_WAIT_POLICY"] = "passive"


def _limit(name: str) -> float:
    """A limit of this process in bytes (`RLIMIT_AS`), infinite where there is none."""
    try:
        import resource
    except ImportError:  # Windows
        return math.inf
    limit, _ = resource.getrlimit(getattr(resource, name))
    return math.inf if limit == resource.RLIM_INFINITY else limit


def _require_memory() -> None:
    """Raise `MemoryError` where PyTorch cannot be loaded: it would end this process without a word of ours."""
    if (limit := _limit("RLIMIT_AS")) < MEMORY_TO_START:
        got = f"{limit / 2**20:.0f} MiB"
        raise MemoryError(f"the limit on memory (ulimit -v) must be >= {MEMORY_TO_START // 2**20} MiB, got {got}")


def _spare_bytecode() -> None:
    """Have Python, and the processes that this one starts, write no bytecode where there may be no room for it.

    Python 3.11 then keeps a part of a module's, and can import that module no more (python/cpython#126606).
    """
    room = math.inf
    if hasattr(os, "statvfs"):
        disk = os.statvfs(os.path.dirname(__file__))
        room = disk.f_bavail * disk.f_frsize
    if _limit("RLIMIT_FSIZE") == math.inf and room >= ROOM_FOR_BYTECODE:
        return
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"


def _without_common(argv: list[str]) -> list[str]:
    """`argv` without the options that every command has, wherever they stand: plugins are executed first, as what they
    add may be another option's value. Raises `InputError`.
    """
    rest, words = list[str](), iter(argv)
    for word in words:
        option, equals, value = word.partition("=")
        if word == "--quiet":
            os.environ[LOG_FORMAT] = "quiet"
        elif option in ("--plugin", "--log-format"):
            value = value if equals else next(words, "")
            if option == "--plugin":
                require_path(option, value)
                add_plugin(value)
            else:
                require_one_of(LOG_FORMATS, option, value)
                os.environ[LOG_FORMAT] = value
        else:
            rest.append(word)
    if asked := os.environ.get(LOG_FORMAT):
        require_one_of(LOG_FORMATS, LOG_FORMAT, asked)
    if log_format() != "text":  # its bars are not ours
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    return rest


def _parse(argv: list[str]) -> tuple[str, dict[str, Any]]:
    """The command, and the options that the user wrote: those of a group of fields (`--data.root`) under its name.

    Raises `InputError` for what no parser takes; `SystemExit` once help or version was shown.
    """
    if argv[:1] == ["help"]:
        argv = [*argv[1:2], "--help"]
    command = argv[0] if argv else ""
    if command not in COMMANDS:
        if command.partition("=")[0] == "--completion":
            _complete(command.partition("=")[2] or "".join(argv[1:2]))
        if command.startswith("-"):
            _parse_top(argv)
        got = f"{show(command)}{nearest(command, COMMANDS)}" if argv else "nothing"
        raise InputError(f"COMMAND must be one of {', '.join(COMMANDS)}, got {got}")
    parser = COMMANDS[command].parser()
    parser.prog = f"advmoe {command}"
    parsed, unknown = parser.parse_known_args(_joined(argv[1:]))
    if unknown:
        raise unknown_option(unknown, command, parser)
    options = grouped(vars(parsed))
    require_sound(parser, options)
    return command, options


def _parse_top(argv: list[str]) -> None:
    """Parse what comes before any command: help and version. Raises `InputError` for anything else."""
    parser = new_parser("Adversarially robust mixture-of-experts vision models.")
    parser.prog = "advmoe"
    parser.add_argument("--version", action="version", version=f"advmoe {__version__}")
    parser.add_argument(
        "--completion",
        metavar="{bash,zsh,fish}",
        help="print the script that has a shell complete commands and options",
    )
    common = parser.add_argument_group("options of every command")
    common.add_argument(
        "--plugin", metavar="FILE.py", help="a file of yours that registers backbones, routers, attacks, losses, data "
        "sets or training methods; executed; as often as you like",
    )  # fmt: skip
    common.add_argument("--quiet", action="store_true", help="no bars, no lines on how far it is; notes and results")
    common.add_argument(
        "--log-format", metavar="{text,json,quiet}", help="of what is told on stderr; json: an object a line"
    )
    known = [option for action in parser._actions for option in action.option_strings]
    if (word := argv[0].partition("=")[0]) not in known:
        there = f"must follow a COMMAND, of which there are {', '.join(COMMANDS)}"
        raise InputError(f"{show(argv[0])} {there}{nearest(word, known)}")
    commands = parser.add_subparsers(title="commands (advmoe COMMAND --help says more)", metavar="COMMAND")
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.parser().description)
    parser.parse_args(argv)


def _complete(shell: str) -> NoReturn:
    """Print the completion script of a shell. Raises `InputError` for another one, or without the extra."""
    require_one_of(SHELLS, "--completion", shell)
    try:
        import shtab
    except ImportError as error:
        raise lacking("--completion", "completion", error) from error
    parser = new_parser("Adversarially robust mixture-of-experts vision models.")
    parser.prog = "advmoe"
    commands = parser.add_subparsers()
    for name, command in COMMANDS.items():
        own = command.parser()
        commands.add_parser(name, help=own.description, parents=[own], add_help=False)
    print(shtab.complete(parser, shell), flush=True)
    raise SystemExit(0)


def _accept_any_text() -> None:
    """Print what the terminal's encoding lacks, or what is no text, as names of files may be, with escapes."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the shell has closed it
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class _OutputClosed(BrokenPipeError):
    """Nobody reads what is printed."""


class _Output:
    """A stream like `stream`, which tells its own broken pipe from others."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write `text`; raises `_OutputClosed` where nobody reads."""
        try:
            return self._stream.write(text)
        except BrokenPipeError as error:
            raise _OutputClosed(*error.args) from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _flushed() -> bool:
    """Write out what was printed; False where nobody reads it.

    Where it cannot be written, stdout becomes the null device, so that Python does not try again at its end.
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return False
        raise
    return True


def _joined(argv: list[str]) -> list[str]:
    """`argv` with negative fractions tied to their options: the parser would take `-1/255` for one more option."""
    words: list[str] = []
    for word in argv:
        if words and re.fullmatch(r"-[\d.]+/[\d.]+", word) and words[-1].startswith("--") and "=" not in words[-1]:
            words[-1] += f"={word}"
        else:
            words.append(word)
    return words
