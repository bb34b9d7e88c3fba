"""Each error a person can fix ends its command with one line and its own exit code."""

import errno
import logging
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from aiohttp import ClientPayloadError, ServerDisconnectedError
from botocore.exceptions import EndpointConnectionError, NoCredentialsError
from fsspec.exceptions import FSTimeoutError
from ray.exceptions import RayTaskError
from ray.train import WorkerGroupError

from rebeca_ray import errors, log
from rebeca_ray.catalog.pointer import Pointer
from rebeca_ray.cli.runner import STARTS_OVER, plain_errors
from rebeca_ray.errors import UserError
from rebeca_ray.termination import SIGNALS, keep_sigterm, unwind
from tests.conftest import without_id

EXIT_CODES = {
    errors.InputError: 2,
    errors.StorageError: 75,
    errors.ErrorBudgetExceededError: 3,
    errors.QualityGateError: 4,
    errors.LeaseHeldError: 5,
    errors.ResumableError: 75,
    errors.DamagedFilesError: 75,
    errors.ServerLostError: 75,
}


def subclasses(error: type[UserError]) -> set[type[UserError]]:
    direct = set(error.__subclasses__())
    return direct.union(*(subclasses(one) for one in direct))


def test_every_error_stands_in_the_table_and_none_elsewhere() -> None:
    assert {one for one in subclasses(UserError) if one.__module__.startswith("rebeca_ray")} == set(
        EXIT_CODES
    )
    assert all(one.__module__ == "rebeca_ray.errors" for one in EXIT_CODES)
    assert not hasattr(UserError, "exit_code")  # the base is never raised


@pytest.mark.parametrize(("error", "code"), EXIT_CODES.items())
def test_exit_codes_also_through_rays_wrappers(
    error: type[UserError], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    wrapped = WorkerGroupError("a worker failed", {0: RayTaskError("stage", "a traceback", error("a"))})
    for raised in (error("a"), wrapped):
        with pytest.raises(SystemExit) as caught, plain_errors():
            raise raised
        assert caught.value.code == code
        assert capsys.readouterr().err == "error: a\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("postgresql://user:p/w@x@host/db: no", "postgresql://user:***@host/db: no"),
        ("http://:pw@host:9000", "http://:***@host:9000"),
        (
            "https://b/a?X-Amz-Signature=ab&X-Amz-Credential=k/1&n=1",
            "https://b/a?X-Amz-Signature=***&X-Amz-Credential=***&n=1",
        ),
        ("https://b/a?sv=1&sig=ab%3D", "https://b/a?sv=1&sig=***"),
        ("BlobEndpoint=http://b/a;AccountKey=ab==;", "BlobEndpoint=http://b/a;AccountKey=***;"),
        ("host=h password=pw user=u", "host=h password=*** user=u"),
        ("abfss://box@name.dfs.core.windows.net/token=3/a", None),
        ("override 'key=1': expected key.sub=value", None),
    ],
)
def test_no_error_shows_a_password(
    text: str, expected: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = expected or text
    for raised in (errors.InputError(text), OSError(5, text)):
        with pytest.raises(SystemExit), plain_errors():
            raise raised
        assert expected in capsys.readouterr().err
    assert str(pickle.loads(pickle.dumps(errors.InputError(text)))) == expected
    assert errors.describe(ValueError(text)) == expected
    for formatter in (log.HumanFormatter(), log.JsonFormatter()):
        record = logging.LogRecord("rebeca_ray.x", 20, "x.py", 1, "at %s", (text,), None)
        assert expected in formatter.format(record)


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError), plain_errors():
        _ = 1 / 0


@pytest.mark.usefixtures("ray_local")
def test_an_error_in_an_actors_constructor_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    import ray

    class Stage:
        def __init__(self) -> None:
            raise errors.InputError("no such model")

        def __call__(self, batch: object) -> object:
            return batch

    pool = ray.data.ActorPoolStrategy(size=1)
    with pytest.raises(SystemExit) as caught, plain_errors():
        ray.data.range(2).map_batches(Stage, compute=pool, num_cpus=0.5).materialize()
    assert caught.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: no such model"


FAILURES = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EREMOTEIO, "We encountered an internal error."),
    OSError(errno.EBUSY, "Reduce your request rate."),
    OSError(errno.EIO, "Input/output error"),
    PermissionError("Access Denied"),
    ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
    TimeoutError("too late"),
    FSTimeoutError(),
    ServerDisconnectedError(),
    ClientPayloadError("cut off"),
    EndpointConnectionError(endpoint_url="http://127.0.0.1:9"),
    NoCredentialsError(),
    OSError("When reading information: AWS Error NETWORK_CONNECTION during HeadObject operation"),
]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
def test_a_failing_store_is_one_line_wherever_it_is_noticed(
    failure: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    for raised in (failure, RayTaskError("stage", "a traceback\nof lines", failure).as_instanceof_cause()):
        with pytest.raises(SystemExit) as caught, plain_errors():
            raise raised
        assert caught.value.code == 75
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: storage: ")


def test_a_closed_standard_output_is_no_failure_of_a_store() -> None:
    with pytest.raises(BrokenPipeError), plain_errors():
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


STOPPED_COMMAND = """
import time
from rebeca_ray.catalog.lease import hold_lease
from rebeca_ray.cli.runner import plain_errors, run_script
from rebeca_ray.progress import counting
from rebeca_ray.ray_runtime import start_ray

def main(root: str, with_ray: bool = False) -> None:
    with plain_errors(), hold_lease(root, "run", 60):
        if with_ray:
            start_ray()
            import ray
            task = ray.remote(lambda: time.sleep(60)).remote()
            print("ready", flush=True)
            ray.get(task)
        with counting("wait", 1):
            print("ready", flush=True)
            time.sleep(60)

if __name__ == "__main__":
    run_script(main)
"""


@pytest.mark.parametrize(
    ("options", "number", "code", "line"),
    [
        ([], signal.SIGINT, 130, f"stopped; {STARTS_OVER}"),
        (["--with-ray"], signal.SIGTERM, 143, f"stopped by SIGTERM; {STARTS_OVER}"),
    ],
    ids=["SIGINT", "SIGTERM with Ray"],
)
def test_a_stopped_command_frees_its_lease_and_says_how_to_go_on(
    tmp_path: Path, options: list[str], number: signal.Signals, code: int, line: str
) -> None:
    script = tmp_path / "script.py"
    script.write_text(STOPPED_COMMAND)
    process = subprocess.Popen(
        [sys.executable, script, tmp_path / "catalog", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert stderr.splitlines()[-1] == line
    assert "Traceback" not in stderr
    assert "*** SIGTERM" not in stderr
    assert without_id(str(tmp_path / "catalog")) == Pointer(fencing_token=1)


CLEANED_UP = """
import os, signal, sys
from rebeca_ray.catalog.lease import hold_lease
from rebeca_ray.cli.runner import plain_errors

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for work in the background
with plain_errors():
    try:
        with hold_lease(sys.argv[1], "run", 60):
            try:
                os.kill(os.getpid(), signal.SIGINT)
            finally:
                print("first", flush=True)
                if sys.argv[2] == "inside":
                    os.kill(os.getpid(), signal.SIGINT)
    finally:
        print("second", flush=True)
        os.kill(os.getpid(), signal.SIGINT)
        print("third", flush=True)
"""


@pytest.mark.parametrize(("place", "lines"), [("inside", "first\n"), ("after", "first\nsecond\n")])
def test_a_second_ctrl_c_ends_a_command_on_the_spot(tmp_path: Path, place: str, lines: str) -> None:
    """The lease, which has a handler of its own, is held at the second Ctrl-C, or was freed before."""
    run = subprocess.run(
        [sys.executable, "-c", CLEANED_UP, tmp_path / "catalog", place], capture_output=True, text=True
    )
    assert (run.returncode, run.stdout, run.stderr) == (-signal.SIGINT, lines, "")
    held = without_id(str(tmp_path / "catalog")).lease is not None
    assert held == (place == "inside")


@pytest.fixture
def handlers() -> Iterator[None]:
    """Set the handlers of a new process in the foreground, and put those of the test run back."""
    before = [signal.signal(signal.SIGINT, signal.default_int_handler)]
    before.append(signal.signal(signal.SIGTERM, signal.SIG_DFL))
    yield
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
def test_handlers_of_signals_are_put_back() -> None:
    """Ray's own handler of SIGTERM must not take the place of a program's, or of a command's."""
    before = [signal.getsignal(number) for number in SIGNALS]
    with plain_errors():
        with keep_sigterm():
            signal.signal(signal.SIGTERM, lambda *_: None)
        assert [signal.getsignal(number) for number in SIGNALS] == [unwind, unwind]
    assert [signal.getsignal(number) for number in SIGNALS] == before


SCRIPT = """
import logging
from typing import Annotated
import typer
from rebeca_ray.cli.runner import plain_errors, run_script
from rebeca_ray.errors import {error}

def main(config: Annotated[str, typer.Option()], name: str = "", fail: bool = False) -> None:
    "Greet."
    with plain_errors():
        logging.getLogger("rebeca_ray.x").debug("config %s", config)
        if fail:
            raise {error}("refused")
        print("hello", name)

if __name__ == "__main__":
    run_script(main, config="default.yaml")
"""


def test_a_script_has_the_log_options_of_rebeca(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(error="LeaseHeldError"))

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)

    out = run("--name", "you", "--log-level", "DEBUG")
    assert out.stdout == "hello you\n"
    assert out.stderr.endswith(" DEBUG: config default.yaml\n")
    assert run("--config", "other.yaml", "--log-level=debug").stderr.endswith("config other.yaml\n")
    failed = run("--fail")
    assert (failed.returncode, failed.stderr) == (5, "error: refused\n")
    text = run("--help").stdout
    assert all(part in text for part in ("Usage: script.py", "Greet.", "--log-level", "--log-json", "--name"))
    assert run("--log-level", "loud").returncode == 2
