"""Ray, joined or started, with a log of what its reader needs."""

import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from rebeca_ray.errors import InputError, ResumableError

RAY_ENVIRONMENT = {
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # else every line a worker prints shows twice
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # a worker's report waits for the next check, by default 2 s an epoch
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DATA_NON_TTY_PROGRESS_LOG_INTERVAL": "20",
    "RAY_DATA_PARQUET_FOOTER_NUM_ACTORS": "1",  # by default each read starts 32 processes, for ten footers at a time each
    "RAY_DATA_PARQUET_FOOTER_BATCH_SIZE": "128",
    "RAY_OVERRIDE_RESOURCES": '{"decoder_slot": 1}',  # of a Ray that is started here; a cluster's nodes say their own
    "RAY_local_fs_capacity_threshold": "0.99",  # at 95% of a large disk it would warn every ten seconds
}


def progress_only(record: logging.LogRecord) -> bool:
    """Of Ray Data's log how far our own stages are; its errors are raised too, and its log file keeps all."""
    return record.name.endswith("logging_progress") and bool(
        re.fullmatch(r"\s*MapBatches\(.*: [1-9]\d*/\d+", record.getMessage())
    )


def start_ray() -> None:
    """Join the cluster of `RAY_ADDRESS`, of the job that runs us, or one on this machine; else start Ray here.

    Each job calls it once its input is checked: a mistake is told at once, not after Ray's start. Does nothing to a Ray
    that runs already but make its errors and its log ours.
    """
    for name, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    logging.getLogger("ray._private.authentication").setLevel(
        logging.ERROR
    )  # a warning that only a Ray open to others needs
    if not ray.is_initialized():
        try:
            ray.init(address=os.environ.get("RAY_ADDRESS"), log_to_driver=True, logging_level=logging.WARNING)
        except Exception as error:  # of every kind, by what did not answer in time
            why = str(error).split(". ")[0][:200]
            raise ResumableError(
                f"Ray could not be started or joined ({why}); look at RAY_ADDRESS and the machine's load, start again"
            ) from None
    context = ray.data.DataContext.get_current()  # this sets up Ray Data's log, so only now:
    context.print_on_execution_start = False
    context.raise_original_map_exception = True  # so that a UserError in a stage arrives as one
    for handler in logging.getLogger("ray.data").handlers:
        if not isinstance(handler, logging.FileHandler):
            handler.addFilter(progress_only)  # once, however often we come here
    warnings.filterwarnings(
        "ignore", message="The minimum number of concurrent actors"
    )  # there is little to do
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(
            line_buffering=True
        )  # what workers print appears in a job's log as it comes, not at the end


def require_room(
    what: str, *, workers: int, cpus: float, device: str, spare_cpus: int = 0, decoder_slots: int = 0
) -> None:
    """Raise UserError if Ray has not the CPUs, GPUs and decoder slots that `workers` need: it would wait for them for ever.

    Ray Data needs spare CPUs to read and write with. A cluster may still grow, so there it only says what it waits for.
    """
    import ray

    there = ray.cluster_resources()
    needed = {
        "CPU": workers * cpus + spare_cpus,
        "GPU": workers if device == "cuda" else 0,
        "decoder_slot": decoder_slots,
    }
    for name, amount in needed.items():
        if amount <= there.get(name, 0):
            continue
        told = f"{what}: {workers} workers need {amount:g} {name}s in all, Ray has {there.get(name, 0):g}"
        if "RAY_ADDRESS" in os.environ:
            print(f"{told}; waiting for the cluster to grow", file=sys.stderr)
        else:
            remedy = "set device to cpu" if name == "GPU" else "ask for fewer"  # a slot more is a server more
            raise InputError(f"{told}; {remedy}, or submit to a cluster that has them")


T = TypeVar("T")


def for_each_bucket(
    work: Callable[[int], T],
    buckets: Sequence[int],
    on_progress: Callable[[], None] | None = None,
    *,
    in_process: bool = False,
) -> list[T]:
    """Return `work` of some buckets, in order; call `on_progress` whenever one is done.

    Each bucket is a Ray task. A single one, and all of them with `in_process`, are done in this process.
    """
    if in_process or len(buckets) < 2:
        return [work(bucket) for bucket in buckets]
    import ray

    start_ray()
    task: Any = ray.remote(work)
    tasks = pending = [task.remote(bucket) for bucket in buckets]
    while pending:
        _, pending = ray.wait(pending, fetch_local=False)
        if on_progress:
            on_progress()
    return list(ray.get(tasks))


class ExcludeIds:
    """Rows in; rows out whose `item_id` is not among `ids`."""

    def __init__(self, ids: pa.Array) -> None:
        self.ids = ids

    def __call__(self, batch: pa.Table) -> pa.Table:
        return batch.filter(pc.invert(pc.is_in(batch["item_id"], value_set=self.ids)))
