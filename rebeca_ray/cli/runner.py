"""Run one command: options in, a log as the options say, truthful exit code out."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from rebeca_ray import log
from rebeca_ray.console import console
from rebeca_ray.errors import redacted
from rebeca_ray.termination import sigterm, unwinding

if TYPE_CHECKING:
    from rebeca_ray.config.jobs import JobConfig

C = TypeVar("C", bound="JobConfig")

# The line of a command that was stopped says how to go on.
RESUMES = "what was done is kept: run the same command again to go on"
STARTS_OVER = "nothing was published: run the same command again, it starts over"


def log_options(
    log_level: Annotated[
        log.Level | None,
        typer.Option(
            envvar=log.LEVEL,
            case_sensitive=False,
            help="Least severe level of the log, on standard error. By default, the config's or info.",
        ),
    ] = None,
    log_json: Annotated[
        bool,
        typer.Option(
            "--log-json",
            envvar=log.JSON_LINES,
            help="Write the log as JSON lines unless standard output is a terminal.",
        ),
    ] = False,
) -> None:
    """Set up the log. These options come before the name of a command."""
    log.configure(log_level, json_lines=log_json and not sys.stdout.isatty())


def run_script(command: Callable[..., None], config: Path | None = None) -> None:
    """Run a function as the one command of a script, with the log options too.

    `config` is the value of --config unless the command line gives another.
    """
    script = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    script.callback()(log_options)
    script.command("script")(command)
    group: Any = typer.main.get_command(script)
    runnable = group.commands["script"]
    call = runnable.callback

    def configure_and_call(log_level: Any, log_json: bool, **arguments: Any) -> None:
        log_options(log_level, log_json)
        call(**arguments)

    runnable.params += group.params
    runnable.callback = configure_and_call
    # The last of two values of an option counts.
    default = [] if config is None else [f"--config={config}"]
    runnable(args=[*default, *sys.argv[1:]], prog_name=Path(sys.argv[0]).name)


def read_config(
    model: type[C], path: Path, overrides: list[str] | None, *, dry_run: bool = False
) -> C | None:
    """Load a config. With `dry_run` print it and return None."""
    from rebeca_ray.config.load import load_config

    config = load_config(model, path, overrides)
    log.set_level_of_config(config.log_level)
    if dry_run:
        console.print_json(redacted(config.model_dump_json()))
        return None
    return config


def print_result(result: Any, *, as_json: bool = False) -> None:
    """Print a result of output.py for a person, or as JSON: alone on standard output."""
    if as_json:
        console.print_json(json.dumps(result), sort_keys=False)
    else:
        console.print(redacted(result) if isinstance(result, str) else result, markup=False)


@contextmanager
def plain_errors(stopped: str = STARTS_OVER) -> Iterator[None]:
    """End the process with one line and the exit code of a UserError, also of one raised inside Ray.

    Ctrl-C and SIGTERM unwind the command, which frees its lease. The line is `stopped` then, and the exit
    codes are 130 and 143. A second Ctrl-C or SIGTERM ends the process on the spot.
    """
    try:
        with unwinding():
            yield
    except KeyboardInterrupt:
        cause, code = (" by SIGTERM", 143) if sigterm.is_set() else ("", 130)
        print(f"stopped{cause}; {stopped}", file=sys.stderr, flush=True)
        raise SystemExit(code) from None
    except Exception as error:
        from rebeca_ray.storage.failures import user_error

        reason = user_error(error)
        if reason is None:
            raise
        # Ray Data appends advice on retries to the first line.
        print(f"error: {redacted(str(reason)).splitlines()[0]}", file=sys.stderr)
        raise SystemExit(reason.exit_code) from None
