"""Every metric of this package. Ray exports each as `ray_<name>` on the node of the process that records it.

A label is one of the enums here, which bounds the number of series. Metrics advise: the counts of a snapshot
are those of its manifest.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from enum import StrEnum, auto

from rebeca_ray.catalog.manifest import Manifest
from rebeca_ray.errors import (
    ErrorBudgetExceededError,
    InputError,
    LeaseHeldError,
    QualityGateError,
    ResumableError,
    StorageError,
)
from rebeca_ray.storage.failures import user_error
from rebeca_ray.telemetry.recording import Metric


class Command(StrEnum):
    EMBED, TRAIN, GENERATE = auto(), auto(), auto()


class Stage(StrEnum):
    HISTORIES, DECIDE, PLAN, SHARE, TEST = auto(), auto(), auto(), auto(), auto()
    RENDER, ASSEMBLE, EMBED, OTHER = auto(), auto(), auto(), auto()


class Outcome(StrEnum):
    NEW, CARRIED, POPULATION, FAILED, FILTERED, DEFERRED = auto(), auto(), auto(), auto(), auto(), auto()


class Treatment(StrEnum):
    REGENERATED, FLAGGED, LEFT_OUT = auto(), auto(), auto()


class Refused(StrEnum):
    PLAN, SNAPSHOT = auto(), auto()


class Loss(StrEnum):
    TRAIN, VALIDATION = auto(), auto()


class Reason(StrEnum):
    SUCCESS, INPUT, ERROR_BUDGET, GATE, LEASE = auto(), auto(), auto(), auto(), auto()
    STORAGE, RESUMABLE, STOPPED, UNEXPECTED = auto(), auto(), auto(), auto()


def counter(name: str, meaning: str, *labels: type[StrEnum]) -> Metric:
    return Metric(kind="counter", name=f"rebeca_{name}_total", meaning=meaning, labels=labels)


def gauge(name: str, meaning: str, *labels: type[StrEnum]) -> Metric:
    return Metric(kind="gauge", name=f"rebeca_{name}", meaning=meaning, labels=labels)


def per_call(name: str, meaning: str, *bounds: float) -> Metric:
    return Metric(kind="histogram", name=f"rebeca_{name}", meaning=meaning, labels=(Stage,), bounds=bounds)


ROWS = counter("rows", "Rows in complete files.", Stage)
FAILED_ROWS = counter("failed_rows", "Rows in complete files that failed.", Stage)
BYTES = counter("written_bytes", "Bytes of complete files.", Stage)
BUSY_SECONDS = counter("busy_seconds", "Seconds that actors worked for complete files.", Stage)
STAGE_SECONDS = counter("stage_seconds", "Seconds that a stage took.", Stage)
ENDED = counter("ended", "Commands that ended, by reason.", Command, Reason)
REFUSALS = counter("gate_refusals", "Reasons of the quality gate against a plan or a snapshot.", Refused)
UNSAFE = counter("unsafe_images", "Images that the safety checker objected to, by treatment.", Treatment)

CALL_SECONDS = per_call(
    "call_seconds", "Seconds of one call of an actor.", *(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
)
CALL_ROWS = per_call("call_rows", "Rows of one call of an actor.", *(1, 3, 10, 30, 100, 300, 1000, 3000))
WAIT_SECONDS = per_call(
    "wait_seconds", "Seconds without a call before one.", *(0.001, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
)

STAGE_ROWS = gauge("stage_rows", "Rows that a stage's current graph is to return.", Stage)
STAGE_ROWS_DONE = gauge("stage_rows_done", "Rows in complete files of a stage's current graph.", Stage)
ACTORS = gauge("actors", "Actors that a stage has reserved; 0 when it ends.", Stage)
ACTIVE = gauge("active", "1 while a command runs, 0 after its end.", Command)
LAST_PROGRESS = gauge("last_progress_timestamp_seconds", "Time of the last progress.", Command)
REQUESTED = gauge("requested_items", "Items that this run is to account for.")
ERROR_BUDGET = gauge("error_budget", "Fraction of the requested items that may fail.")
PUBLISH_BY = gauge("publish_by_timestamp_seconds", "The time of `limits.publish_by` for this run.")
LATENESS = gauge("lateness_seconds", "Seconds from `limits.publish_by` to publishing; negative if early.")
PUBLISHED = gauge("published_timestamp_seconds", "Time of assembling the published snapshot.")
ITEMS = gauge("items", "Requested items of the published snapshot.", Outcome)
USERS = gauge("users", "Users of the published snapshot with at least one item.")
STALE_USERS = gauge("stale_users", "Users with items of an earlier night, because time ran out.")
EPOCH = gauge("training_epoch", "Epochs that a training has done.")
LOSS = gauge("training_loss", "Loss of a training's last epoch.", Loss)
SAMPLES_RATE = gauge("training_samples_per_second", "Samples per second of a training's last epoch.")

METRICS = tuple(value for value in list(vars().values()) if isinstance(value, Metric))


def note_progress(command: Command) -> None:
    ACTIVE.record(1, command)
    LAST_PROGRESS.record(time.time(), command)


@contextmanager
def running(command: Command) -> Iterator[None]:
    """Record how a command ends. It counts as active from its first progress on."""
    reason = Reason.SUCCESS
    try:
        yield
    except BaseException as error:
        reason = reason_of(error)
        raise
    finally:
        ACTIVE.record(0, command)
        ENDED.record(1, command, reason)


def reason_of(error: BaseException) -> Reason:
    if not isinstance(error, Exception):
        return Reason.STOPPED
    known = {
        InputError: Reason.INPUT,
        ErrorBudgetExceededError: Reason.ERROR_BUDGET,
        QualityGateError: Reason.GATE,
        LeaseHeldError: Reason.LEASE,
        StorageError: Reason.STORAGE,  # before its base
        ResumableError: Reason.RESUMABLE,
    }
    cause = user_error(error)
    return next((reason for kind, reason in known.items() if isinstance(cause, kind)), Reason.UNEXPECTED)


def record_snapshot(manifest: Manifest) -> None:
    """Set the gauges of the published snapshot."""
    PUBLISHED.record(datetime.fromisoformat(manifest.created_at).timestamp())
    for outcome in Outcome:
        ITEMS.record(getattr(manifest.counts, outcome), outcome)
    USERS.record(manifest.counts.users)
    STALE_USERS.record(manifest.counts.stale_users)


def record_epoch(epoch: int, train_loss: float, val_loss: float, rate: float) -> None:
    """Set the gauges of a training."""
    EPOCH.record(epoch)
    LOSS.record(train_loss, Loss.TRAIN)
    LOSS.record(val_loss, Loss.VALIDATION)
    SAMPLES_RATE.record(rate)
