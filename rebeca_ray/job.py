"""The jobs, and how one is run: read the config, reach a cluster or start a local Ray, end with a truthful exit code."""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import typer
from rich.console import Console

from rebeca_ray.config import EmbedConfig, GenerateConfig, Settings, TrainConfig, load_config
from rebeca_ray.errors import UserError

console = Console()

QUIET = {
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # else every line a worker prints shows twice
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
C = TypeVar("C", bound=Settings)


def embed(config: EmbedConfig) -> None:
    """Items with images -> the same items with CLIP embeddings."""
    from rebeca_ray.items import embed_items

    console.print(f"embedded {embed_items(config):,} items -> {config.out}")


def train(config: TrainConfig) -> None:
    """Interactions + embedded items -> a prior directory."""
    from rebeca_ray.training import train_prior

    metrics = train_prior(config)
    console.print(f"prior -> {config.out}  (validation loss {metrics['val_loss']:.4f}, epoch {metrics['best_epoch']:.0f})")


def generate(config: GenerateConfig) -> None:
    """Prior + decoder + request -> a published snapshot."""
    from rebeca_ray.generation import generate_catalog

    manifest = generate_catalog(config)
    counts, seconds = manifest["counts"], manifest["seconds"]
    console.print(
        f"published run {manifest['run_id']} of {manifest['run_date']} in {config.root}: {counts['new']:,} images for "
        f"{counts['users']:,} users, {counts['failed']:,} failed; plan {seconds['plan']} s, render {seconds['render']} s "
        f"({counts['new'] / seconds['render']:.1f} images/s), assemble {seconds['assemble']} s"
    )


def run_job(model: type[C], work: Callable[[C], Any], default: Path) -> None:
    """Run `work` with the config named on the command line, or `default`. For `jobs/*.py`.

    Command line: `[--config FILE] [--dry-run] [key.sub=value …]`.
    """

    def command(
        overrides: list[str] = typer.Argument(None, metavar="[KEY.SUB=VALUE]...", help="changes to the config"),
        config: Path = typer.Option(default, "--config", help="YAML file"),
        dry_run: bool = typer.Option(False, "--dry-run", help="print the resolved config and stop"),
    ) -> None:
        execute(model, work, config, overrides or [], dry_run=dry_run)

    typer.run(command)


def execute(model: type[C], work: Callable[[C], Any], path: Path, overrides: list[str], *, dry_run: bool) -> None:
    """Load the config and do the work; a user's mistake becomes one line and its exit code."""
    with plain_errors():
        config = load_config(model, path, overrides)
        if dry_run:
            console.print_json(config.model_dump_json())
            return
        start_ray()
        work(config)


def start_ray() -> None:
    """Join the cluster of `RAY_ADDRESS`, or of the job that runs us, or start Ray on this machine alone."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    import ray
    from ray.util.debug import disable_log_once_globally

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)  # a warning that only a Ray open to others needs
    if not ray.is_initialized():
        ray.init(address=os.environ.get("RAY_ADDRESS"), log_to_driver=True, logging_level=logging.WARNING)
    context = ray.data.DataContext.get_current()
    context.print_on_execution_start = False
    context.raise_original_map_exception = True  # so that a UserError in a stage arrives as one
    if not sys.stderr.isatty():
        context.enable_progress_bars = False
        disable_log_once_globally()  # a reminder that bars are off, in every log


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


def user_error(error: BaseException | None) -> UserError | None:
    """The UserError behind an exception, through Ray's wrappers and causes.

    The cause comes first: what Ray raises for a UserError in a task is one too, but its text is a traceback.
    """
    if error is None:
        return None
    failures = getattr(error, "worker_failures", None) or {}  # Ray Train: one exception a rank
    for inner in (getattr(error, "cause", None), error.__cause__, *failures.values()):
        if found := user_error(inner):
            return found
    return error if isinstance(error, UserError) else None
