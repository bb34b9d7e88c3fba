"""The progress of a run: stages timed, progress logged, and a run that stalls ended so that it can resume."""

import faulthandler
import io
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

import pyarrow as pa

from rebeca_ray.catalog.manifest import StageFigures
from rebeca_ray.errors import ResumableError
from rebeca_ray.generation.parts import PartRecord
from rebeca_ray.storage.filesystem import join, open_filesystem

log = logging.getLogger(__name__)

STALLED = ResumableError.exit_code
SECONDS_BETWEEN_LINES = 20  # of progress in the log
POLLS = 20  # in the time after which a run counts as stalled


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


class Progress:
    """The stages of one attempt, timed, and the time of the last progress."""

    def __init__(self, dump_to: str = "") -> None:
        self.dump_to = dump_to  # the folder for the state of a run that stalls
        self.stages: dict[str, StageClock] = {}
        self.moved_at = time.monotonic()
        self.current = "starting"
        self.since = time.perf_counter()

    def move(self) -> None:
        """Note progress: the watchdog waits from now on."""
        self.moved_at = time.monotonic()

    def enter(self, name: str) -> None:
        """Note the beginning of a step that is not timed."""
        self.current = name
        self.move()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage. A stage that is entered again adds up."""
        self.current, self.since = name, time.perf_counter()
        self.stages.setdefault(name, StageClock())
        self.move()
        try:
            yield
        finally:
            self.pause()
            self.move()

    def pause(self) -> None:
        """Add the seconds until now to the current stage."""
        now = time.perf_counter()
        stage = self.stages[self.current]
        stage.seconds = round(stage.seconds + now - self.since, 3)
        self.since = now

    def follow(self, name: str, batches: Iterator[pa.Table], *, total: int) -> list[PartRecord]:
        """Run a graph that ends with `PartRecord` rows, log its progress, and return the records."""
        records: list[PartRecord] = []
        with self.stage(name):
            stage = self.stages[name]
            stage.rows, stage.busy_seconds = stage.rows or 0, stage.busy_seconds or 0.0
            started = logged = time.monotonic()
            rows = 0
            for batch in batches:
                new = [PartRecord.from_dict(values) for values in batch.to_pylist()]
                records += new
                rows += sum(record.rows for record in new)
                stage.rows += sum(record.rows for record in new)
                stage.busy_seconds = round(stage.busy_seconds + sum(record.busy_seconds for record in new), 3)
                self.move()
                if time.monotonic() - logged > SECONDS_BETWEEN_LINES and rows:
                    logged = time.monotonic()
                    log_progress(name, rows, total, logged - started)
        return records


def log_progress(name: str, rows: int, total: int, seconds: float) -> None:
    remaining = max(0, total - rows) * seconds / rows
    log.info(f"{name}: {rows:,} of {total:,}, {rows / seconds:.1f} per second, ETA {remaining / 60:.0f} min")


@contextmanager
def watchdog(progress: Progress, minutes: float | None, *, on_stall: Callable[[], None]) -> Iterator[None]:
    """End the process with code 75 after `minutes` without progress in the block. Dump its state first."""
    if minutes is None:
        yield
        return
    done = threading.Event()

    def watch() -> None:
        while not done.wait(60 * minutes / POLLS):
            if time.monotonic() - progress.moved_at > 60 * minutes:
                where = dump_state(progress, progress.dump_to)
                problem = (
                    f"no progress for {minutes:g} min in stage {progress.current} (limits.stall_minutes)"
                )
                log.error(f"{problem}; its state is in {where}. Start it again: it resumes")
                on_stall()
                os._exit(STALLED)  # an orderly end would hang too

    thread = threading.Thread(target=watch, name="watchdog", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(10)


def dump_state(progress: Progress, folder: str) -> str:
    """Write the stacks of the driver's threads and Ray's actors and tasks to `folder`; return the file."""
    state = io.StringIO()
    print(f"stage {progress.current}; stages so far: {progress.stages}\n", file=state)
    with tempfile.TemporaryFile("w+") as stacks:
        faulthandler.dump_traceback(stacks, all_threads=True)
        stacks.seek(0)
        state.write(stacks.read())
    try:
        import ray
        from ray.util.state import list_actors, list_tasks

        print(f"\ncluster {ray.cluster_resources()}\navailable {ray.available_resources()}", file=state)
        for kind, listed in (
            ("actor", list_actors(limit=200, timeout=10)),
            ("task", list_tasks(limit=200, timeout=10)),
        ):
            for entry in listed:
                print(kind, entry, file=state)
    except Exception as error:  # of any kind: the stacks are worth more than the reason
        print(f"\nRay does not answer: {type(error).__name__}: {error}", file=state)
    uri = join(folder, f"stalled-{datetime.now(UTC):%Y%m%dT%H%M%S}.txt")
    try:
        filesystem, path = open_filesystem(uri)
        filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)
        filesystem.pipe_file(path, state.getvalue().encode())
    except Exception as error:
        log.error(state.getvalue())
        return f"the lines above ({uri} cannot be written: {error})"
    return uri
