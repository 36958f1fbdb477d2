"""Files of a run, a study, a checkpoint or an interrupted evaluation damaged, and then every command tried on them."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

from bench import MISTAKE, Bench, Failure, Soak, copied, last_line, require_line
from measurements import ATTACK, MEASURES, do, require_results
from processes import Ended, Kill
from results import Differs, changes, snapshot
from trainings import TINY, half_trained, same_run, trained

HUGE = 6 * 2**30
"""Bytes of a file that nobody may read into memory; it takes no room on the disk."""
PICTURES = (".svg", ".png")
"""Files that are written and never read: damaged less often."""
LARGE = 10_000_000
"""Bytes up to which a file is damaged byte by byte."""


# What is damaged


def all_measured(soak: Soak) -> Path:
    """The folder of a run with all that commands write there, a sparse one beside it, and a checkpoint of it."""

    def make(bench: Bench) -> None:
        copied(trained(soak, "advmoe") / "run", bench.folder / "run")
        copied(trained(soak, "sparse") / "run", bench.folder / "other")
        for name in ("evaluate", "sweep", "dissect", "pathways", "report", "save"):
            if (ended := do(bench, name)).code != 0:
                raise Failure(f"exit code {ended.code} for 0: {last_line(ended.err)}")

    return soak.reference("measured", make)


def half_evaluated(soak: Soak) -> Path:
    """The folder of a run whose evaluation was killed when some of its batches were done."""

    def make(bench: Bench) -> None:
        copied(trained(soak, "advmoe") / "run", bench.folder / "run")
        whole = do(bench, "evaluate").operations
        copied(trained(soak, "advmoe") / "run", bench.folder / "again")
        shutil.rmtree(bench.folder / "run")
        (bench.folder / "again").rename(bench.folder / "run")
        do(bench, "evaluate", kill=Kill(9, operation=int(whole * 0.7)))
        if not list((bench.folder / "run" / ".evaluation").glob("pgd*")):
            raise Failure("the evaluation that should be half done is not")

    return soak.reference("half-evaluated", make)


def studied(soak: Soak) -> Path:
    """The folder of a small study."""

    def make(bench: Bench) -> None:
        if (ended := do(bench, "study")).code != 0:
            raise Failure(f"exit code {ended.code} for 0: {last_line(ended.err)}")

    return soak.reference("studied", make)


# How


def flip(path: Path, random: Random) -> None:
    """One bit."""
    _edit(path, lambda data: data.__setitem__(at := random.randrange(len(data)), data[at] ^ 1 << random.randrange(8)))


def byte(path: Path, random: Random) -> None:
    """One byte."""
    _edit(path, lambda data: data.__setitem__(random.randrange(len(data)), random.randrange(256)))


def cut(path: Path, random: Random) -> None:
    """All from some byte on."""
    os.truncate(path, random.randrange(path.stat().st_size or 1))


def extend(path: Path, random: Random) -> None:
    """Some bytes more."""
    with path.open("ab") as file:
        file.write(random.choice([b"\0" * 100, b"}", b"\n{}\n", b"\xff\xfe", random.randbytes(50)]))


def empty(path: Path, random: Random) -> None:
    """Nothing in it."""
    os.truncate(path, 0)


def noise(path: Path, random: Random) -> None:
    """As many random bytes."""
    path.write_bytes(random.randbytes(min(path.stat().st_size, LARGE)))


def null(path: Path, random: Random) -> None:
    """Another value in JSON: whole, but not what it should be."""
    texts = shlex.split("""null [] {} '"text"' 1e999 NaN '{"a": 1}{' """)
    path.write_text(random.choice([*texts, "[" * 100_000, '{"a": ' * 5000, "{}\n" * 3]))


def delete(path: Path, random: Random) -> None:
    """Gone."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def huge(path: Path, random: Random) -> None:
    """Sparse, and larger than memory."""
    os.truncate(path, HUGE)


def fifo(path: Path, random: Random) -> None:
    """A pipe that nobody writes to."""
    delete(path, random)
    os.mkfifo(path)


def folder(path: Path, random: Random) -> None:
    """A folder of its name, with a file."""
    delete(path, random)
    path.mkdir()
    (path / "inside").write_text("mine")


def file(path: Path, random: Random) -> None:
    """A file of its name."""
    delete(path, random)
    path.write_text("")


def link(path: Path, random: Random) -> None:
    """A link to what it was, which now lies elsewhere."""
    outside = path_of_sentinels(path) / "moved"
    shutil.move(path, outside)
    path.symlink_to(outside)


def astray(path: Path, random: Random) -> None:
    """A link to somebody else's file or folder, to a device, or to nothing."""
    home = path_of_sentinels(path)
    was_folder = path.is_dir()
    delete(path, random)
    targets = [home / "folder", home] if was_folder else [home / "file.json", Path("/dev/zero"), Path("/dev/full")]
    path.symlink_to(random.choice([*targets, home / "absent", path]))


def swap(path: Path, random: Random) -> None:
    """The content of another file there."""
    others = [each for each in path.parent.iterdir() if each.is_file() and not each.is_symlink() and each != path]
    if others:
        shutil.copy(random.choice(others), path)


def foreign(path: Path, random: Random) -> None:
    """The file of that name of another run."""
    names = [each for each in path_of_case(path).glob(f"other/**/{path.name}") if each.is_file()]
    if names:
        shutil.copy(random.choice(names), path)


OF_FILES: list[Callable[[Path, Random], None]] = [
    flip, flip, flip, byte, cut, extend, empty, noise, null, delete, huge, fifo, folder, link, astray, swap, foreign,
]  # fmt: skip
OF_FOLDERS: list[Callable[[Path, Random], None]] = [delete, file, fifo, link, astray]


def _edit(path: Path, change: Callable[[bytearray], None]) -> None:
    data = bytearray(path.read_bytes())
    if data:
        change(data)
        path.write_bytes(data)


def path_of_case(path: Path) -> Path:
    """The case's folder, which holds `path`."""
    return next(parent for parent in path.parents if (parent / ".notes").is_dir())


def path_of_sentinels(path: Path) -> Path:
    """The folder outside of the run that nothing may change."""
    return path_of_case(path) / "outside"


# Cases


class Try:
    """A command to try on what was damaged, and how its undamaged result is known."""

    def __init__(self, run: Callable[[Bench], Ended], check: Callable[[Bench], None]) -> None:
        self.run, self.check = run, check


def _measure(name: str, *more: str) -> Try:
    def check(bench: Bench) -> None:
        from measurements import measured

        require_results(bench.folder, measured(bench.soak, MEASURES[name].like or name), name)

    return Try(lambda bench: do(bench, name, *more), check)


def _resume(bench: Bench) -> Ended:
    return bench.command("train", "--resume", "run")


def _resumed(bench: Bench) -> None:
    same_run(bench.folder / "run", trained(bench.soak, "advmoe") / "run")


def _none(bench: Bench) -> None:
    """Nothing to compare."""


def _start(bench: Bench) -> Ended:
    options = ["--training.method", "at-experts", "--training.init_from", "run", "--training.epochs", "1"]
    return bench.command("train", *TINY, *options, "--run-dir", "new")


def _from_checkpoint(bench: Bench) -> Ended:
    code = MEASURES["save"].words[0].replace("import save_pretrained", "import from_pretrained, save_pretrained")
    code = code.replace("'run', 'saved'", "from_pretrained('saved'), 'resaved'")
    return bench.process([bench.soak.python, "-c", code])


def _study_reported(bench: Bench) -> Ended:
    return bench.command("report", "studies/convergence-smoke")


def _against(bench: Bench) -> Ended:
    return bench.command("pathways", "run", *ATTACK, "--no-figure", "--against", "other", "--out", "new")


RESUME = Try(_resume, _resumed)
_COMMANDS = ("evaluate", "evaluate-2", "sweep", "dissect", "pathways", "export", "save", "cost", "report", "report")
ON_A_RUN = [_measure(name) for name in _COMMANDS]
ON_A_RUN += [RESUME, Try(_start, _none), Try(_against, _none)]
TRIES: dict[str, tuple[Callable[[Soak], Path], str, list[Try]]] = {
    "half a training": (half_trained, "run", [RESUME, RESUME, RESUME, *ON_A_RUN[-2:]]),
    "a run": (all_measured, "run", ON_A_RUN),
    "half an evaluation": (half_evaluated, "run/.evaluation", [_measure("evaluate", "--resume"), _measure("evaluate")]),
    "a study": (studied, "studies", [_measure("study"), Try(_study_reported, _none)]),
    "a checkpoint": (all_measured, "saved", [Try(_from_checkpoint, _none)]),
}
"""What is damaged: how it is made, which folder of it, and the commands that are tried."""


def case(bench: Bench) -> None:
    """Damage one thing, or two, and try a command on it."""
    random = bench.random
    what = random.choice([name for name in TRIES for _ in range(1 if name == "a study" else 3)])
    make, inside, tries = TRIES[what]
    source = make(bench.soak)
    for each in source.iterdir():
        if not each.name.startswith(".") and each.name != "whole":
            copied(each, bench.folder / each.name) if each.is_dir() else shutil.copy(each, bench.folder)
    if not (bench.folder / "other").exists():
        copied(trained(bench.soak, "sparse") / "run", bench.folder / "other")
    outside = bench.folder / "outside"
    (outside / "folder").mkdir(parents=True)
    (outside / "file.json").write_text("{}")
    (outside / "folder" / "pgd-20.0.json").write_text("mine")
    (bench.folder / ".notes").mkdir()
    damaged = damage(bench, bench.folder / inside)
    tried = random.choice(tries)
    before = snapshot(bench.folder)
    ended = tried.run(bench)
    judge(bench, ended, tried, damaged, before)


def damage(bench: Bench, home: Path) -> Path:
    """Damage something in `home`; returns its path."""
    random = bench.random
    paths = sorted(path for path in home.rglob("*") if ".tmp" not in path.parts)
    weights = [1 if path.suffix in PICTURES or path.is_dir() else 5 for path in paths]
    (path,) = random.choices(paths, weights)
    how = random.choice(OF_FOLDERS if path.is_dir() else OF_FILES)
    bench.say(f"{path.relative_to(bench.folder)}: {(how.__doc__ or 'A file in its place.').strip()}")
    how(path, random)
    return path


def judge(bench: Bench, ended: Ended, tried: Try, damaged: Path, before: dict) -> None:
    """Raise `Failure` unless a damage was refused by name, or noted, or changed nothing."""
    after = snapshot(bench.folder)
    elsewhere = [each for each in changes(before, after) if each.startswith(("outside", "other"))]
    if elsewhere:
        raise Failure(f"touches what is not its: {elsewhere[0]}")
    pages = [path.read_text() for path in bench.folder.glob("*.html")]
    said = "\n".join([ended.err, ended.out, *pages])
    if ended.code == MISTAKE:
        bench.counts["refusals"] += 1
        line = require_line(ended)
        if not named(damaged, line):
            raise Failure(f"the message does not name {damaged.relative_to(bench.folder)}: {line}")
        different = [each for each in changes(before, after) if not each.startswith((".notes", ".tmp"))]
        if different:
            raise Failure(f"a refused command changes things: {different[0]}")
        return
    if ended.code == 1 and tried.check is not _none and "study" in ended.words and named(damaged, said):
        return
    if ended.code != 0:
        raise Failure(f"exit code {ended.code} for 0 or 2: {last_line(ended.err)}")
    try:
        tried.check(bench)
    except (Differs, Failure) as error:
        if not noted(damaged, said):
            raise Failure(f"{damaged.relative_to(bench.folder)} was damaged, and without a word: {error}") from error


def named(damaged: Path, line: str) -> bool:
    """Whether a message names the damaged file, or the folder that it is part of."""
    known = [damaged.name, *([damaged.parent.name] if damaged.parent.name not in ("run", "saved") else [])]
    fields = damaged.name == "config.yaml" and " must " in line
    return fields or any(name in line for name in known)


def noted(damaged: Path, text: str) -> bool:
    """Whether a command that went on said something of the damage."""
    return any(word in text for word in ("stale", "damaged", "going on", "note ")) and named(damaged, text)
