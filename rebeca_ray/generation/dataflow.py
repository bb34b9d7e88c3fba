"""One description of a graph of stages, run by Ray Data or in this process.

Parquet files -> batches of rows -> stage after stage -> batches of the last stage's rows

In this process the stages follow one another as generators. That serves tests and small jobs, and gives the
same rows.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from rebeca_ray.ray_runtime import behind_actors, rows_of_files, with_log
from rebeca_ray.storage.parquet import read_table
from rebeca_ray.telemetry import metrics
from rebeca_ray.telemetry.calls import recorded
from rebeca_ray.watchdog import Pulse

Work = Callable[[pa.Table], pa.Table]


@dataclass(frozen=True, kw_only=True)
class Actors:
    """A fixed pool of actors, the resources of each, and its calls at a time, each in a thread of its own."""

    count: int
    cpus: float
    gpus: float = 0
    decoder_slots: float = 0
    calls: int = 1


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Rows in, rows out, batch by batch.

    With `actors`, `work` is a class: each actor makes one from `arguments` and calls it. Without, `work` is a
    function, or an object that is cheap to copy, and any worker may call it.
    """

    work: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    batch_size: int | None
    actors: Actors | None = None
    rows_per_block: int | None = None  # split large files, so that all actors get work; needed with actors
    name: metrics.Stage = metrics.Stage.OTHER  # under which the calls of actors are recorded


def run_graph(
    files: Sequence[str],
    stages: Sequence[Stage],
    *,
    columns: list[str] | None = None,
    in_process: bool,
    pulse: Pulse | None = None,
) -> Iterator[pa.Table]:
    """Read some Parquet files and pass their rows through the stages; yield batches of the last stage.

    Actors on Ray beat `pulse` with the rows of each call.
    """
    if in_process:
        return run_here(files, stages, columns)
    return run_on_ray(files, stages, columns, pulse)


def run_here(files: Sequence[str], stages: Sequence[Stage], columns: list[str] | None) -> Iterator[pa.Table]:
    batches: Iterator[pa.Table] = (read_table(file, "rows", columns) for file in files)
    for stage in stages:
        work: Work = stage.work(*stage.arguments) if stage.actors else stage.work
        batches = map(work, batched(batches, stage.batch_size))
    return batches


def batched(tables: Iterator[pa.Table], batch_size: int | None) -> Iterator[pa.Table]:
    """Yield the same rows in batches of one size; None keeps the tables. The last batch may be smaller."""
    if batch_size is None:
        yield from (table for table in tables if table.num_rows)
        return
    rest: pa.Table | None = None
    for table in tables:
        rest = table if rest is None else pa.concat_tables([rest, table])
        while rest.num_rows >= batch_size:
            yield rest.slice(0, batch_size)
            rest = rest.slice(batch_size)
    if rest is not None and rest.num_rows:
        yield rest


def run_on_ray(
    files: Sequence[str], stages: Sequence[Stage], columns: list[str] | None, pulse: Pulse | None
) -> Iterator[pa.Table]:
    # A finished graph is a cycle of Python objects that holds objects in Ray's store. Beside torch, Python
    # would not collect it for dozens of graphs.
    gc.collect()
    rows = rows_of_files(len(files), ReadFile(list(files), columns))
    actors: Actors | None = None  # of the last stage that has some
    for stage in stages:
        if stage.rows_per_block is not None:
            rows = rows.repartition(target_num_rows_per_block=stage.rows_per_block)
        if stage.actors is not None:
            actors = stage.actors
            rows = on_actors(rows, stage, actors, pulse)
        elif actors is not None:
            rows = behind_actors(rows, stage.work, stage.batch_size, actors=actors.count, cpus=actors.cpus)
        else:  # one task with the reading
            rows = rows.map_batches(with_log(stage.work), batch_size=stage.batch_size, batch_format="pyarrow")
    return iter(rows.iter_batches(batch_size=None, batch_format="pyarrow"))


def on_actors(rows: Any, stage: Stage, actors: Actors, pulse: Pulse | None) -> Any:
    """Return the Ray Dataset of a stage's batches, each from one of its actors."""
    import ray

    return rows.map_batches(
        with_log(recorded(beating(stage.work, pulse), stage.name)),
        fn_constructor_args=stage.arguments,
        batch_size=stage.batch_size,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(
            size=actors.count,
            # An actor never waits for its next batch: each thread has one more at hand.
            max_tasks_in_flight_per_actor=2 * actors.calls,
            max_concurrent_calls_per_actor=actors.calls,
            enable_true_multi_threading=actors.calls > 1,
        ),
        num_cpus=actors.cpus,
        num_gpus=actors.gpus,
        resources={"decoder_slot": actors.decoder_slots} if actors.decoder_slots else None,
    )


@dataclass(frozen=True)
class ReadFile:
    """The number of a file in, its rows out."""

    files: list[str]
    columns: list[str] | None

    def __call__(self, number: int) -> Iterator[pa.Table]:
        yield read_table(self.files[number], "rows", self.columns)


def beating(work: Callable[..., Any], pulse: Pulse | None) -> Callable[..., Any]:
    """Return an actor's class that beats `pulse` with the rows of each call. It keeps its name."""
    if pulse is None:
        return work
    base: Any = work

    def call(self: Any, batch: pa.Table) -> pa.Table:
        rows = base.__call__(self, batch)
        pulse.beat(rows.num_rows)
        return rows

    return type(base.__name__, (base,), {"__call__": call})
