"""The stages of a run: timed, and their rows counted."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import pyarrow as pa

from rebeca_ray.catalog.manifest import StageFigures
from rebeca_ray.generation.parts import PartRecord
from rebeca_ray.telemetry import metrics
from rebeca_ray.telemetry.traces import span
from rebeca_ray.watchdog import Activity


@dataclass(kw_only=True)
class StageClock:
    """One stage so far. `rows` and `busy_seconds` are known of stages with actors."""

    seconds: float = 0.0
    rows: int | None = None
    busy_seconds: float | None = None

    def figures(self, actors: int | None = None) -> StageFigures:
        return StageFigures(
            seconds=self.seconds, rows=self.rows, busy_seconds=self.busy_seconds, actors=actors
        )


class Progress(Activity):
    """The stages of one attempt, timed."""

    def __init__(self) -> None:
        super().__init__(partial(metrics.note_progress, metrics.Command.GENERATE))
        self.stages: dict[str, StageClock] = {}
        self.since = time.perf_counter()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage. A stage that is entered again adds up."""
        self.current, self.since = name, time.perf_counter()
        self.stages.setdefault(name, StageClock())
        self.move()
        try:
            with span(name):
                yield
        finally:
            self.pause()
            self.move()

    def figures(self) -> dict[str, StageFigures]:
        """Return the stages so far."""
        return {name: stage.figures() for name, stage in self.stages.items()}

    def pause(self) -> None:
        """Add the seconds until now to the current stage."""
        now = time.perf_counter()
        stage = self.stages[self.current]
        stage.seconds = round(stage.seconds + now - self.since, 3)
        metrics.STAGE_SECONDS.record(now - self.since, self.current)
        self.since = now

    def follow(self, name: str, batches: Iterator[pa.Table], *, total: int, actors: int) -> list[PartRecord]:
        """Run a graph that ends with `PartRecord` rows, show its progress, and return the records.

        `actors` is their number in the graph.
        """
        records: list[PartRecord] = []
        with self.stage(name), self.counting(name, total) as counted, recorded_graph(name, total, actors):
            stage = self.stages[name]
            before, rows = stage.rows or 0, 0
            stage.rows, stage.busy_seconds = before, stage.busy_seconds or 0.0
            for batch in batches:
                new = [PartRecord.from_dict(values) for values in batch.to_pylist()]
                records += new
                rows += sum(record.rows for record in new)
                stage.rows = before + rows
                record_files(name, new, rows)
                stage.busy_seconds = round(stage.busy_seconds + sum(record.busy_seconds for record in new), 3)
                self.move()
                counted.reach(rows)  # the actors' beats may have counted them
                counted.add(0, failed=sum(record.failed for record in new))
        return records


@contextmanager
def recorded_graph(stage: str, total: int, actors: int) -> Iterator[None]:
    """Record the size of a graph while it runs."""
    metrics.STAGE_ROWS.record(total, stage)
    metrics.STAGE_ROWS_DONE.record(0, stage)
    metrics.ACTORS.record(actors, stage)
    try:
        yield
    finally:
        metrics.ACTORS.record(0, stage)


def record_files(stage: str, files: list[PartRecord], done: int) -> None:
    """Record complete files of a graph, which has `done` rows by now."""
    metrics.STAGE_ROWS_DONE.record(done, stage)
    metrics.ROWS.record(sum(file.rows for file in files), stage)
    metrics.FAILED_ROWS.record(sum(file.failed for file in files), stage)
    metrics.BYTES.record(sum(file.bytes for file in files), stage)
    metrics.BUSY_SECONDS.record(sum(file.busy_seconds for file in files), stage)
