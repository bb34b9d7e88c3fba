"""The watchdog: a job without progress writes down its state and ends itself, so that it can start again."""

import faulthandler
import io
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any

from rebeca_ray.demand import unmet_demand
from rebeca_ray.errors import ResumableError
from rebeca_ray.progress import Counted, counting
from rebeca_ray.storage.filesystem import join, open_filesystem

log = logging.getLogger(__name__)

STALLED = ResumableError.exit_code
POLLS = 20  # in the time after which a job counts as stalled
SECONDS_BETWEEN_BEATS = 1.0  # of one worker
SECONDS_TO_ANSWER = 30.0  # a question for the number of beats


class Pulse:
    """The heartbeats of Ray's workers, with the rows done since the last, summed in an actor.

    A worker has a copy of it.
    """

    def __init__(self) -> None:
        import ray

        # It starts again on another node if its node dies: the count changes then, too.
        self.counter: Any = ray.remote(num_cpus=0, max_restarts=-1)(Counter).remote()
        self.last_beat, self.unsent = 0.0, 0

    def beat(self, rows: int = 1) -> None:
        """Note that rows are done. Most calls only count and read the clock."""
        self.unsent += rows
        if time.monotonic() - self.last_beat > SECONDS_BETWEEN_BEATS:
            self.last_beat = time.monotonic()
            self.counter.add.remote(self.unsent)
            self.unsent = 0

    def count(self) -> int:
        """Return the rows of all beats. Raises an error of Ray's if the cluster does not answer."""
        import ray

        return int(ray.get(self.counter.value.remote(), timeout=SECONDS_TO_ANSWER))


class Counter:
    """A number that is counted up."""

    def __init__(self) -> None:
        self.number = 0

    def add(self, rows: int) -> None:
        self.number += rows

    def value(self) -> int:
        return self.number


class Activity:
    """What a job does at the moment, and when it last made progress.

    `dump_to` is the folder that receives the state of a job that stalls. Each progress calls `on_move`.
    """

    def __init__(self, on_move: Callable[[], None] = lambda: None) -> None:
        self.on_move = on_move
        self.dump_to = tempfile.gettempdir()
        self.current = "starting"
        self.moved_at = time.monotonic()
        self.pulse: Pulse | None = None
        self.beats = 0

    def move(self) -> None:
        """Note progress: the watchdog waits from now on."""
        self.moved_at = time.monotonic()
        self.on_move()

    def enter(self, name: str) -> None:
        """Note the beginning of a step."""
        self.current = name
        self.move()

    def listen(self) -> Pulse:
        """Return a pulse for workers: their beats are progress, too. Ray is running by now."""
        self.pulse = self.pulse or Pulse()
        return self.pulse

    @contextmanager
    def counting(self, name: str, total: int) -> Iterator[Counted]:
        """Show the progress of a stage in the block; with a pulse, the workers' beats count its rows."""
        with counting(name, total) as counted:
            if self.pulse is None:
                yield counted
                return
            done = threading.Event()
            follow = threading.Thread(target=count_beats, args=(self, counted, done), daemon=True)
            follow.start()
            try:
                yield counted
            finally:
                done.set()

    def seconds_without_progress(self) -> float:
        if self.pulse:
            try:
                beats = self.pulse.count()
            except Exception as error:  # of any kind: a cluster that does not answer makes no progress
                log.warning("the workers' heartbeats cannot be counted: %s: %s", type(error).__name__, error)
            else:
                if beats != self.beats:
                    self.beats = beats
                    self.move()
        return time.monotonic() - self.moved_at


def count_beats(activity: Activity, counted: Counted, done: threading.Event) -> None:
    """Count the rows of all beats from now on, until `done`. The watchdog deals with a mute cluster."""
    assert activity.pulse
    before: int | None = None
    while not done.wait(0 if before is None else SECONDS_BETWEEN_BEATS):
        with suppress(Exception):
            rows = activity.pulse.count()
            before = rows if before is None else before
            if rows - before > counted.done and not done.is_set():
                activity.move()
                counted.reach(rows - before)


@contextmanager
def watchdog(activity: Activity, minutes: float | None, *, on_stall: Callable[[], None]) -> Iterator[None]:
    """End the process with code 75 after `minutes` without progress in the block.

    Its state is written down first, then `on_stall` is called. A line of the log names the resources that
    work waits for meanwhile. Without `minutes`, nothing is watched.
    """
    if minutes is None:
        yield
        return
    done = threading.Event()
    seconds_between_polls = 60 * minutes / POLLS

    def watch() -> None:
        while not done.wait(seconds_between_polls):
            idle = activity.seconds_without_progress()
            if seconds_between_polls < idle <= 60 * minutes and (demand := unmet_demand()):
                step = f"stage {activity.current}: no progress for {idle / 60:.1f} min"
                log.warning(f"{step}; these wait for free resources: {demand}")
            if idle > 60 * minutes and not done.is_set():
                where = dump_state(activity)
                if done.is_set():  # the block ended meanwhile
                    return
                problem = f"no progress for {minutes:g} min in stage {activity.current} (stall_minutes)"
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


def dump_state(activity: Activity) -> str:
    """Write the stacks of the driver's threads and Ray's actors and tasks to a file; return its path."""
    state = io.StringIO()
    print(f"stage {activity.current}; {vars(activity)}\n", file=state)
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
    uri = join(activity.dump_to, f"stalled-{datetime.now(UTC):%Y%m%dT%H%M%S}.txt")
    try:
        filesystem, path = open_filesystem(uri)
        filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)
        filesystem.pipe_file(path, state.getvalue().encode())
    except Exception as error:
        log.error(state.getvalue())
        return f"the lines above ({uri} cannot be written: {error})"
    return uri
