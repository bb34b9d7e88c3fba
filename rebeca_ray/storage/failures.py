"""Recognise the failures a person can repair, behind Ray's wrappers and a store's own errors."""

from rebeca_ray.errors import Failure, StorageError, UserError, describe
from rebeca_ray.storage.store import classify

ENVIRONMENT = (Failure.DENIED, Failure.FULL, Failure.UNREACHABLE)


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
    return error if isinstance(error, UserError) else storage_error(error)


def storage_error(error: BaseException) -> UserError | None:
    """Map an environment failure (disk full, server lost, permission revoked) to a StorageError.

    Returns None for every other error: a missing file, for instance, may be a bug in the code.
    """
    if classify(error) not in ENVIRONMENT:
        return None
    file = getattr(error, "filename", None)
    return StorageError(
        f"{file or 'storage'}: {describe(error)}; nothing was published; "
        "mend the place, or give another, and run again"
    )
