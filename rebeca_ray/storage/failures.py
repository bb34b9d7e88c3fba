"""Recognise the failures a person can repair, behind Ray's wrappers and a store's own errors."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rebeca_ray.errors import Failure, LeaseHeldError, ResumableError, StorageError, UserError, describe
from rebeca_ray.storage.store import classify

log = logging.getLogger(__name__)

LOST_PARTS = (  # errors of Ray's for a process, node or object that was lost, after all its retries
    *("ActorDiedError", "ActorUnavailableError", "WorkerCrashedError", "NodeDiedError", "ObjectLostError"),
    *("LocalRayletDiedError", "RpcError", "OutOfMemoryError", "OutOfDiskError", "ObjectStoreFullError"),
)
ENVIRONMENT = (Failure.DENIED, Failure.FULL, Failure.UNREACHABLE, Failure.FAILED)


def user_error(error: BaseException | None) -> UserError | None:
    """Return the UserError behind an exception, or None. Looks through Ray's wrappers and causes.

    The cause comes first: Ray raises a UserError of its own for one in a task, with a traceback as text.
    """
    if error is None:
        return None
    failures = getattr(error, "worker_failures", None) or {}  # Ray Train: one exception per rank
    # ActorDiedError keeps the exception of the constructor among its arguments.
    arguments = [inner for inner in error.args if isinstance(inner, BaseException)]
    for inner in (getattr(error, "cause", None), error.__cause__, *failures.values(), *arguments):
        if cause := user_error(inner):
            return cause
    return error if isinstance(error, UserError) else storage_error(error) or cluster_error(error)


def storage_error(error: BaseException) -> UserError | None:
    """Map an environment failure (disk full, server lost, permission revoked) to a StorageError.

    Returns None for every other error: a missing file, for instance, may be a bug in the code.
    """
    if classify(error) not in ENVIRONMENT or isinstance(error, BrokenPipeError):  # a closed standard output
        return None
    file = getattr(error, "filename", None)
    return StorageError(
        f"{file or 'storage'}: {describe(error)}; nothing was published; "
        "mend the place, or give another, and run again"
    )


def cluster_error(error: BaseException) -> UserError | None:
    """Map the loss of a part of the Ray cluster to a ResumableError. Without Ray there are no such errors.

    Returns None for an actor whose constructor failed: that is a bug, and not a lost process.
    """
    ray = sys.modules.get("ray")
    if ray is None or getattr(error, "actor_init_failed", False):
        return None
    if not isinstance(error, tuple(getattr(ray.exceptions, name) for name in LOST_PARTS)):
        return None
    return ResumableError(
        f"Ray: lost a part of the cluster ({type(error).__name__}: {describe(error)}); "
        "look at its nodes and their memory, start again"
    )


@contextmanager
def only_warn(action: str) -> Iterator[None]:
    """Log a failure of the store or a lost lease, where everything that counts is already stored."""
    try:
        yield
    except Exception as error:
        reason = user_error(error)
        if not isinstance(reason, StorageError | LeaseHeldError):
            raise
        log.warning("%s failed: %s", action, reason)
