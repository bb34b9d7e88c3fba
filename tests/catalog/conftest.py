"""A catalog root on disk and on a real S3 server, and worker processes that write to it."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from s3fs import S3FileSystem

from rebeca_ray.catalog.read import Snapshot, read_catalog
from rebeca_ray.config.jobs import GenerateConfig
from tests.catalog.large import write_snapshot
from tests.conftest import REPO

Start = Callable[..., subprocess.Popen[str]]
Rows = list[dict[str, Any]]  # of any table


@pytest.fixture(params=["disk", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "disk":
        return str(tmp_path)
    for name, value in request.getfixturevalue("s3_server").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(S3FileSystem, "_cache", {})
    return f"s3://rebeca/{tmp_path.name}"


@pytest.fixture
def large(tmp_path: Path) -> Snapshot:
    return read_catalog(write_snapshot(tmp_path / "large", rows_per_group=100))


@pytest.fixture
def start() -> Iterator[Start]:
    """Return a function that starts `worker.py`, optionally under the command `by`.

    The worker waits for `begin`. Workers that still run at the end of the test are killed.
    """
    started: list[subprocess.Popen[str]] = []

    def start_one(*arguments: object, by: Sequence[str] = ()) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*by, sys.executable, str(Path(__file__).with_name("worker.py")), *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(REPO)},
        )
        started.append(process)
        return process

    yield start_one
    for process in started:
        process.kill()
        process.communicate()


def begin(*processes: subprocess.Popen[str]) -> None:
    """Let all processes begin at the same moment."""
    for process in processes:
        assert heard(process) == "ready"
    for process in processes:
        tell(process)


def tell(process: subprocess.Popen[str]) -> None:
    assert process.stdin
    process.stdin.write("\n")
    process.stdin.flush()


def heard(process: subprocess.Popen[str]) -> str:
    """Return the next line of a process, or an empty string if it ended."""
    assert process.stdout
    return process.stdout.readline().strip()


@pytest.fixture
def on_store(config: GenerateConfig, root: str) -> GenerateConfig:
    return config.model_copy(update={"catalog": f"{root}/catalog"})
