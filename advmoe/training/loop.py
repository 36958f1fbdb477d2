"""The epochs of a run, from its last checkpoint on: each is trained, validated, logged and saved."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from advmoe.errors import InputError
from advmoe.models import save_model
from advmoe.progress import BRIEF, bar, shown, tell
from advmoe.pruning import write_masks
from advmoe.rundir import BEST, LAST, METRICS, Epochs
from advmoe.tables import METHODS
from advmoe.text import one_line
from advmoe.training import checkpoint as checkpoints
from advmoe.training import manifest as manifests
from advmoe.training.board import Board, examples
from advmoe.training.finite import LOOK_EVERY
from advmoe.training.lines import epoch_line, summary
from advmoe.training.midway import ITERATIONS, Midway
from advmoe.training.phases import Phase, enter, leave, phase_at, phases
from advmoe.training.preemption import Requests, Stopped
from advmoe.training.schedule import batches, rate
from advmoe.training.trainer import Trainer, TrainingDiverged


def fit(
    run: Trainer,
    run_dir: Path,
    manifest: dict[str, Any],
    board: Board | None = None,
    resumption: dict[str, Any] | None = None,
    requests: Requests | None = None,
) -> None:
    """Train from the last checkpoint in `run_dir`, or from the start, to the end; write metrics, checkpoints and the
    model, and show every epoch on `board`.

    `run` is the trainer of the whole run's model; a phase may have another. A run that is resumed passes a manifest of
    this process as `resumption`, which `manifest` takes in unless nothing is left to do. A phase starts from the best
    checkpoint of the one before it; when a phase is over, `last` holds the start of the next. Raises `Stopped` where
    `requests` say so, once the run is saved.
    """
    course = _Course(run, run_dir, board, requests or Requests())
    if resumption is not None and course.left:
        if course.writes and course.begun:
            _tell_differences(manifest, resumption)
        manifest = manifests.noted(manifest, resumption)
        if course.writes:
            manifests.write(run_dir, manifest)
    course.follow()
    if course.writes:
        _finish(course.trainer, run_dir, manifest, course.progress)
        print(summary(course.progress, epochs=course.epochs, steps=run.config.training.val_attack_steps), flush=True)


class _Course:
    """A run on its way: its phase, the phase's trainer, and how far it is.

    `progress` is what a checkpoint holds: the `epoch`s that are done, the `best` one, `wall_seconds` and, within an
    epoch, `epoch_seconds` and the iterations that are done.
    """

    def __init__(self, run: Trainer, run_dir: Path, board: Board | None, requests: Requests) -> None:
        t = run.config.training
        self.run, self.run_dir, self.board, self.requests = run, run_dir, board, requests
        self.plan = phases(run.config)
        self.epochs = self.plan[-1].end
        self.iterations = len(batches(len(run.train_set), t.batch_size, seed=t.seed, epoch=0))
        self.writes = run.fabric.is_global_zero
        self.phase, self.trainer, self.progress = _begin(run, self.plan, run_dir, board)
        self.resumed_at, self.wall_seconds = self.progress["epoch"], self.progress["wall_seconds"]
        self.earlier = self.progress.get("epoch_seconds", 0.0)
        """Seconds that were spent before on the epoch under way."""

    @property
    def begun(self) -> bool:
        """Whether any iteration is done."""
        return bool(self.progress["epoch"] or ITERATIONS in self.progress)

    @property
    def left(self) -> int:
        """Epochs that are not done."""
        return self.epochs - int(self.progress["epoch"])

    def follow(self) -> None:
        """Train every epoch that is left. Raises `Stopped` where the requests say so."""
        done = self.resumed_at * self.iterations + self.progress.get(ITERATIONS, 0)
        whole = bar("train", self.epochs * self.iterations, unit="it", done=done)
        with whole as progress_bar, self.requests.listening():
            while self.left:
                name = f"{self.phase.name}, " if self.phase.name else ""
                progress_bar.set_description(f"{name}epoch {self.progress['epoch'] + 1}/{self.epochs}")
                line = self._train(progress_bar)
                self._turn()
                if self.writes:
                    self.requests.hear(line)  # before the checkpoint: an epoch that is done again is heard of again
                    checkpoints.save(self.run_dir / LAST, self.trainer.state(self.progress))
                self.run.fabric.barrier()
                if self.left and (reason := self.requests.agreed(self.run.fabric)[1]) is not None:
                    raise Stopped(reason, f"after epoch {self.progress['epoch']} of {self.epochs}")

    def _train(self, progress_bar: Any) -> dict[str, Any]:
        """Train the next epoch, validate, log, and keep the weights where they are the best. Returns the log's line."""
        epoch, trainer, phase, started = self.progress["epoch"], self.trainer, self.phase, time.perf_counter()
        trainer.after_iteration = partial(self._heed, started - self.earlier)
        with _named(phase):
            trainer.train_epoch(epoch - phase.first, progress_bar)
        seconds, self.earlier = time.perf_counter() - started + self.earlier, 0.0
        with _named(phase), shown(self.writes, delay=BRIEF):
            measured = _measured(trainer, epoch)
        line = _epoch_line(trainer, phase, epoch, seconds, self.iterations, measured)
        score, best = _score(trainer.config.training.method, measured), self.progress["best"]
        better = best is None or score is None or score >= best["score"]
        self.progress = {
            "epoch": epoch + 1,
            "best": {"epoch": epoch + 1, "score": score, "val": measured} if better else best,
            "wall_seconds": self.progress["wall_seconds"] + time.perf_counter() - started,
        }
        if self.writes:
            _log(trainer, self.run_dir, line, self.board)
            pace = (self.progress["wall_seconds"] - self.wall_seconds) / (epoch + 1 - self.resumed_at)
            _tell_epoch(line, epochs=self.epochs, best=better, left=pace * self.left)
            if better:
                _keep_best(trainer, self.run_dir, self.progress)
        return line

    def _turn(self) -> None:
        """Enter the next phase where this one is over: the whole run's model goes on from the best of this one."""
        if self.progress["epoch"] != self.phase.end or not self.left:
            return
        self.run.fabric.barrier()
        best = checkpoints.load_latest(self.run_dir / BEST) or checkpoints.load(self.run_dir / BEST)
        leave(self.phase, self.trainer, self.run, best.weights)
        self.phase = phase_at(self.plan, self.progress["epoch"])
        self.trainer = enter(self.phase, self.run)
        self.progress["best"] = None

    def _heed(self, started: float, done: int, generator: torch.Generator) -> None:
        """Save the run within an epoch of which `done` iterations are done, and stop it, where the requests ask it."""
        trainer, fabric = self.trainer, self.run.fabric
        if fabric.world_size > 1 and fabric.device.type == "cuda" and done % LOOK_EVERY:
            return  # to agree, every GPU would have to catch up
        save, reason = self.requests.agreed(fabric)
        if not save:
            return
        trainer.require_finite()
        midway = Midway.now(trainer, done, generator)
        if self.writes:
            seconds = time.perf_counter() - started
            spent = self.progress["wall_seconds"] + seconds - self.progress.get("epoch_seconds", 0.0)
            now = self.progress | {ITERATIONS: done, "epoch_seconds": seconds, "wall_seconds": spent}
            state = trainer.state(now)
            checkpoints.save(self.run_dir / LAST, replace(state, more=state.more | midway.tensors()))
        fabric.barrier()
        if reason is not None:
            raise Stopped(reason, f"within epoch {self.progress['epoch'] + 1}, after {done} of its iterations")


def _tell_differences(manifest: dict[str, Any], resumption: dict[str, Any]) -> None:
    """Print what this process has other than the run had, if that can change the weights."""
    if (other := manifests.differing(manifest, resumption)) is not None:
        rule = "the weights need not be those, bit by bit, of a run that was never interrupted"
        print(f"note  the run goes on with other {other}: {rule}", flush=True)


def _tell_epoch(line: dict[str, Any], *, epochs: int, best: bool, left: float) -> None:
    """Tell of an epoch by its entry of `metrics.jsonl`; `left` are seconds."""
    told = epoch_line(line, epochs=epochs, best=best, left=left)
    tell(told, "epoch", **line, best=best, seconds_left=round(left, 1))


def _log(trainer: Trainer, run_dir: Path, line: dict[str, Any], board: Board | None) -> None:
    """Add an epoch's line to `metrics.jsonl` and the board."""
    earlier = Epochs.read(run_dir / METRICS)
    Epochs([*earlier.lines, line]).write(run_dir / METRICS)
    if board is not None:
        board.write(line, examples(trainer))


def _keep_best(trainer: Trainer, run_dir: Path, progress: dict[str, Any]) -> None:
    """Write the weights that were validated, as the best checkpoint and as the run's model."""
    with trainer.averaged():
        checkpoints.save(run_dir / BEST, replace(trainer.state(progress), more={}), keep_previous=False)
        save_model(trainer.as_saved(), run_dir)


def _begin(
    run: Trainer, plan: tuple[Phase, ...], run_dir: Path, board: Board | None
) -> tuple[Phase, Trainer, dict[str, Any]]:
    """The phase under way, its trainer, and how far it is: as the last checkpoint has it, or at the start."""
    last = checkpoints.load_latest(run_dir / LAST)
    start: dict[str, Any] = {"epoch": 0, "best": None, "wall_seconds": 0.0}
    progress = start if last is None else last.progress
    phase = phase_at(plan, progress["epoch"])
    trainer = enter(phase, run)
    if last is not None:
        try:
            trainer.restore(last)
        except (RuntimeError, ValueError) as error:
            rule = "hold weights of the model that its config.yaml, and --model, describe"
            raise InputError(f"{run_dir / 'last'} must {rule}, got {one_line(error)}") from error
    if run.fabric.is_global_zero:
        logged = Epochs.read(run_dir / METRICS).upto(progress["epoch"])
        for problem in logged.problems:
            tell(f"note  {problem}")
        if (run_dir / METRICS).exists():
            logged.write(run_dir / METRICS)
        if board is not None:
            board.follow(logged.lines)
    return phase, trainer, progress


@contextmanager
def _named(phase: Phase) -> Iterator[None]:
    """A `TrainingDiverged` from inside names the phase."""
    try:
        yield
    except TrainingDiverged as error:
        raise (error if phase.name is None else TrainingDiverged(f"{phase.name}: {error}")) from None


def _measured(trainer: Trainer, epoch: int) -> dict[str, float] | None:
    """The validation after `epoch` (from 0). Raises `TrainingDiverged`, which names the epoch."""
    try:
        return trainer.validate()
    except TrainingDiverged as error:
        raise TrainingDiverged(f"after epoch {epoch + 1}: {error}") from None


def _score(method: str, measured: dict[str, float] | None) -> float | None:
    """The accuracy that the best checkpoint is chosen by; None (the last one is best) without a validation split."""
    if measured is None:
        return None
    return measured["robust_accuracy" if METHODS[method].adversarial else "clean_accuracy"]


def _epoch_line(
    trainer: Trainer, phase: Phase, epoch: int, seconds: float, iterations: int, measured: dict[str, float] | None
) -> dict[str, Any]:
    t = trainer.config.training
    seen = sum(trainer.means.counts.values()) * trainer.fabric.world_size
    return {
        "epoch": epoch + 1,
        **({} if phase.name is None else {"phase": phase.name}),
        "lr": t.lr * rate(t, (epoch - phase.first) * iterations, iterations),
        "train": trainer.means.report(trainer.fabric),
        "val": measured,
        "seconds": round(seconds, 3),
        "images_per_second": round(seen / seconds, 1),
        "layers": trainer.use.report(trainer.fabric),
    }


def _finish(trainer: Trainer, run_dir: Path, manifest: dict[str, Any], progress: dict[str, Any]) -> None:
    best = checkpoints.load_latest(run_dir / BEST)
    if best is not None:
        trainer.load(best.weights)
    save_model(model := trainer.as_saved(), run_dir)
    if model.spec["kind"] == "sparse":
        write_masks(model, run_dir)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    sound = {name: value for name, value in manifest.items() if name != "diverged"}  # as it may have, earlier
    manifests.write(run_dir, {**sound, "finished": now, "wall_seconds": round(progress["wall_seconds"], 1)})
