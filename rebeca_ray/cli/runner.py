"""Run one command: config in, truthful exit code out."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from rebeca_ray.config.fields import Settings
from rebeca_ray.config.load import load_config
from rebeca_ray.console import console, plain_errors

if TYPE_CHECKING:
    pass


C = TypeVar("C", bound=Settings)


def run_job(command: Callable[..., None], default: Path) -> None:
    """Run a command of `rebeca` with the config named on the command line, or `default`. For `jobs/*.py`."""
    sys.argv.insert(1, f"--config={default}")  # of an option that is given twice the last one counts
    typer.run(command)


def execute(
    model: type[C], work: Callable[[C], Any], path: Path, overrides: list[str], *, dry_run: bool
) -> None:
    """Load the config and do the work; a user's mistake becomes one line and its exit code."""
    with plain_errors():
        config = load_config(model, path, overrides)
        if dry_run:
            console.print_json(config.model_dump_json())
            return
        work(config)
