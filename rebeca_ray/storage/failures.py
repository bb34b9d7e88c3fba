"""Which failures a person can mend, seen through Ray's wrappers and a store's own errors."""

from errno import EDQUOT, ENOSPC, EROFS

from rebeca_ray.errors import StorageError, UserError, describe


def user_error(error: BaseException | None) -> UserError | None:
    """The UserError behind an exception, through Ray's wrappers and causes.

    The cause comes first: what Ray raises for a UserError in a task is one too, but its text is a traceback.
    """
    if error is None:
        return None
    failures = getattr(error, "worker_failures", None) or {}  # Ray Train: one exception a rank
    arguments = [
        inner for inner in error.args if isinstance(inner, BaseException)
    ]  # ActorDiedError: the constructor's
    for inner in (getattr(error, "cause", None), error.__cause__, *failures.values(), *arguments):
        if found := user_error(inner):
            return found
    return error if isinstance(error, UserError) else storage_error(error)


def storage_error(error: BaseException) -> UserError | None:
    """A full disk, a lost server or a permission withdrawn during a job, as the mistake of nobody's code."""
    from botocore.exceptions import BotoCoreError

    if not isinstance(error, BotoCoreError | PermissionError) and getattr(error, "errno", None) not in (
        ENOSPC,
        EDQUOT,
        EROFS,
    ):
        return None
    file = getattr(error, "filename", None)
    return StorageError(
        f"{file or 'storage'}: {describe(error)}; nothing was published; mend the place, or give another, and run again"
    )
