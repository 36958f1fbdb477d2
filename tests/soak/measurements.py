"""Measurements, exports, reports and studies killed and done again: the same results, and no older one lost."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import STOPPED, Bench, Failure, Soak, copied, last_line, require_stopped
from processes import Ended
from results import Differs, content, require_same
from trainings import KEPT, trained

ATTACK = shlex.split("--accelerator cpu --threads 1 --batch-size 10")
SAVE = (
    "import sys; from advmoe import save_pretrained\n"
    "try: save_pretrained('run', 'saved')\n"
    "except ValueError as error: sys.exit((print('advmoe: error:', error, file=sys.stderr), 2)[1])\n"
    "except OSError as error: sys.exit((print('advmoe: error:', error, file=sys.stderr), 3)[1])\n"
    "except KeyboardInterrupt: sys.exit((print('advmoe: error: interrupted', file=sys.stderr), 130)[1])"
)
"""`save_pretrained` as a program, as the library has no command for it."""


@dataclass(frozen=True)
class Measure:
    """A command on the run `run`, and the files that it writes."""

    words: Sequence[str]
    files: Sequence[str]
    resumes: bool = False
    """Whether it knows `--resume`."""
    like: str | None = None
    """The measure whose results it must have, where it is not its own."""
    python: bool = False


def _evaluate(*more: str) -> tuple[str, ...]:
    return ("evaluate", "run", *ATTACK, "--num-examples", "60", "--attack.steps", "20", *more)


_SAVED = ("model.safetensors", "model.json", "config.json", "config.yaml", "manifest.json", "README.md")
_EVALUATION = ("run/evaluation.json", "run/evaluation-examples.npz")
_STUDY = shlex.split(
    "study convergence --scale smoke --jobs 1 --num-examples 10 --out studies --accelerator cpu --model.width 4 "
    "--data.train_examples 64 --training.batch_size 16 --training.val_attack_steps 1"
)

MEASURES: dict[str, Measure] = {
    "evaluate": Measure(_evaluate("--workers", "1"), _EVALUATION, resumes=True),
    "evaluate-2": Measure(_evaluate("--workers", "2"), _EVALUATION, resumes=True, like="evaluate"),
    "sweep": Measure(
        ("sweep-eps", "run", *ATTACK, "--num-examples", "20", "--eps", "0,0.05,0.1"),
        ("run/sweep.json", "run/sweep.svg"),
    ),
    "dissect": Measure(
        ("dissect", "run", *ATTACK, "--num-examples", "40"), ("run/dissection.json", "run/dissection-pgd-2.svg")
    ),
    "pathways": Measure(
        ("pathways", "run", *ATTACK, "--num-examples", "40"),
        ("run/pathways.json", "run/pathways-flow.svg", "run/pathways-usage.svg"),
    ),
    "export": Measure(
        ("export", "run", "--format", "torch-export", "--num-examples", "10", "--threads", "1"),
        ("run/model.pt2", "run/model.pt2.json"),
    ),
    "report": Measure(("report", "run", "--threads", "1", "-o", "page.html"), ("page.html", "run/gallery.npz")),
    "cost": Measure(
        ("cost", "run", "--threads", "1", "--batch", "2", "--seconds", "0.1", "--out", "cost.json"), ("cost.json",)
    ),
    "save": Measure((SAVE,), tuple(f"saved/{name}" for name in _SAVED), python=True),
    "study": Measure(_STUDY, ("studies/convergence-smoke/study.json",)),
}  # fmt: skip

UNLIKE = {"cost": "its numbers are times", "study": "its tables hold times"}
"""Measures whose results are only looked at for whether they are whole."""


def do(bench: Bench, name: str, *more: str, **options: object) -> Ended:
    """Run the command of a measure."""
    measure = MEASURES[name]
    if measure.python:
        return bench.process([bench.soak.python, "-c", *measure.words], **options)
    return bench.command(*measure.words, *more, **options)


def measured(soak: Soak, name: str, variant: str = "advmoe") -> Path:
    """The folder of a measurement that nobody interrupted, with `cost.json`, its seconds and file operations."""

    def make(bench: Bench) -> None:
        copied(trained(soak, variant) / "run", bench.folder / "run")
        ended = do(bench, name)
        if ended.code != 0:
            raise Failure(f"exit code {ended.code} for 0: {last_line(ended.err)}")
        (bench.folder / "cost.json.soak").write_text(json.dumps([ended.seconds, ended.operations]))

    return soak.reference(f"measure-{name}-{variant}", make)


def case(bench: Bench) -> None:
    """Measure, be killed once or more, measure again, and find what an undisturbed measurement finds."""
    random = bench.random
    name = random.choice([name for name in MEASURES for _ in range(1 if name == "study" else 3)])
    measure = MEASURES[name]
    expected = measured(bench.soak, measure.like or name)
    seconds, operations = json.loads((measured(bench.soak, name) / "cost.json.soak").read_text())
    copied(trained(bench.soak, "advmoe") / "run", bench.folder / "run")
    older = with_older(bench, measure, expected) if random.random() < 0.5 else None
    again: list[str] = []
    for _ in range(random.randint(1, 3)):
        kill = bench.kill(seconds, operations, children=name == "evaluate-2")
        ended = do(bench, name, *again, kill=kill)
        done = whole(bench, name, expected)
        if kill.whom != "child":
            require_stopped(ended, kill, done=done or measure.python)  # the library leaves signals as they are
        elif ended.code != 0:
            raise Failure(f"exit code {ended.code} after one of its processes was killed: {last_line(ended.err)}")
        if not ended.killed and ended.code not in (0, *STOPPED.values()):
            raise Failure(f"exit code {ended.code} without a kill: {last_line(ended.err)}")
        require_kept(bench, measure, older, expected)
        if measure.resumes and random.random() < 0.7:
            again = ["--resume"]
            bench.counts["resumptions"] += 1
    ended = do(bench, name, *again)
    if ended.code != 0:
        raise Failure(f"exit code {ended.code} for 0: {last_line(ended.err)}")
    try:
        require_results(bench.folder, expected, name)
    except Differs as error:
        raise Failure(f"other results than undisturbed: {error}") from error


def whole(bench: Bench, name: str, expected: Path) -> bool:
    """Whether all results are there."""
    try:
        require_results(bench.folder, expected, name)
    except Differs:
        return False
    return True


def require_results(found: Path, expected: Path, name: str) -> None:
    """Raise `Differs` unless the results of a measure are those that are expected, or at least whole."""
    for file in MEASURES[name].files:
        if not (expected / file).exists():
            continue
        if not (found / file).exists():
            raise Differs(f"{file} is missing")
        if name in UNLIKE:
            content(found / file)
        else:
            require_same(found, expected, [file])
    for run in (expected / "studies" / "runs").glob("[!.]*") if name == "study" else ():
        require_same(found / "studies" / "runs" / run.name, run, KEPT)


def with_older(bench: Bench, measure: Measure, expected: Path) -> Path:
    """Put older results, which differ by a last line, where the command writes; returns where a copy of them is."""
    kept = bench.folder / ".older"
    for file in filter(lambda file: (expected / file).exists(), measure.files):
        place = bench.folder / file
        place.parent.mkdir(parents=True, exist_ok=True)
        (kept / file).parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes((expected / file).read_bytes() + b"\n")
        shutil.copy(place, kept / file)
    return kept


def require_kept(bench: Bench, measure: Measure, older: Path | None, expected: Path) -> None:
    """Raise `Failure` unless each result is the older one or the new one, as a whole."""
    if older is None:
        return
    for file in measure.files:
        if not (expected / file).exists():
            continue
        place = bench.folder / file
        if not place.exists():
            raise Failure(f"{file}, which was there before, is gone after a kill")
        if place.read_bytes() == (older / file).read_bytes():
            continue
        try:
            content(place)
        except Differs as error:
            raise Failure(f"an older result is neither kept nor replaced: {error}") from error
