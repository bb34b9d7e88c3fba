"""Join or start Ray, quietly, and check that it has room.

Its log keeps only warnings: the progress of our stages is shown by progress.py.
"""

import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar, cast

import pyarrow as pa
import pyarrow.compute as pc

from rebeca_ray import log as package_log
from rebeca_ray.errors import InputError, ResumableError
from rebeca_ray.progress import counting
from rebeca_ray.ray_start import GCS_PORT, connect
from rebeca_ray.termination import keep_sigterm

log = logging.getLogger(__name__)

RAY_ENVIRONMENT = {
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # else every line of a worker shows twice
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # by default each epoch waits 2 s for a check
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # else an interrupted grid counts as complete
    "RAY_DATA_PARQUET_FOOTER_NUM_ACTORS": "1",  # by default each read starts 32 processes of ten footers each
    "RAY_DATA_PARQUET_FOOTER_BATCH_SIZE": "128",
    "RAY_USAGE_STATS_ENABLED": "0",  # its count of uses is a process of its own
    "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "50",  # of logs: from then on it lists them every 0.5 s, not 0.1
    "RAY_OVERRIDE_RESOURCES": '{"decoder_slot": 1}',  # of a Ray started here; nodes declare theirs
    "RAY_local_fs_capacity_threshold": "0.99",  # at 95% of a large disk Ray would warn every ten seconds
}


def start_ray() -> None:
    """Join the cluster of `RAY_ADDRESS`, of the submitted job or of this machine; if none, start Ray here.

    Each job calls this after it has checked its input: a mistake shows at once, not after Ray's start.
    If Ray already runs, this sets up its log and its errors only.
    """
    for name, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    if not ray.is_initialized():
        with keep_sigterm():  # Ray's own handler ends the process with code 15, and frees no lease
            connect()
    context = ray.data.DataContext.get_current()  # this sets up Ray Data's log, so the rest comes after it
    context.print_on_execution_start = False
    context.enable_progress_bars = False  # progress.py has ours
    context.raise_original_map_exception = True  # a UserError in a stage arrives as one
    for handler in logging.getLogger("ray.data").handlers:
        if handler.name == "console":  # a program or a test may have added its own
            handler.setLevel(logging.CRITICAL + 1)  # its errors are raised too, its log file keeps all
    package_log.enable()
    # A pool of few actors, or few tasks of those allowed, are right where there is little to do.
    warnings.filterwarnings("ignore", message="The (minimum|maximum) number of concurrent (actors|tasks)")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a job's log shows each line at once, not at the end


def may_grow() -> bool:
    """Return whether Ray is a cluster, which may still grow, and not one started on this machine.

    Workers of the latter know its address, and the port that was chosen for it.
    """
    return os.environ.get("RAY_ADDRESS", "") not in ("", "local") and GCS_PORT not in os.environ


def require_room(
    name: str, *, workers: int, cpus: float, device: str, spare_cpus: int = 0, decoder_slots: int = 0
) -> None:
    """Raise InputError if Ray lacks the CPUs, GPUs or decoder slots of `workers`.

    Ray would wait for them forever. Ray Data needs spare CPUs to read and write with. Of a cluster, which may
    still grow, this only warns.
    """
    import ray

    resources = ray.cluster_resources()
    needed = {
        "CPU": workers * cpus + spare_cpus,
        "GPU": workers if device == "cuda" else 0,
        "decoder_slot": decoder_slots,
    }
    for resource, amount in needed.items():
        available = resources.get(resource, 0)
        if amount <= available:
            continue
        shortage = f"{name}: {workers} workers need {amount:g} {resource}s in all, Ray has {available:g}"
        if may_grow():
            log.warning("%s; waiting for the cluster to grow", shortage)
        else:
            # A decoder slot more would be a Triton server more.
            remedy = "set device to cpu" if resource == "GPU" else "ask for fewer"
            raise InputError(f"{shortage}; {remedy}, or submit to a cluster that has them")


A = TypeVar("A")
T = TypeVar("T")
TASKS_AT_ONCE = 1000  # waiting for one of n takes time in proportion to n
WRITER_CPUS = 0.5  # reserved by a task that mostly waits for storage
WRITERS_PER_ACTOR = 2
MAX_READ_TASKS = 500  # of a graph; each costs the driver milliseconds
TASK_SECONDS = 3600  # without an end of any task, after which they count as stuck


def with_log(work: Callable[..., T]) -> Callable[..., T]:
    """Return `work`, a function or a class, so that its worker first logs as this process does.

    It keeps its name, which Ray Data shows. A setup hook of Ray's runtime environment would do the same, but
    workers that Ray has started in advance have none, so each would start again.
    """
    settings = package_log.current_settings()
    if isinstance(work, type):
        base: Any = work

        def construct(self: Any, *arguments: Any) -> None:
            package_log.use(settings)
            base.__init__(self, *arguments)

        return type(work.__name__, (work,), {"__init__": construct})

    def call(*arguments: Any) -> T:
        package_log.use(settings)
        return work(*arguments)

    call.__name__ = getattr(work, "__name__", type(work).__name__)
    return call


def for_each_bucket(
    work: Callable[[int], T],
    buckets: Sequence[int],
    on_progress: Callable[[], None] | None = None,
    *,
    name: str = "buckets",
    in_process: bool = False,
) -> list[T]:
    """Return `work` of some buckets; see `for_each`."""
    return for_each(work, buckets, on_progress, name=name, in_process=in_process)


def for_each(
    work: Callable[[A], T],
    values: Sequence[A],
    on_progress: Callable[[], None] | None = None,
    *,
    name: str = "tasks",
    in_process: bool = False,
) -> list[T]:
    """Return `work` of some values, in order; call `on_progress` whenever one is done.

    The progress is shown as that of the stage `name`.
    Each value is a Ray task. A single one, and all of them with `in_process`, are done in this process.
    `work`, with everything it refers to, is stored once for all tasks. Raises ResumableError if no task ends
    for TASK_SECONDS.
    """
    with counting(name, len(values)) as counted:

        def note(done: int) -> None:
            counted.add(done)
            if on_progress:
                on_progress()

        if not in_process and len(values) > 1:
            return in_tasks(work, values, note)
        results = []
        for value in values:
            results.append(work(value))
            note(1)
        return results


def in_tasks(work: Callable[[A], T], values: Sequence[A], note: Callable[[int], None]) -> list[T]:
    """Return `work` of some values, each a Ray task; call `note` with the number of tasks that ended."""
    import ray

    start_ray()
    shared = ray.put(with_log(work))
    task: Any = ray.remote(call)
    tasks: list[Any] = []
    pending: list[Any] = []
    while pending or len(tasks) < len(values):
        begin = len(tasks)
        tasks += [
            task.remote(shared, value) for value in values[begin : begin + TASKS_AT_ONCE - len(pending)]
        ]
        pending += tasks[begin:]
        done, pending = ray.wait(pending, timeout=TASK_SECONDS, fetch_local=False)
        if not done:
            for stuck in pending:
                ray.cancel(stuck, force=True)
            raise ResumableError(
                f"{len(pending)} of {len(values)} Ray tasks are at work, and none ended within "
                f"{TASK_SECONDS / 60:g} min; look at the store and the cluster's load, start again"
            )
        note(len(done))
    return list(ray.get(tasks))


def call(work: Callable[[A], T], value: A) -> T:
    return work(value)


class Shared(Generic[T]):
    """A value that Ray stores once, to be sent with small tasks; `in_process` it is kept as it is."""

    def __init__(self, value: T, *, in_process: bool) -> None:
        self.value: T | None = value
        self.reference: Any = None
        if not in_process:
            import ray

            self.value, self.reference = None, ray.put(value)

    def get(self) -> T:
        if self.reference is None:
            return cast(T, self.value)
        import ray

        return cast(T, ray.get(self.reference))


def rows_of_files(count: int, read: Callable[[int], Iterator[pa.Table]]) -> Any:
    """Return a Ray Dataset of the rows of files 0, 1, …, `count` - 1.

    `ray.data.read_parquet` would start processes of its own for lists and footers.
    """
    import ray

    def read_some(batch: pa.Table) -> Iterator[pa.Table]:
        for number in batch["id"].to_pylist():
            yield from read(number)

    numbers = ray.data.range(count, override_num_blocks=min(count, MAX_READ_TASKS))
    return numbers.map_batches(with_log(read_some), batch_size=1, batch_format="pyarrow")


def behind_actors(
    rows: Any, work: Callable[[pa.Table], pa.Table], batch_size: int | None, *, actors: int, cpus: float
) -> Any:
    """Return the Ray Dataset of `work` on the batches that come from `actors` actors of `cpus` CPUs each.

    Its tasks reserve no CPU where the actors and the reading take them all. Ray Data would start them only
    after everything is read, and until then hold the results of all actors in its store.
    """
    import ray

    spare = ray.cluster_resources().get("CPU", 0) - actors * cpus - 1
    return rows.map_batches(
        with_log(work),
        batch_size=batch_size,
        batch_format="pyarrow",
        num_cpus=WRITER_CPUS if spare >= WRITER_CPUS else 0,
        compute=ray.data.TaskPoolStrategy(size=WRITERS_PER_ACTOR * actors),
    )


def whole_blocks(rows: int, rows_per_block: int) -> int:
    """Return the largest number of rows of whole blocks, at most `rows`; `rows` for larger blocks.

    Ray Data passes whole blocks to a task. A batch of another size would leave a small one beside it.
    """
    return rows - rows % rows_per_block if rows > rows_per_block else rows


class ExcludeIds:
    """Rows in; rows out whose `item_id` is not among `ids`."""

    def __init__(self, ids: pa.Array, *, in_process: bool = False) -> None:
        self.ids = Shared(ids, in_process=in_process)

    def __call__(self, batch: pa.Table) -> pa.Table:
        return batch.filter(pc.invert(pc.is_in(batch["item_id"], value_set=self.ids.get())))
