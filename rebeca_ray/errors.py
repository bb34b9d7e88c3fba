"""The errors that a person can fix. Each has the exit code of its job."""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from enum import StrEnum, auto


class UserError(ValueError):
    """Base of the errors below; raise one of those.

    The text has the form `thing: found; expected; remedy`.
    """

    exit_code: int

    def __init__(self, *arguments: object) -> None:
        super().__init__(*(redacted(text) if isinstance(text, str) else text for text in arguments))

    def _render_traceback_(self) -> list[str]:
        """Return one line, which IPython shows in place of a traceback."""
        return [f"{type(self).__name__}: {self}".splitlines()[0]]


class InputError(UserError):
    """The input or the config is invalid, or a file cannot be used."""

    exit_code = 2


class ErrorBudgetExceededError(UserError):
    """More items failed than the run allows. Nothing was published."""

    exit_code = 3


class QualityGateError(UserError):
    """The result is not good enough. No reader sees any of it."""

    exit_code = 4


class LeaseHeldError(UserError):
    """Another run holds the lease, or took it over."""

    exit_code = 5


class ResumableError(UserError):
    """The run stopped before completion and can be resumed: start it again."""

    exit_code = 75


class StorageError(ResumableError):
    """A store fails, after all retries."""


class DamagedFilesError(ResumableError):
    """Files that a run needs are missing or damaged: the reasons by path. The run makes them again."""

    def __init__(self, message: str, reasons: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.reasons = reasons or {}


class ServerLostError(ResumableError):
    """The Triton server gave no answer and did not come back."""


class Failure(StrEnum):
    """Say why a store failed, in the same words for every store."""

    MISSING = auto()  # no such file
    DENIED = auto()  # no permission, or no credentials
    FULL = auto()  # no free space, or a read-only disk
    UNREACHABLE = auto()  # no server, a busy one, or answers cut off in the middle
    DAMAGED = auto()  # the file was read, but its content is broken
    FAILED = auto()  # any other answer of the store


SECRET = r"[\w.-]*(?:sig|signature|token|secret|passw|pwd|credential|accesskey|auth|key)[\w-]*"
SECRETS = (
    (re.compile(r"(-----BEGIN [A-Z ]*PRIVATE KEY-----)[\w+/=\s\\]*"), r"\1***"),
    (re.compile(r"(://[^\s:/@]*):[^\s'\"]*@"), r"\1:***@"),  # a password may hold `/` and `@` itself
    (re.compile(rf"(?i)([?&;]{SECRET})=[^\s&;'\")]+"), r"\1=***"),  # presigned, or a connection string
    (re.compile(r"(?i)\b(AccountKey|SharedAccess\w+|\w*passw(?:or)?d|pwd)=[^\s&;'\")]+"), r"\1=***"),
)


def redacted(text: str) -> str:
    """Return a text without the passwords of its URLs, presigned queries and connection strings."""
    for pattern, replacement in SECRETS:
        text = pattern.sub(replacement, text)
    return text


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return a clause with the nearest known word, or with all of them if none is near."""
    known = list(known)
    near = get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"


def shown(value: object) -> str:
    """Return a value as an error shows it: at most 60 characters."""
    try:
        text = repr(redacted(value)[:60] if isinstance(value, str) else value)
    except ValueError:  # an integer with more digits than Python prints
        text = "a number of thousands of digits"
    except RecursionError:
        text = "a value nested too deeply"
    return text if len(text) <= 60 else f"{text[:60]}…"


def describe(error: BaseException) -> str:
    """Return one line for an exception: its system message if it has one."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return redacted(" ".join(str(text).split()))[:200]
