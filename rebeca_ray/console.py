"""The console of the command line, and how a job ends on an error."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from rebeca_ray.errors import user_error

console = Console(soft_wrap=True)  # a log is searched line by line


@contextmanager
def plain_errors() -> Iterator[None]:
    """A UserError, also one raised inside Ray, ends the process with one line and its exit code."""
    try:
        yield
    except Exception as error:
        found = user_error(error)
        if found is None:
            raise
        print(f"error: {str(found).splitlines()[0]}", file=sys.stderr)  # Ray Data appends advice on retries
        raise SystemExit(found.exit_code) from None
