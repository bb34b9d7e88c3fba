"""Ray as the jobs use it: impossible requests are refused, its log is quiet, our log reaches the driver."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from rebeca_ray import log
from rebeca_ray.errors import InputError
from rebeca_ray.ray_runtime import progress_only, require_room, worker_environment


@pytest.fixture(params=[None, "local"])
def this_machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, ray_local: str) -> None:
    """A Ray of this machine: without an address, or with `local`."""
    if request.param:
        monkeypatch.setenv("RAY_ADDRESS", request.param)
    else:
        monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.mark.usefixtures("this_machine")
def test_more_than_this_machine_has_is_refused_at_once() -> None:
    require_room("decoder.num_actors", workers=2, cpus=0.5, device="cpu", spare_cpus=1)
    with pytest.raises(
        InputError,
        match=r"decoder.num_actors: 2 workers need 2 GPUs in all, Ray has 0; set device to cpu, or submit",
    ):
        require_room("decoder.num_actors", workers=2, cpus=0.5, device="cuda", spare_cpus=1)
    with pytest.raises(
        InputError, match=r"workers: 999 workers need 1998 CPUs in all, Ray has \d+; ask for fewer, or submit"
    ):
        require_room("workers", workers=999, cpus=2, device="cpu")


@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize("address", ["10.0.0.1:6379", "auto"])
def test_a_cluster_may_grow(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, address: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    require_room("workers", workers=2, cpus=0.5, device="cuda")
    assert [record.getMessage() for record in caplog.records if record.name.startswith("rebeca_ray")] == [
        "workers: 2 workers need 2 GPUs in all, Ray has 0; waiting for the cluster to grow"
    ]


@pytest.mark.parametrize(
    ("name", "text", "shown"),
    [
        ("ray.data._internal.progress.logging_progress", "MapBatches(RenderImages): 120/400", True),
        ("ray.data._internal.progress.logging_progress", "MapBatches(RenderImages): 0/400", False),
        ("ray.data._internal.progress.logging_progress", "Total Progress: 120/400", False),
        ("ray.data._internal.progress.logging_progress", "ListFiles: 1/1", False),
        ("ray.data._internal.progress.logging_progress", "======= Running Dataset: a =======", False),
        ("ray.data.exceptions", "Full stack trace: 1/2", False),
    ],
)
def test_ray_datas_log_shows_progress_alone(name: str, text: str, shown: bool) -> None:
    assert progress_only(logging.LogRecord(name, logging.INFO, "", 0, text, (), None)) is shown


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    for name in (log.LEVEL, log.JSON_LINES, "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_workers_get_the_log_settings_that_the_submitted_job_has_not_set(
    environment: pytest.MonkeyPatch,
) -> None:
    hook = "rebeca_ray.log.configure_worker"
    assert worker_environment() == {"env_vars": {}, "worker_process_setup_hook": hook}
    environment.setenv(log.LEVEL, "debug")
    environment.setenv(log.JSON_LINES, "1")
    variables = {log.LEVEL: "debug", log.JSON_LINES: "1"}
    assert worker_environment() == {"env_vars": variables, "worker_process_setup_hook": hook}
    job = {"runtime_env": {"env_vars": {log.LEVEL: "info"}, "working_dir": "gcs://package.zip"}}
    environment.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    assert worker_environment()["env_vars"] == {log.JSON_LINES: "1"}
    job["runtime_env"]["worker_process_setup_hook"] = "theirs.hook"
    environment.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    assert "worker_process_setup_hook" not in worker_environment()


DRIVER = """
import logging, sys
from rebeca_ray.log import configure
configure("debug")
from rebeca_ray.ray_runtime import bind_run, for_each_bucket, start_ray
log = logging.getLogger("rebeca_ray.example")
start_ray()
import ray
bind_run("the-run")

class Stage:
    def __init__(self):
        logging.getLogger("rebeca_ray.stage").debug("an actor starts")
    def __call__(self, batch):
        logging.getLogger("rebeca_ray.stage").warning("an actor works")
        return batch

def work(bucket):
    logging.getLogger("rebeca_ray.task").info("task %d", bucket)
    return bucket

pool = ray.data.ActorPoolStrategy(size=1)
ray.data.range(1).map_batches(Stage, compute=pool, num_cpus=0.5).materialize()
assert for_each_bucket(work, [0, 1]) == [0, 1]
log.info("the driver ends")
import time
time.sleep(2)  # Ray forwards the lines of its workers now and then
"""


def test_lines_of_workers_show_once_on_the_driver_with_the_run_id(ray_local: str) -> None:
    out = subprocess.run(
        [sys.executable, "-c", DRIVER],
        env={**os.environ, "RAY_ADDRESS": ray_local, "RAY_DEDUP_LOGS": "0"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert out.returncode == 0, out.stderr
    everything = out.stdout + out.stderr
    for line in (
        "DEBUG run the-run: an actor starts",
        "WARNING run the-run: an actor works",
        "INFO run the-run: task 0",
        "INFO run the-run: task 1",
        "INFO run the-run: the driver ends",
    ):
        assert everything.count(line) == 1, everything
