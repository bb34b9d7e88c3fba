"""A Ray that other machines reach is joined only with a token. Ray's real GCS answers, without a raylet."""

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from ray._private.services import GCS_SERVER_EXECUTABLE

from rebeca_ray import ray_start
from rebeca_ray.errors import InputError, ResumableError
from rebeca_ray.ray_start import listens, refuse_open
from tests.seaweedfs import free_port
from tests.test_ray_start import run

ELSEWHERE = "127.0.0.2"  # stands for another machine: only the names of LOOPBACK count as this one


@contextmanager
def gcs(folder: Path, mode: str) -> Iterator[str]:
    """Run the server that a driver of a cluster connects to; yield its address."""
    address = f"{ELSEWHERE}:{free_port()}"
    command = [
        GCS_SERVER_EXECUTABLE,
        f"--gcs_server_port={address.rpartition(':')[2]}",
        f"--node-ip-address={ELSEWHERE}",
        f"--log_dir={folder}",
        f"--session-dir={folder}",
        "--config_list=",
        "--metrics-agent-port=0",
        "--session-name=tests",
    ]
    environment = {**os.environ, "RAY_AUTH_MODE": mode, "RAY_AUTH_TOKEN": "f" * 64}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(100):
            if listens(address):
                break
            time.sleep(0.1)
        yield address
    finally:
        process.kill()
        process.wait()


def test_a_cluster_that_asks_for_a_token_is_joined(tmp_path: Path) -> None:
    with gcs(tmp_path, "token") as address:
        refuse_open(address)


def test_an_open_cluster_is_refused_unless_a_setting_allows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(ray_start.ALLOW_OPEN, raising=False)
    with gcs(tmp_path, "disabled") as address:
        ended = run("ray_runtime.start_ray()", RAY_ADDRESS=address)
        assert ended.returncode == 2, ended.stderr
        assert ended.stderr == (
            f"error: Ray at {address}: takes commands without a token, so whoever reaches it can run code "
            "there; start it with RAY_AUTH_MODE=token, "
            "or set REBECA_ALLOW_OPEN_RAY=1 if its network is closed\n"
        )
        for other in ("", "0", "yes"):
            monkeypatch.setenv(ray_start.ALLOW_OPEN, other)
            with pytest.raises(InputError, match="takes commands without a token"):
                refuse_open(address)
        monkeypatch.setenv(ray_start.ALLOW_OPEN, "1")
        refuse_open(address)
        monkeypatch.delenv(ray_start.ALLOW_OPEN)
        monkeypatch.setattr(ray_start, "LOOPBACK", (ELSEWHERE,))
        refuse_open(address)  # on this machine's loopback


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_cluster_that_does_not_say_is_not_joined(monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    """A silent server could be an open one."""
    monkeypatch.delenv(ray_start.ALLOW_OPEN, raising=False)
    monkeypatch.setattr(ray_start, "PROBES_LAST", 0.3)
    with socket.create_server((ELSEWHERE, 0)) as server:
        address = f"{scheme}{ELSEWHERE}:{server.getsockname()[1]}"
        with pytest.raises(ResumableError, match=rf"^RAY_ADDRESS {address}: no Ray answers there \("):
            refuse_open(address)
