"""Processor time of this process and of all below it, by kind; processes pinned to one core."""

import json
import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil

WORK_CORE, OTHER_CORES = 0, set(range(1, os.cpu_count() or 1)) or {0}


def leave_the_work_core() -> None:
    """Keep this process, and all that it starts, off the core of the measured work."""
    os.sched_setaffinity(0, OTHER_CORES)


def take_the_work_core() -> None:
    """Pin every thread of this process to the core of the measured work."""
    for thread in os.listdir("/proc/self/task"):
        with suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread), {WORK_CORE})


class ProcessorTime:
    """Seconds of processor time since the start, by kind of process, sampled twice per second."""

    def __init__(self) -> None:
        self.samples: list[tuple[float, dict[str, float]]] = []
        self.seen: dict[int, tuple[str, float]] = {}
        self.done = threading.Event()

    def sample(self) -> None:
        me = psutil.Process()
        for process in [me, *me.children(recursive=True)]:
            with suppress(psutil.Error):
                times = process.cpu_times()
                self.seen[process.pid] = (kind_of(process, me), times.user + times.system)
        sums: dict[str, float] = defaultdict(float)
        for kind, seconds in self.seen.values():
            sums[kind] += seconds
        self.samples.append((time.time(), sums))

    def between(self, start: float, end: float) -> dict[str, float]:
        """Return the seconds by kind between two times."""
        first, last = (min(self.samples, key=lambda sample: abs(sample[0] - at))[1] for at in (start, end))
        return {kind: round(last[kind] - first.get(kind, 0.0), 2) for kind in sorted(last)}


def kind_of(process: psutil.Process, me: psutil.Process) -> str:
    """Return a name for what a process does. Ray's workers carry it in their title."""
    if process.pid == me.pid:
        return "driver"
    title = (process.cmdline() or [process.name()])[0]
    if "Timed" in title or "MapWorker" in title:
        return "actor"
    if title.startswith("ray::"):
        return "tasks" if "Map" in title or "Write" in title or "Read" in title else "Ray's workers"
    return "Ray's services"


@contextmanager
def processor_time() -> Iterator[ProcessorTime]:
    """Sample the processor time in the block."""
    measured = ProcessorTime()

    def follow() -> None:
        while not measured.done.wait(0.5):
            measured.sample()

    measured.sample()
    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    yield measured
    measured.done.set()
    thread.join()
    measured.sample()


def report(figures: dict[str, Any]) -> None:
    """Print the figures of an arm as the last line."""
    print(json.dumps(figures), flush=True)
