"""The command line: parse, call, print.

A mistake of the user's (an unknown field, a value out of range, a missing data set) is one line on stderr and exit
code 2, with nothing created. Commands import what they run, so that `advmoe --help` needs no torch.

A command is a module here, with a `parser` and a `run`, and an entry in `COMMANDS`.
"""

from __future__ import annotations

import io
import os
import re
import sys
from typing import Any

from advmoe import __version__
from advmoe.cli import cost, dissect, evaluate, export, pathways, push, recipes, report, study, sweep_eps, train
from advmoe.cli.arguments import explained, fail, is_ours, new_parser
from advmoe.progress import shown

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
    a study failed), 2 (a mistake in the input), 130 (interrupted) or 141 (nobody reads the output).
    """
    argv = sys.argv[1:] if argv is None else argv
    _accept_any_text()
    try:
        args = _parse(argv)
        command = args["command"]
        with shown():
            code: int = COMMANDS[command].run(args[command], argv)
        return code if _flushed() else code or CLOSED
    except BrokenPipeError as error:
        # Whoever reads (head, say) has seen enough. Commands print when their work is done; other pipes are other bugs.
        if not is_ours(error):
            raise
        _flushed()
        return CLOSED
    except (ValueError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
        if not is_ours(error):
            raise
        return fail(error, 2)
    except KeyboardInterrupt:
        return fail("interrupted", 130)


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
            raise ValueError(f"COMMAND must be one of {', '.join(parsers)}, got {got}") from None
        raise explained(str(error), command, parsers) from None
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


def _flushed() -> bool:
    """Whether somebody takes what was printed; if not, Python must not try again at its end."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
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
