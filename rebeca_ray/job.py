"""The jobs, and how one is run: read the config, do the work, end with a truthful exit code."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from errno import EDQUOT, ENOSPC, EROFS
from pathlib import Path
from typing import Any, TypeVar

import typer
from rich.console import Console

from rebeca_ray.config import DistillConfig, EmbedConfig, GenerateConfig, TrainConfig, load_config
from rebeca_ray.errors import UserError
from rebeca_ray.settings import DecoderSettings, Settings

console = Console(soft_wrap=True)  # a log is searched line by line

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


def distill(config: DistillConfig) -> None:
    """A trained prior -> one that needs a few passes an embedding."""
    from rebeca_ray.distillation import distill_prior

    figures = distill_prior(config)
    quality, passes = figures["student_quality"], config.num_inference_steps
    console.print(f"distilled prior -> {config.out}  ({quality:.1%} of the teacher's quality in {passes} passes)")


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
    print_personality(manifest)


def print_personality(manifest: dict[str, Any]) -> None:
    """One line on the permutation test, if there was one."""
    if test := manifest["quality"]["permutation"]:
        console.print(
            f"before any was chosen, candidates please their own users with {test['own']:.3f}, others with {test['dealt']:.3f} "
            f"(permutation test by the selector: z = {test['z']:.0f}, p = {test['p_value']:.4f})"
        )


def serve(decoder: DecoderSettings, *, http_port: int, grpc_port: int, metrics_port: int, instances: int) -> None:
    """Triton until it is interrupted, or told to stop."""
    from rebeca_ray.server import triton_server

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with triton_server(decoder, http_port=http_port, grpc_port=grpc_port, metrics_port=metrics_port, instances=instances) as process:
            console.print(
                f"ready: grpc 127.0.0.1:{grpc_port} (decoder.triton.url), http://127.0.0.1:{http_port}/v2/models/decoder, "
                f"metrics http://127.0.0.1:{metrics_port}/metrics"
            )
            if code := process.wait():
                raise UserError(f"tritonserver ended with code {code}; its own lines above say why")
    except KeyboardInterrupt:
        console.print("stopped")


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
        work(config)


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
    arguments = [inner for inner in error.args if isinstance(inner, BaseException)]  # ActorDiedError: the constructor's
    for inner in (getattr(error, "cause", None), error.__cause__, *failures.values(), *arguments):
        if found := user_error(inner):
            return found
    return error if isinstance(error, UserError) else storage_error(error)


def storage_error(error: BaseException) -> UserError | None:
    """A full disk, a lost server or a permission withdrawn during a job, as the mistake of nobody's code."""
    from botocore.exceptions import BotoCoreError

    from rebeca_ray.storage import describe

    if not isinstance(error, BotoCoreError | PermissionError) and getattr(error, "errno", None) not in (ENOSPC, EDQUOT, EROFS):
        return None
    file = getattr(error, "filename", None)
    return UserError(f"{file or 'storage'}: {describe(error)}; nothing was published; mend the place, or give another, and run again")
