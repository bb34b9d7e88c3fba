"""The calls of actors: the seconds and rows of each, and the seconds without any before it."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from rebeca_ray.telemetry import metrics


class Calls:
    """The calls of one actor, some of which may run at the same time in several threads."""

    def __init__(self, stage: metrics.Stage) -> None:
        self.stage = stage
        self.lock = threading.Lock()
        self.running, self.idle_since = 0, time.perf_counter()

    @contextmanager
    def call(self) -> Iterator[None]:
        """Record the block as one call."""
        began = time.perf_counter()
        with self.lock:
            if not self.running:
                metrics.WAIT_SECONDS.record(began - self.idle_since, self.stage)
            self.running += 1
        try:
            yield
        finally:
            ended = time.perf_counter()
            with self.lock:
                self.running, self.idle_since = self.running - 1, ended
            metrics.CALL_SECONDS.record(ended - began, self.stage)


def recorded(work: Callable[..., Any], stage: metrics.Stage) -> Callable[..., Any]:
    """Return an actor's class that records its calls as those of `stage`. It keeps its name."""
    base: Any = work

    def construct(self: Any, *arguments: Any) -> None:
        base.__init__(self, *arguments)
        self.recorded_calls = Calls(stage)  # a name that no actor has

    def call(self: Any, batch: pa.Table) -> pa.Table:
        with self.recorded_calls.call():
            rows = base.__call__(self, batch)
        metrics.CALL_ROWS.record(rows.num_rows, stage)
        return rows

    return type(base.__name__, (base,), {"__init__": construct, "__call__": call})
