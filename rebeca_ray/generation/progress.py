"""How far a run is, how fast it was, and whether it still moves: if not, it is ended so that it can be resumed."""

import faulthandler
import io
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from rebeca_ray.generation.parts import BUSY
from rebeca_ray.storage.filesystem import join, open_filesystem

log = logging.getLogger(__name__)

STALLED = 75  # the exit code of a run that is to be started again
UNWATCHED = ("histories", "test")  # one step each, which says nothing on its way
POLLS = 20  # in the time after which a run that does not move is stalled


class Progress:
    """The stages of one attempt: each one's seconds, and of those that actors do their rows and busy seconds too."""

    def __init__(self) -> None:
        self.stages: dict[str, dict[str, float]] = {}
        self.moved_at = time.monotonic()
        self.doing = "starting"
        self.since = time.perf_counter()

    def move(self) -> None:
        self.moved_at = time.monotonic()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage; one that is entered again goes on."""
        self.doing, self.since = name, time.perf_counter()
        self.stages.setdefault(name, {"seconds": 0.0})
        self.move()
        try:
            yield
        finally:
            self.pause()
            self.move()

    def pause(self) -> None:
        """Count the seconds until now to the stage that is on."""
        now = time.perf_counter()
        stage = self.stages[self.doing]
        stage["seconds"] = round(stage["seconds"] + now - self.since, 3)
        self.since = now

    def follow(self, name: str, records: Any, *, of: int) -> list[dict[str, Any]]:
        """Run a Ray Data graph that ends with records of files (see parts.py); returns them, and tells how far it is as they come."""
        found: list[dict[str, Any]] = []
        with self.stage(name):
            stage = self.stages[name]
            stage.setdefault("rows", 0)
            stage.setdefault(BUSY, 0.0)
            started = told = time.monotonic()
            for batch in records.iter_batches(batch_size=None, batch_format="pyarrow"):
                rows = batch.to_pylist()
                found += rows
                stage["rows"] += sum(row["rows"] for row in rows)
                stage[BUSY] = round(stage[BUSY] + sum(row[BUSY] for row in rows), 3)
                self.move()
                done, elapsed = sum(row["rows"] for row in found), time.monotonic() - started
                if time.monotonic() - told > 20 and done:
                    told = time.monotonic()
                    left = (of - done) * elapsed / done
                    log.info(
                        f"{name}: {done:,} of {of:,}, {done / elapsed:.1f} per second, ETA {left / 60:.0f} min"
                    )
        return found


@contextmanager
def watchdog(
    progress: Progress, minutes: float | None, *, dump_to: str, on_stall: Callable[[], None]
) -> Iterator[None]:
    """End the process with code 75 if the run does not move for `minutes` inside the block, after writing down what it was doing."""
    if minutes is None:
        yield
        return
    done = threading.Event()

    def watch() -> None:
        while not done.wait(60 * minutes / POLLS):
            if progress.doing not in UNWATCHED and time.monotonic() - progress.moved_at > 60 * minutes:
                where = dump_state(progress, dump_to)
                told = (
                    f"no progress for {minutes:g} min while it was at {progress.doing} (limits.stall_minutes)"
                )
                log.error(f"{told}; its state is in {where}. Start it again: it resumes")
                on_stall()
                os._exit(STALLED)  # whatever hangs would hang an orderly end too

    thread = threading.Thread(target=watch, name="watchdog", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(10)


def dump_state(progress: Progress, folder: str) -> str:
    """Write the stacks of the driver's threads and Ray's actors and tasks to `folder`; returns the file."""
    told = io.StringIO()
    print(f"stage {progress.doing}; stages so far: {progress.stages}\n", file=told)
    with tempfile.TemporaryFile("w+") as stacks:
        faulthandler.dump_traceback(stacks, all_threads=True)
        stacks.seek(0)
        told.write(stacks.read())
    try:
        import ray
        from ray.util.state import list_actors, list_tasks

        print(f"\ncluster {ray.cluster_resources()}\navailable {ray.available_resources()}", file=told)
        for kind, listed in (
            ("actor", list_actors(limit=200, timeout=10)),
            ("task", list_tasks(limit=200, timeout=10)),
        ):
            for state in listed:
                print(kind, state, file=told)
    except Exception as error:  # whatever it is, the stacks are worth more than the reason
        print(f"\nRay does not answer: {type(error).__name__}: {error}", file=told)
    uri = join(folder, f"stalled-{datetime.now(UTC):%Y%m%dT%H%M%S}.txt")
    try:
        filesystem, path = open_filesystem(uri)
        filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)
        filesystem.pipe_file(path, told.getvalue().encode())
    except Exception as error:
        log.error(told.getvalue())
        return f"the lines above ({uri} cannot be written: {error})"
    return uri
