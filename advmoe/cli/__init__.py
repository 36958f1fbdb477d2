"""The command line: parse, call, print.

A mistake of the user's (an unknown field, a value out of range, a missing data set) is one line on stderr and exit
code 2, with nothing created; a failure of the machine's is one line too, and says how to go on. Commands import what
they run, so that `advmoe --help` needs no torch.

A command is a module here, with a `parser` and a `run`, and an entry in `COMMANDS`.
"""

from __future__ import annotations

import io
import os
import re
import sys
from contextlib import redirect_stdout, suppress
from typing import Any, TextIO, cast

from advmoe import __version__
from advmoe.cli import cost, dissect, evaluate, export, pathways, push, recipes, report, study, sweep_eps, train
from advmoe.cli.arguments import FAILED, Unfinished, explained, fail, new_parser, require_sound
from advmoe.errors import InputError, of_machine, reason
from advmoe.progress import shown
from advmoe.signals import described, raised

COMMANDS: dict[str, Any] = {
    "train": train,
    "evaluate": evaluate,
    "sweep-eps": sweep_eps,
    "dissect": dissect,
    "pathways": pathways,
    "cost": cost,
    "push": push,
    "export": export,
    "report": report,
    "recipes": recipes,
    "study": study,
}
"""The module of each command."""

CLOSED = 141
"""The exit code where the output was closed early: what a shell shows of a command that a broken pipe has ended."""


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit code is 0, 1 (training diverged, an exported file computes something else, or a part of
    a study failed), 2 (a mistake in the input), 3 (the machine failed: see `FAILED`), 129, 130 or 143 (ended by SIGHUP,
    Ctrl-C or SIGTERM) or 141 (nobody reads the output). A bug's traceback is shown, with Python's own exit code 1.
    """
    argv = sys.argv[1:] if argv is None else argv
    _accept_any_text()
    _wait_passively()
    try:
        with raised():
            args = _parse(argv)
            command = args["command"]
            with shown(), redirect_stdout(cast(TextIO, _Output(sys.stdout))):
                code: int = COMMANDS[command].run(args[command], argv)
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


def _parse(argv: list[str]) -> dict[str, Any]:
    parser = new_parser("Adversarially robust mixture-of-experts vision models.")
    parser.prog = "advmoe"
    parser.add_argument("--version", action="version", version=f"advmoe {__version__}")
    commands = parser.add_subcommands(dest="command", metavar="COMMAND")
    parsers = {name: command.parser() for name, command in COMMANDS.items()}
    for name, sub in parsers.items():
        commands.add_subcommand(name, sub, help=sub.description)
    try:
        args: dict[str, Any] = parser.parse_args(_in_full(argv)).as_dict()
    except ValueError as error:
        command = next((word for word in argv if word in parsers), None)
        if command is None and not any(word.startswith("-") for word in argv[:1]):
            got = repr(argv[0]) if argv else "nothing"  # the parser names but a few of those there are
            raise InputError(f"COMMAND must be one of {', '.join(parsers)}, got {got}") from None
        raise explained(str(error), command, parsers) from None
    require_sound(parsers[args["command"]], args[args["command"]])
    return args


def _in_full(argv: list[str]) -> list[str]:
    """`argv` with the short options of `train` written out: the parser takes `--model` for the group of fields."""
    argv = _joined(argv)
    if argv[:1] != ["train"]:
        return argv
    full = {"--model": "--model.source", "--to-moe": "--model.to_moe"}
    words = ["--to-moe=true" if word == "--to-moe" else word for word in argv]
    parts = (word.partition("=") for word in words)
    return [full.get(option, option) + equals + rest for option, equals, rest in parts]


def _accept_any_text() -> None:
    """Have what the terminal's encoding lacks, or what is no text, as names of files may be, printed with escapes."""
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
    """Whether somebody takes what was printed; if not, or where it cannot be written, Python must not try again at its
    end.
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
