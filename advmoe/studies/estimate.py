"""How long a plan will take, and how much disk: its work, times the times of passes here, by so many processes."""

from __future__ import annotations

import heapq
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from advmoe.studies.estimate_times import Clock, Times, calibrated
from advmoe.studies.estimate_work import Work
from advmoe.text import aligned, duration

EXAMPLES = 100_000
"""Bytes of results that a measurement leaves, about."""


@dataclass(frozen=True)
class Estimate:
    """What a plan comes to."""

    seconds: Mapping[str, float]
    """Of each task, by id."""
    bytes: Mapping[str, int]
    """On the disk, likewise."""
    works: Sequence[Work]

    def by_kind(self) -> dict[str, tuple[int, float, int]]:
        """Of each kind of task: how many there are, seconds and bytes of all together."""
        kinds: dict[str, tuple[int, float, int]] = {}
        for work in self.works:
            number, seconds, size = kinds.get(work.kind, (0, 0.0, 0))
            kinds[work.kind] = number + 1, seconds + self.seconds[work.id], size + self.bytes[work.id]
        return kinds

    def lasts(self, places: int) -> float:
        """Seconds until `places` processes, each as fast as one is here, have done all, each task after those that it
        needs, and those that must run alone last.
        """
        ended: dict[str, float] = {}
        free = [0.0] * places
        for work in self.works:
            if not work.alone:
                start = max([heapq.heappop(free), *(ended.get(need, 0.0) for need in work.needs)])
                ended[work.id] = start + self.seconds[work.id]
                heapq.heappush(free, ended[work.id])
        return max(free) + sum(self.seconds[work.id] for work in self.works if work.alone)


def estimated(
    works: Sequence[Work], folder: Path, *, threads: int, accelerator: str, clock: Clock = time.perf_counter
) -> Estimate:
    """What `works` come to, by times kept in `folder` or taken now (see `estimate_times.calibrated`)."""
    networks = [network for work in works for network, _ in work.passes] + [n for work in works for n in work.weights]
    times = calibrated(folder, networks, threads=threads, accelerator=accelerator, clock=clock)
    return Estimate(
        {work.id: _seconds(work, times) for work in works}, {work.id: _bytes(work, times) for work in works}, works
    )


def _seconds(work: Work, times: Times) -> float:
    return work.seconds + sum(
        images * times[network.key].get(kind, 0.0) for (network, kind), images in work.passes.items()
    )


def _bytes(work: Work, times: Times) -> int:
    copies = sum(4 * number * times[network.key]["parameters"] for network, number in work.weights.items())
    return int(copies) + EXAMPLES


def lines(of: Estimate, *, jobs: int, threads: int, gpus: bool) -> list[str]:
    """An estimate as it is printed: by kind of task, in total, and for 1 and 8 GPUs or for `jobs` processes here."""
    kinds = of.by_kind()
    total = tuple(map(sum, zip(*kinds.values(), strict=True))) if kinds else (0, 0.0, 0)
    rows = [["", "tasks", "time", "disk"]]
    rows += [
        [name, str(number), duration(seconds), _size(size)]
        for name, (number, seconds, size) in [*kinds.items(), ("total", total)]
    ]
    shown = [f"{line}" for line in aligned(rows, "<>>>")]
    if gpus:
        return [
            *shown,
            *(f"on {number} GPU{'s' * (number > 1)}: about {duration(of.lasts(number))}" for number in (1, 8)),
        ]
    most = max(1, min(jobs, (os.cpu_count() or 1) // threads))
    fewer = f", of which {most} have a core" if most < jobs else ""
    of_jobs = f"{jobs} process{'es' * (jobs > 1)} here{fewer}: about {duration(of.lasts(most))}"
    return [*shown, of_jobs]


def _size(size: float) -> str:
    """Bytes as one reads them."""
    for unit, least in (("GB", 1e9), ("MB", 1e6)):
        if size >= least:
            return f"{size / least:.3g} {unit}"
    return f"{size / 1e3:.3g} kB"
