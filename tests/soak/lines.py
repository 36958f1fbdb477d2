"""Command lines made at random from what the help texts name: refused in one line, or done."""

from __future__ import annotations

import re
import shlex
import shutil
import signal
from functools import cache
from pathlib import Path
from random import Random

from bench import MACHINE, MISTAKE, STOPPED, Bench, Failure, copied, require_line
from measurements import ATTACK
from processes import Ended
from results import changes, snapshot
from trainings import TINY, trained

POLITE = 25.0
"""Seconds after which a command that is still at work is interrupted, as a user would."""

INTS = shlex.split(
    """0 1 2 3 7 -1 010 1e3 1.5 1:30 0x10 0x_ 1_0 '' ' ' nan inf true null ~ 1000000000000 -9223372036854775809 [1]
    2024-01-01 1e400 "'2'" """
)
INTS += ["1" * 400, "\u0663"]
COUNTS = shlex.split("0 1 2 -1 1.5 two '' true null 1e0 01")
"""For what starts processes or threads: nothing large, which this machine would have to bear."""
NUMBERS = shlex.split(
    """0 0.1 0.5 1 2 -0.5 1e308 1e-320 1e999 nan -inf .5 5. 1,5 0.1.1 1_0.5 '' half 1/2 0b1 1e [0.1] {} true null"""
)
NUMBERS += ["1" * 400, "\u0660.\u0665"]
PIXELS = shlex.split("8/255 1/255 0 0/255 -1/255 1/0 8/ /255 8/255/2 1e308/1e-308 nan/1 '8 / 255'")
PIXELS += NUMBERS
WORDS = shlex.split(
    """'' ' ' x null ~ - -- é 数字 'a b' %s {0} $HOME * a,b , "'" '"' : !!python/object:os.system @ .."""
)
WORDS += ["a\nb", "\x1b[31m", "x" * 300, "x" * 5000, "&a [*a]", "\udcff"]
PATHS = shlex.split(
    """run run/ missing file run/config.yaml run/model.safetensors . .. /dev/null /dev/full /proc/self new/deep/er ''
    ~nobody/x other run/missing net.py net.py:make net.py:absent net.py:fails missing.py:make file:make net.py:
    :make link"""
)
PATHS += ["x" * 300]
NAMES = shlex.split(
    """digits-advmoe digits-standard digits resnet18 wrn-10-1 wrn-600004-1 deit-tiny vgg16 pgd-1 pgd-2-soft pgd-0 routed
    autoattack:apgd-ce table1 list every-2 every-1 every-999999999 both"""
)

HEAVY = {"--workers", "--jobs", "--devices", "--threads", "--data.workers", "--seeds"}
"""Options that start processes or threads."""
TAME = {
    "train": [*TINY, "--training.epochs", "1", "--run-dir", "new"],
    "evaluate": ["run", *ATTACK, "--num-examples", "10", "--workers", "1", "--attack.steps", "1"],
    "sweep-eps": ["run", *ATTACK, "--num-examples", "5", "--eps", "0.1"],
    "dissect": ["run", *ATTACK, "--num-examples", "10"],
    "pathways": ["run", *ATTACK, "--num-examples", "10"],
    "cost": ["run", "--batch", "1", "--seconds", "0.01", "--threads", "1"],
    "push": ["run", "owner/name"],
    "export": ["run", "--format", "torch-export", "--num-examples", "2", "--threads", "1"],
    "report": ["run", "--threads", "1", "-o", "page.html"],
    "recipes": [],
    "study": ["convergence", "--dry-run", "--out", "studies"],
}
"""Of each command a line that is right and soon done."""
NET = """
from torch import nn
def make():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
def fails():
    raise RuntimeError("it cannot be made")
"""


def options_of(bench: Bench, command: str) -> list[tuple[str, str]]:
    """The options of a command with what its help says that they take."""
    return _parsed(bench, command)


@cache
def _known(text: str) -> list[tuple[str, str]]:
    found = re.findall(r"^  (?:-\w, )?(--[\w.-]+)(?: (\S+))?", text, re.MULTILINE)
    return [(option, metavar) for option, metavar in found if option != "--help"]


def _parsed(bench: Bench, command: str) -> list[tuple[str, str]]:
    def make(inner: Bench) -> None:
        (inner.folder / "help").write_text(inner.fine(command, "--help").out)

    return _known((bench.soak.reference(f"help-{command}", make) / "help").read_text())


def value(option: str, metavar: str, random: Random) -> str:
    """A value for an option: likely one of its kind, perhaps anything."""
    if option in HEAVY:
        return random.choice(COUNTS)
    if random.random() < 0.1:
        return random.choice([*WORDS, *PATHS, *NUMBERS])
    if metavar.startswith("{"):
        choices = metavar.strip("{}").split(",")
        return random.choice(
            [*choices, random.choice(choices).upper(), random.choice(choices)[:-1], *random.sample(WORDS, 2)]
        )
    if "/255" in metavar:
        return random.choice(PIXELS)
    if metavar.startswith(("INT", "NUMBER", "B", "N", "S", "K", "T")) and "TEXT" not in metavar:
        pool = INTS if metavar.startswith("INT") or len(metavar) == 1 else [*NUMBERS, *NAMES]
        several = metavar.endswith(",...") and random.random() < 0.5
        return ",".join(random.sample(pool, 2)) if several else random.choice(pool)
    return random.choice([*WORDS, *PATHS, *NAMES, *NAMES])


def mutated(words: list[str], random: Random) -> list[str]:
    """A line with one slip of the fingers."""
    words, at = list(words), random.randrange(len(words))
    match random.randrange(7):
        case 0:
            del words[at]
        case 1:
            words.insert(at, words[at])
        case 2:
            words[at] = words[at][:-1]
        case 3:
            words[at] = words[at].replace("-", "_")
        case 4:
            words.insert(at, random.choice(WORDS))
        case 5:
            words[at : at + 2] = ["=".join(words[at : at + 2])]
        case 6:
            letters = list(words[at])
            if letters:
                letters[random.randrange(len(letters))] = random.choice("aZ-._/ 0=")
            words[at] = "".join(letters)
    return words


def line(bench: Bench) -> list[str]:
    """A command line."""
    random = bench.random
    command = random.choice([*TAME, "train", "train", "train", "evaluate", "study"])
    words = list(TAME[command])
    known = options_of(bench, command)
    for option, metavar in random.sample(known, min(len(known), random.choice([0, 1, 1, 1, 2, 2, 3, 5]))):
        given = value(option, metavar, random) if metavar or random.random() < 0.05 else None
        words += [option] if given is None else random.choice([[option, given], [f"{option}={given}"]])
    if command == "train" and random.random() < 0.5:
        words.append("--print_config")
    if random.random() < 0.3 and words:
        words = mutated(words, random)
    if random.random() < 0.03:
        command = random.choice([*WORDS, "trian", "--version", "-h"])
    return [command, *(word.replace("\0", "") for word in words)]


def case(bench: Bench) -> None:
    """Try one line where there is a run, a file, a network and more to name."""
    for name, variant in (("run", "advmoe"), ("other", "sparse")):
        copied(trained(bench.soak, variant) / "run", bench.folder / name)
    (bench.folder / "file").write_text("mine")
    (bench.folder / "net.py").write_text(NET)
    (bench.folder / "link").symlink_to("absent")
    before = _of(bench.folder)
    words = line(bench)
    ended = bench.command(*words, polite=POLITE)
    judge(bench, ended, changes(before, _of(bench.folder)))


def _of(folder: Path) -> dict:
    shutil.rmtree(folder / ".tmp", ignore_errors=True)
    return {name: what for name, what in snapshot(folder).items() if not name.startswith((".notes", "__pycache__"))}


def judge(bench: Bench, ended: Ended, different: list[str]) -> None:
    """Raise `Failure` unless a line was done, or refused as it should be."""
    if ended.code == 0:
        return
    if ended.code not in (1, MISTAKE, MACHINE, STOPPED[signal.SIGINT]):
        raise Failure(f"exit code {ended.code}")
    require_line(ended)
    if ended.code == MISTAKE:
        bench.counts["refusals"] += 1
        if different:
            raise Failure(f"a refused command changes things: {different[0]}")
