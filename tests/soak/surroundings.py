"""What the machine does to a command: no room, no descriptors, no memory, no permission, and others' leftovers."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import damage
from bench import MACHINE, MISTAKE, Bench, Failure, copied, last_line, require_line
from measurements import do, measured, require_results
from processes import Ended
from results import Differs
from trainings import finished, same_run, trained, words_of

LEFTOVERS = [
    {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_JOB_NAME": "batch", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
     "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "node[1-4]", "SLURM_NNODES": "1"},
    {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1",
     "TORCHELASTIC_RUN_ID": "x", "GROUP_RANK": "0"},
    {"LOCAL_RANK": "1", "NODE_RANK": "1"}, {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "PMI_RANK": "1"},
    {"LSB_JOBID": "1", "LSB_DJOB_RANKFILE": "/none"}, {"KUBERNETES_PORT": "tcp://127.0.0.1:443", "GROUP_RANK": "1"},
    {"CUDA_VISIBLE_DEVICES": ""}, {"OMP_NUM_THREADS": "x"}, {"MPLBACKEND": "module://matplotlib_inline.backend_inline"},
    {"LC_ALL": "C", "LANG": "C"},
    {"TMPDIR": "/absent"}, {"HOME": "/absent"}, {"COLUMNS": "1"},
]  # fmt: skip
"""Variables that other launchers, or other habits, leave in the environment."""


def case(bench: Bench) -> None:
    """Put one thing in a command's way."""
    kinds = [files_limited, descriptors, memory, leftovers, leftovers, kernels, deleted]
    if bench.soak.root:
        kinds += [disk_full, disk_full, read_only]
    bench.random.choice(kinds)(bench)


def _train(bench: Bench, **options: object) -> Ended:
    return bench.command(*words_of("advmoe"), **options)


def gone_wrong(bench: Bench, ended: Ended) -> bool:
    """Whether a command failed; as it should, or `Failure` is raised."""
    if ended.code == 0:
        return False
    if ended.code not in (MISTAKE, MACHINE):
        raise Failure(f"exit code {ended.code} for {MACHINE}: {last_line(ended.err)}")
    require_line(ended)
    bench.counts["refusals"] += 1
    return True


def go_on(bench: Bench) -> None:
    """Continue a training that the machine ended, and compare."""
    if (bench.folder / "run" / "config.yaml").exists() and not finished(bench.folder / "run"):
        bench.counts["resumptions"] += 1
        ended = bench.command("train", "--resume", "run")
        if ended.code == MISTAKE:
            ended = _train(bench)
        if ended.code != 0:
            raise Failure(f"exit code {ended.code} for 0 once all is well again: {last_line(ended.err)}")
    elif not finished(bench.folder / "run"):
        bench.fine(*words_of("advmoe"))
    same_run(bench.folder / "run", trained(bench.soak, "advmoe") / "run")


def _limited(bench: Bench, which: int, limit: int) -> None:
    """Train or evaluate under a limit, and once more without it."""
    bench.say(f"limit {which} is {limit}")
    if bench.random.random() < 0.6:
        gone_wrong(bench, _train(bench, limits={which: limit}))
        go_on(bench)
        return
    copied(trained(bench.soak, "advmoe") / "run", bench.folder / "run")
    name = bench.random.choice(["evaluate", "evaluate-2", "sweep", "dissect", "pathways", "report", "save", "export"])
    gone_wrong(bench, do(bench, name, limits={which: limit}))
    again(bench, name)


def again(bench: Bench, name: str) -> None:
    """Measure without hindrance, and compare."""
    if (ended := do(bench, name)).code != 0:
        raise Failure(f"exit code {ended.code} for 0 once all is well again: {last_line(ended.err)}")
    try:
        require_results(bench.folder, measured(bench.soak, "evaluate" if name == "evaluate-2" else name), name)
    except Differs as error:
        raise Failure(f"other results once all is well again: {error}") from error


def files_limited(bench: Bench) -> None:
    """No file may grow beyond some size."""
    _limited(bench, resource.RLIMIT_FSIZE, int(10 ** bench.random.uniform(2, 5.2)))


def descriptors(bench: Bench) -> None:
    """Few open files."""
    _limited(bench, resource.RLIMIT_NOFILE, bench.random.randint(8, 64))


def memory(bench: Bench) -> None:
    """Little address space: less than the imports take, or somewhat more."""
    _limited(bench, resource.RLIMIT_AS, int(bench.random.uniform(0.3, 4) * 2**30))


def leftovers(bench: Bench) -> None:
    """Variables of others in the environment: nothing changes."""
    env = dict(bench.random.choice(LEFTOVERS))
    bench.say(f"environment {env}")
    if bench.random.random() < 0.6:
        _undisturbed(bench, _train(bench, env=env))
        same_run(bench.folder / "run", trained(bench.soak, "advmoe") / "run")
        return
    copied(trained(bench.soak, "advmoe") / "run", bench.folder / "run")
    name = bench.random.choice(["evaluate", "evaluate-2", "dissect", "report", "export", "study"])
    _undisturbed(bench, do(bench, name, env=env))


def _undisturbed(bench: Bench, ended: Ended) -> None:
    if ended.code != 0:
        raise Failure(f"exit code {ended.code} for 0: {last_line(ended.err)}")


def kernels(bench: Bench) -> None:
    """A damaged cache of compiled kernels: they are compiled anew, or done without."""
    source = bench.soak.work / "cache" / "advmoe"
    trained(bench.soak, "advmoe")
    if not source.exists():
        return
    copied(source, bench.folder / "cache" / "advmoe")
    files = sorted(path for path in (bench.folder / "cache").rglob("*") if path.is_file())
    if not files:
        return
    path = bench.random.choice(files)
    how: Callable[[Path, Random], None] = bench.random.choice(
        [damage.flip, damage.cut, damage.empty, damage.noise, damage.extend, damage.delete, damage.folder, damage.fifo]
    )
    (bench.folder / ".notes").mkdir()
    bench.say(f"{path.name}: {how.__doc__}")
    how(path, bench.random)
    _undisturbed(bench, _train(bench, env={"XDG_CACHE_HOME": str(bench.folder / "cache")}))
    same_run(bench.folder / "run", trained(bench.soak, "advmoe") / "run")


def deleted(bench: Bench) -> None:
    """The run's folder deleted while a command is at work on it."""
    seconds, _ = json.loads((trained(bench.soak, "advmoe") / "cost.json").read_text())
    name = bench.random.choice(["train", "train", "evaluate", "dissect"])
    if name != "train":
        copied(trained(bench.soak, "advmoe") / "run", bench.folder / "run")
    delay, over = bench.random.uniform(0.2, 1.0) * seconds, threading.Event()

    def remove() -> None:
        if not over.wait(delay):
            shutil.rmtree(bench.folder / "run", ignore_errors=True)

    helper = threading.Thread(target=remove)
    helper.start()
    try:
        bench.say(f"the run is deleted after {delay:.2f} s")
        ended = _train(bench) if name == "train" else do(bench, name)
    finally:
        over.set()
        helper.join()
    gone_wrong(bench, ended)


class Mounted:
    """A small file system in memory, while open."""

    def __init__(self, folder: Path, kilobytes: int) -> None:
        self.folder, self.kilobytes = folder, kilobytes

    def __enter__(self) -> bool:
        self.folder.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", f"size={self.kilobytes}k", "tmpfs", str(self.folder)]
        self.there = subprocess.run(words, capture_output=True).returncode == 0
        return self.there

    def __exit__(self, *_: object) -> None:
        for _ in range(20):
            if not self.there or subprocess.run(["umount", str(self.folder)], capture_output=True).returncode == 0:
                return
            time.sleep(0.2)


def disk_full(bench: Bench) -> None:
    """A disk that fills up somewhere on the way."""
    small = int(10 ** bench.random.uniform(1, 3.2))
    bench.say(f"a disk of {small} kB")
    with Mounted(bench.folder / "disk", small) as there:
        if not there:
            bench.counts["skipped"] += 1
            return
        if bench.random.random() < 0.6:
            words = words_of("advmoe")
            gone_wrong(bench, bench.command(*words[:-1], "disk/run"))
            name = ""
        else:
            name = bench.random.choice(["evaluate", "sweep", "dissect", "pathways", "export"])
            source = trained(bench.soak, "advmoe") / "run"
            copied(source, bench.folder / "run")
            written = measured(bench.soak, name)
            out = ["--out", "disk/model.pt2" if name == "export" else "disk/results"]
            bench.say(f"results are in {written}")
            gone_wrong(bench, do(bench, name, *out))
        if not name and (bench.folder / "disk" / "run").exists():
            copied(bench.folder / "disk" / "run", bench.folder / "run")
    if name:
        again(bench, name)
    else:
        go_on(bench)


def read_only(bench: Bench) -> None:
    """A run on a file system that cannot be written: measured elsewhere, refused in place."""
    with Mounted(bench.folder / "disk", 20_000) as there:
        if not there:
            bench.counts["skipped"] += 1
            return
        copied(trained(bench.soak, "advmoe") / "run", bench.folder / "disk" / "run")
        subprocess.run(["mount", "-o", "remount,ro", str(bench.folder / "disk")], check=True, capture_output=True)
        words = ["--accelerator", "cpu", "--threads", "1", "--num-examples", "10"]
        ended = bench.command("evaluate", "disk/run", *words)
        if ended.code != MISTAKE:
            raise Failure(f"exit code {ended.code} for {MISTAKE} where nothing can be written")
        require_line(ended)
        bench.counts["refusals"] += 1
        bench.fine("evaluate", "disk/run", *words, "--out", "results")
        for name in ("export", "train"):
            ended = bench.command(*(["export", "disk/run"] if name == "export" else ["train", "--resume", "disk/run"]))
            gone_wrong(bench, ended)
