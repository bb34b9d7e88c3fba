"""Measure a piece of work: CPU seconds and peak memory of this process and of Ray's workers.

The kernel counts each process's peak, so that none is missed. A thread looks at the workers, and at Ray's
object store, twice per second.
"""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

SECONDS_BETWEEN_LOOKS = 0.5
MB = 1e6


class Workers(threading.Thread):
    """The CPU seconds and the peak memory of Ray's workers below this process, and its object store."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.begun: dict[int, float] = {}
        self.cpu: dict[int, float] = {}
        self.peak_mb = self.store_mb = self.look_cpu = 0.0
        self.done = threading.Event()
        self.look(first=True)

    def run(self) -> None:
        while not self.done.wait(SECONDS_BETWEEN_LOOKS):
            self.look()
            self.look_cpu = time.thread_time()

    def look(self, *, first: bool = False) -> None:
        """Note the state of all workers. CPU that they used before the first look does not count."""
        for process in psutil.Process().children(recursive=True):
            try:
                if not process.cmdline()[0].startswith("ray::"):
                    continue
                seconds = sum(process.cpu_times()[:2])
                if first:
                    self.begun[process.pid] = seconds
                    reset_peak(process.pid)
                self.cpu[process.pid] = seconds - self.begun.get(process.pid, 0.0)
                self.peak_mb = max(self.peak_mb, peak_mb(process.pid))
            except (psutil.Error, OSError, IndexError):
                continue  # it ended meanwhile
        self.store_mb = max(self.store_mb, object_store_mb())

    def stop(self) -> float:
        """Stop to look, and return the CPU seconds of all workers."""
        self.done.set()
        self.join()
        self.look()
        return sum(self.cpu.values())


def object_store_mb() -> float:
    """Return the bytes in Ray's object store, spilled ones included; 0 where Ray does not run."""
    import ray

    if not ray.is_initialized():
        return 0.0
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    stats = get_memory_info_reply(get_state_from_address(ray.get_runtime_context().gcs_address)).store_stats
    return float(stats.object_store_bytes_used + stats.spilled_bytes_total) / MB


def reset_peak(pid: int) -> None:
    """Make the kernel count the peak memory of a process from now on."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def peak_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / MB


def measured(work: Callable[[], object]) -> dict[str, float]:
    """Do some work; return its seconds, CPU seconds, and peaks of memory."""
    reset_peak(os.getpid())
    workers = Workers()
    workers.start()
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    workers_cpu = workers.stop()
    cpu -= workers.look_cpu
    return {
        "seconds": round(wall, 2),
        "driver_cpu": round(cpu, 2),
        "workers_cpu": round(workers_cpu, 2),
        "driver_mb": round(peak_mb(os.getpid()), 1),
        "worker_mb": round(workers.peak_mb, 1),
        "object_store_mb": round(workers.store_mb, 1),
    }


def files_below(folder: Path) -> tuple[int, int]:
    """Return the number of files below a folder, and their bytes."""
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return len(sizes), sum(sizes)
