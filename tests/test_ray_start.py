"""Start and join Ray: the token, loopback, and one line for each failure."""

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import ray
from ray._private import ray_constants, services

from rebeca_ray import ray_start
from rebeca_ray.errors import InputError, ResumableError
from rebeca_ray.ray_runtime import may_grow
from rebeca_ray.ray_start import (
    await_answer,
    check_temporary_folder,
    connect,
    explained,
    listens,
    protect_token,
)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_the_token_is_private_and_stays(home: Path) -> None:
    protect_token()
    token = home / ".ray" / "auth_token"
    assert (mode(token), mode(token.parent), len(token.read_text())) == (0o600, 0o700, 64)
    token.write_text("secret")
    token.chmod(0o644)
    protect_token()
    assert (mode(token), token.read_text()) == (0o600, "secret")


def test_those_that_start_at_once_have_one_token(home: Path) -> None:
    (home / ".ray").mkdir()
    for _ in range(50):
        (home / ".ray" / "auth_token").write_text("")
        with ThreadPoolExecutor(8) as pool:
            seen = {*pool.map(made_token, [home] * 8)}
        assert len(seen) == 1


def made_token(home: Path) -> str:
    protect_token()
    return (home / ".ray" / "auth_token").read_text()


@pytest.mark.parametrize(
    ("name", "value"), [("RAY_AUTH_MODE", "disabled"), ("RAY_AUTH_TOKEN", "a"), ("RAY_AUTH_TOKEN_PATH", "/a")]
)
def test_no_token_is_made_where_none_is_used(
    home: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    protect_token()
    assert not (home / ".ray").exists()


def test_a_home_that_cannot_be_written_is_named(tmp_path: Path, home: Path) -> None:
    (home / ".ray").write_text("")
    with pytest.raises(InputError, match=rf"^HOME {tmp_path}: Ray's token .* cannot be written .*; set HOME"):
        protect_token()


def test_a_temporary_folder_that_ray_cannot_use_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"^Ray's temporary folder .*file: cannot be used .*set RAY_TMPDIR"):
        check_temporary_folder()
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    check_temporary_folder()
    full = shutil.disk_usage(tmp_path)._replace(free=3 * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(InputError, match=r"cannot be used \(3 MiB free, Ray needs 200\); free space there"):
        check_temporary_folder()


def test_an_address_that_nobody_listens_at_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_start, "PROBES_LAST", 0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        await_answer(address)
        await_answer(f"ray://{address}")
        assert listens(address)
    with pytest.raises(
        ResumableError,
        match=rf"^RAY_ADDRESS {address}: no Ray answers there \(Connection refused\); start",
    ):
        await_answer(address)


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "address", "kind", "message"),
    [
        (
            RuntimeError("Token authentication is enabled but no authentication token was found"),
            "1.2.3.4:6379",
            InputError,
            "Ray at 1.2.3.4:6379: asks for a token, and none is set; copy the cluster's token",
        ),
        (
            RuntimeError(
                "Token authentication is enabled but the authentication token is invalid or incorrect."
            ),
            "1.2.3.4:6379",
            InputError,
            "Ray at 1.2.3.4:6379: refuses the token; copy",
        ),
        (
            RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.1\n    Python: 3.9\n"),
            "1.2.3.4:6379",
            InputError,
            "runs other versions of Ray or Python (The cluster was started with: Ray: 2.1 Python: 3.9); ",
        ),
        (
            OSError("AF_UNIX path length cannot exceed 107 bytes: /a/b"),
            None,
            InputError,
            "cannot be used (its path is too long for a socket); ",
        ),
        (
            caused(RuntimeError("failed"), OSError(errno.ENOSPC, "No space left on device")),
            "local",
            InputError,
            "cannot be used (No space left on device); free space there",
        ),
        (
            ConnectionError("Could not find any running Ray instance."),
            "auto",
            InputError,
            "RAY_ADDRESS auto: no Ray runs on this machine; start one",
        ),
        (
            ValueError("Invalid address format: a"),
            "a",
            InputError,
            "RAY_ADDRESS a: Invalid address format: a; give",
        ),
        (
            ConnectionError("Failed to connect to Ray cluster at 1.2.3.4:1"),
            "1.2.3.4:1",
            ResumableError,
            "RAY_ADDRESS 1.2.3.4:1: no Ray answers there (Failed to connect",
        ),
        (
            RuntimeError("The node\nstarted slowly. Look at this and that"),
            None,
            ResumableError,
            "Ray: could not be started or joined (The node started slowly); look at",
        ),
    ],
)
def test_every_cause_is_one_line_with_a_remedy(
    error: Exception, address: str | None, kind: type, message: str
) -> None:
    reason = explained(error, address)
    assert type(reason) is kind
    assert message in str(reason)
    assert "\n" not in str(reason)


@pytest.mark.parametrize(("address", "grows"), [(None, False), ("", False), ("local", False), ("h:1", True)])
def test_only_a_cluster_may_grow(monkeypatch: pytest.MonkeyPatch, address: str | None, grows: bool) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)
    assert may_grow() is grows


@pytest.fixture
def joins(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str | None, bool]]]:
    """Record the address of each `ray.init`, and whether Ray would stay on loopback."""
    calls = list[tuple[str | None, bool]]()
    monkeypatch.setattr(
        ray, "init", lambda address, **_: calls.append((address, not ray_constants.ENABLE_RAY_CLUSTER))
    )
    monkeypatch.setattr(ray._private.worker, "_global_node", None)  # other tests' Ray may run here
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv(ray_start.GCS_WAIT, "1")
    yield calls
    ray_start.stay_on_loopback(False)


@pytest.mark.parametrize(("host", "loopback"), [("127.0.0.1", True), ("0.0.0.0", False)])
def test_a_cluster_of_this_machine_is_joined_where_it_listens(
    joins: list[tuple[str | None, bool]], monkeypatch: pytest.MonkeyPatch, host: str, loopback: bool
) -> None:
    with socket.create_server((host, 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        monkeypatch.setenv(ray_start.ALLOW_OPEN, "1")  # this server answers nothing
        connect()
    assert joins == [(address, loopback)]


def test_the_address_of_a_killed_ray_is_no_reason_to_wait(
    joins: list[tuple[str | None, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.setattr(services, "canonicalize_bootstrap_address", lambda _: address)
    connect()
    assert joins == [("local", True)]


def run(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a process of its own, with the errors of a command."""
    text = (
        "from rebeca_ray.cli.runner import plain_errors\n"
        "from rebeca_ray import ray_runtime\n"
        "with plain_errors():\n"
    )
    return subprocess.run(
        [sys.executable, "-c", text + textwrap.indent(textwrap.dedent(script), "    ")],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def test_a_server_that_never_answers_ends_the_command_within_a_minute(home: Path) -> None:
    """Ray would try twenty times. A try takes 41 s, and 16 s here, where its first wait is shorter."""
    with socket.create_server(("0.0.0.0", 0)) as server:  # Ray asks the machine's address, not 127.0.0.1
        address = f"127.0.0.1:{server.getsockname()[1]}"
        started = time.monotonic()
        settings = {"RAY_ADDRESS": address, "RAY_py_gcs_connect_timeout_s": "5", ray_start.ALLOW_OPEN: "1"}
        ended = run("ray_runtime.start_ray()", **settings)
        assert time.monotonic() - started < 75  # with the import of Ray on a busy machine
    assert ended.returncode == 75
    assert ended.stderr.splitlines()[-1].startswith(f"error: RAY_ADDRESS {address}: no Ray answers there (")
    assert "Traceback" not in ended.stderr


def test_a_path_too_long_for_sockets_is_named(home: Path) -> None:
    folder = home / ("long" * 20)
    ended = run("ray_runtime.start_ray()", RAY_ADDRESS="local", RAY_TMPDIR=str(folder))
    assert ended.returncode == 2
    line = f"error: Ray's temporary folder {folder}: cannot be used (its path is too long for a socket); free"
    assert ended.stderr.splitlines()[-1].startswith(line)


@pytest.mark.parametrize(
    ("token", "message"), [(None, "asks for a token, and none is set; "), ("f" * 64, "refuses the token; ")]
)
def test_a_token_that_is_missing_or_wrong_is_named(
    home: Path, ray_local: str, token: str | None, message: str
) -> None:
    if token:
        (home / ".ray").mkdir()
        (home / ".ray" / "auth_token").write_text(token)
    ended = run("ray_runtime.start_ray()", RAY_ADDRESS=ray_local, RAY_AUTH_MODE="token")
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.splitlines()[-1].startswith(f"error: Ray at {ray_local}: {message}")
    assert "Traceback" not in ended.stderr


def test_another_version_is_named(ray_local: str) -> None:
    ended = run("import ray; ray.__version__ = '9.9.9'; ray_runtime.start_ray()", RAY_ADDRESS=ray_local)
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.splitlines()[-1].startswith(
        f"error: Ray at {ray_local}: runs other versions of Ray or Python ("
    )
    assert "9.9.9" in ended.stderr.splitlines()[-1]


def test_a_ray_that_starts_here_is_private_and_refuses_too_many_actors(home: Path) -> None:
    """Every listening socket of its processes is on loopback, and they know its address."""
    ended = run(
        """
        import json, os, re
        from contextlib import suppress
        from pathlib import Path
        import psutil, ray
        ray_runtime.start_ray()
        known = ray.get(ray.remote(lambda: os.environ["RAY_ADDRESS"]).remote())
        assert known == ray.get_runtime_context().gcs_address, known
        assert not ray.get(ray.remote(ray_runtime.may_grow).remote())
        assert os.environ["RAY_ADDRESS"] == "local"
        process = psutil.Process()
        sockets = set()
        for child in [process, *process.children(recursive=True)]:
            for link in Path(f"/proc/{child.pid}/fd").iterdir():
                with suppress(FileNotFoundError):  # it was closed in between
                    if match := re.fullmatch(r"socket:.(\\d+).", os.readlink(link)):
                        sockets.add(match[1])
        listening = []
        for name in ("tcp", "tcp6"):
            for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and fields[9] in sockets:
                    listening.append(fields[1])
        print(json.dumps(listening), flush=True)
        ray_runtime.require_room("num_actors", workers=500, cpus=1.0, device="cpu")
        """,
        RAY_ADDRESS="local",
    )
    assert ended.returncode == 2, ended.stderr
    line = "error: num_actors: 500 workers need 500 CPUs in all, Ray has"
    assert ended.stderr.splitlines()[-1].startswith(line)
    listening = json.loads(ended.stdout.splitlines()[-1])
    assert len(listening) >= 3
    loopback = {"0100007F", "0" * 24 + "01000000", "0000000000000000FFFF00000100007F"}
    assert {address.partition(":")[0] for address in listening} <= loopback
    assert mode(home / ".ray" / "auth_token") == 0o600
    assert len((home / ".ray" / "auth_token").read_text()) == 64
