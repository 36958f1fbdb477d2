"""Trainings killed and continued, which must end as if they had never been."""

from __future__ import annotations

import json
from pathlib import Path

from bench import MISTAKE, TINY, Bench, Failure, Soak, copied, finished, last_line, require_line, require_stopped
from results import Differs, require_same

VARIANTS: dict[str, tuple[list[str], str | None]] = {
    "advmoe": ([], None),
    "advmoe-both": (["--training.alternation", "both"], None),
    "advmoe-warm-start": (["--training.alternation", "warm-start"], None),
    "advmoe-ema": (["--training.ema", "0.5"], None),
    "advmoe-embedding": (["--model.router", "embedding", "--training.attack_routing", "mixed"], None),
    "at": (["--training.method", "at"], None),
    "at-awp": (["--training.method", "at", "--training.awp", "0.005"], None),
    "at-no-validation": (["--training.method", "at", "--data.val_fraction", "0"], None),
    "standard": (["--training.method", "standard"], None),
    "dense": (["--training.method", "at", "--model.kind", "dense"], None),
    "sparse": (["--training.method", "sparse", "--model.kind", "sparse", "--training.prune_epochs", "1"], None),
    "at-routers": (["--training.method", "at-routers", "--training.init_from", "start"], "standard"),
    "at-experts": (["--training.method", "at-experts", "--training.init_from", "start"], "at-routers"),
}
"""What is trained: options over the tiny ones, and the variant that it starts from."""

KEPT = ["model.safetensors", "model.json", "metrics.jsonl", "masks.safetensors", "best/model.safetensors"]
KEPT += ["last/model.safetensors", "last/more.safetensors"]
"""What must be the same, bit for bit where it is weights."""


def words_of(variant: str, devices: int = 1) -> list[str]:
    """The command that trains `variant` into `run`."""
    return ["train", *TINY, *VARIANTS[variant][0], "--devices", str(devices), "--run-dir", "run"]


def started_from(soak: Soak, variant: str, folder: Path) -> None:
    """Put into `folder` the run that `variant` starts from."""
    if (start := VARIANTS[variant][1]) is not None:
        copied(trained(soak, start) / "run", folder / "start")


def trained(soak: Soak, variant: str, devices: int = 1) -> Path:
    """The folder of a training that nobody interrupted: `run`, and `cost.json`, its seconds and file operations."""

    def make(bench: Bench) -> None:
        started_from(soak, variant, bench.folder)
        ended = bench.fine(*words_of(variant, devices))
        (bench.folder / "cost.json").write_text(json.dumps([ended.seconds, ended.operations]))

    return soak.reference(f"train-{variant}-{devices}", make)


def half_trained(soak: Soak) -> Path:
    """The folder of a training that was killed after its first checkpoint."""
    from processes import Kill

    reference = trained(soak, "advmoe")
    _, operations = json.loads((reference / "cost.json").read_text())

    def make(bench: Bench) -> None:
        bench.command(*words_of("advmoe"), kill=Kill(9, operation=int(operations * 0.85)))
        if finished(bench.folder / "run") or not (bench.folder / "run" / "last").exists():
            raise Failure("the training that should be half done is not")

    return soak.reference("half", make)


def case(bench: Bench) -> None:
    """Train, be killed, go on, be killed again, and end."""
    random = bench.random
    variant = random.choice(list(VARIANTS))
    devices = 2 if random.random() < 0.2 else 1
    reference = trained(bench.soak, variant, devices)
    seconds, operations = json.loads((reference / "cost.json").read_text())
    started_from(bench.soak, variant, bench.folder)
    run = bench.folder / "run"
    for _ in range(random.randint(1, 4)):
        kill = bench.kill(seconds, operations, children=devices > 1)
        if go_on(bench, words_of(variant, devices), kill):
            break
    if not finished(run):
        go_on(bench, words_of(variant, devices))
    same_run(run, reference / "run")


def go_on(bench: Bench, anew: list[str], kill=None) -> bool:
    """Continue the run, or start it anew where there is nothing to continue; whether it came to its end."""
    run = bench.folder / "run"
    words, options = anew, {} if kill is None else {"kill": kill}
    if run.exists():
        words = ["train", "--resume", "run"]
        bench.counts["resumptions"] += 1
    ended = bench.command(*words, **options)
    if ended.code == MISTAKE and words is not anew and not ended.killed:
        require_line(ended)
        bench.counts["refusals"] += 1
        ended = bench.command(*anew, **options)
        if ended.code == MISTAKE:
            raise Failure(f"can neither be resumed nor started anew: {last_line(ended.err)}")
    if kill is None and ended.code != 0:
        raise Failure(f"exit code {ended.code} for 0: {last_line(ended.err)}")
    if kill is not None:
        require_stopped(ended, kill, done=finished(run))
        if not ended.killed and ended.code != 0:
            raise Failure(f"exit code {ended.code} without a kill: {last_line(ended.err)}")
    return ended.code == 0


def same_run(found: Path, expected: Path) -> None:
    """Raise `Failure` unless two runs ended with the same weights, metrics and choice of the best."""
    try:
        require_same(found, expected, KEPT)
    except Differs as error:
        raise Failure(f"not the run that was never interrupted: {error}") from error
