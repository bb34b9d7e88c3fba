"""The errors a person can mend, each with the exit code its job ends with."""

from collections.abc import Iterable
from difflib import get_close_matches
from errno import EDQUOT, ENOSPC, EROFS


class UserError(ValueError):
    """Something outside the code must change: names the thing, what was found, what was expected, the remedy."""

    exit_code = 2


class StorageError(UserError):
    """A store that was there does not do what it should, after all retries."""


class UnfinishedError(UserError):
    """A run that could not end, but can be gone on with."""

    exit_code = 75


class ErrorBudgetExceededError(UserError):
    """More items failed than the run allows; nothing was published."""

    exit_code = 3


class QualityGateError(UserError):
    """What came out is not good enough; nothing of it is to be seen by a reader."""

    exit_code = 4


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A clause naming the nearest known word, or all of them if none is near."""
    known = list(known)
    near = get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"


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


def shown(value: object) -> str:
    """A value as an error tells it: of a long one its beginning."""
    try:
        text = repr(value[:60] if isinstance(value, str) else value)
    except ValueError:  # an integer with more digits than Python prints
        text = "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:60]}…"


def describe(error: BaseException) -> str:
    """One line of an exception: its system message if it has one."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())[:200]
