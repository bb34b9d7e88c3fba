"""Run one command: config in, truthful exit code out."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from rebeca_ray.console import console

if TYPE_CHECKING:
    from rebeca_ray.config.fields import Settings

C = TypeVar("C", bound="Settings")


def run_job(command: Callable[..., None], default: Path) -> None:
    """Run a command of `rebeca` with the config named on the command line, or `default`. For `jobs/*.py`."""
    sys.argv.insert(1, f"--config={default}")  # of an option that is given twice the last one counts
    typer.run(command)


def execute(
    model: type[C], work: Callable[[C], Any], path: Path, overrides: list[str], *, dry_run: bool
) -> None:
    """Load the config and do the work; a user's mistake becomes one line and its exit code."""
    from rebeca_ray.config.load import load_config

    with plain_errors():
        config = load_config(model, path, overrides)
        if dry_run:
            console.print_json(config.model_dump_json())
            return
        work(config)


@contextmanager
def plain_errors() -> Iterator[None]:
    """A UserError, also one raised inside Ray, ends the process with one line and its exit code."""
    try:
        yield
    except Exception as error:
        from rebeca_ray.storage.failures import user_error

        found = user_error(error)
        if found is None:
            raise
        print(f"error: {str(found).splitlines()[0]}", file=sys.stderr)  # Ray Data appends advice on retries
        raise SystemExit(found.exit_code) from None
