"""Ray as the jobs use it: impossible requests are refused, its log is quiet, our log reaches the driver."""

import os
import subprocess
import sys
import time
from pathlib import Path

import cloudpickle
import numpy as np
import pyarrow as pa
import pytest

from rebeca_ray import ray_runtime
from rebeca_ray.errors import InputError, ResumableError
from rebeca_ray.ray_runtime import ExcludeIds, for_each_bucket, require_room


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


DRIVER = """
import logging, sys
from rebeca_ray.log import configure, set_run_id
configure("debug")
from rebeca_ray.ray_runtime import for_each_bucket, start_ray, with_log
log = logging.getLogger("rebeca_ray.example")
start_ray()
import ray
assert not ray.data.DataContext.get_current().enable_progress_bars
logging.getLogger("ray.data").error("an error that is raised too")
set_run_id("the-run")

class Stage:
    def __init__(self):
        logging.getLogger("rebeca_ray.stage").debug("an actor starts")
    def __call__(self, batch):
        logging.getLogger("rebeca_ray.stage").warning("an actor works")
        return batch

class Filter:
    def __call__(self, batch):
        logging.getLogger("rebeca_ray.filter").info("a task filters")
        return batch

def work(bucket):
    logging.getLogger("rebeca_ray.task").info("task %d", bucket)
    return bucket

pool = ray.data.ActorPoolStrategy(size=1)
rows = ray.data.range(1).map_batches(with_log(Filter()), num_cpus=0.5)
rows.map_batches(with_log(Stage), compute=pool, num_cpus=0.5).materialize()
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
        "INFO run the-run: a task filters",
        "INFO run the-run: task 0",
        "INFO run the-run: task 1",
        "INFO run the-run: the driver ends",
    ):
        assert everything.count(line) == 1, everything
    assert "raised too" not in everything
    assert "Running Dataset" not in everything


@pytest.mark.usefixtures("ray_local")
def test_work_that_refers_to_much_is_stored_once_and_sent_as_a_reference() -> None:
    """Ray refuses a function of more than 100 MB; the tasks of large catalogs refer to more."""
    much = np.arange(20_000_000)
    ids = pa.array([f"{number:032x}" for number in range(100_000)])

    def work(bucket: int) -> int:
        return int(much[bucket])

    assert for_each_bucket(work, [3, 5]) == [3, 5]
    exclude = ExcludeIds(ids)
    assert len(cloudpickle.dumps(exclude)) < 10_000
    rows = pa.table({"item_id": ["another", ids[7]]})
    assert exclude(rows)["item_id"].to_pylist() == ["another"]
    assert ExcludeIds(ids, in_process=True)(rows)["item_id"].to_pylist() == ["another"]


@pytest.mark.usefixtures("ray_local")
def test_tasks_of_which_none_ends_are_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ray_runtime, "TASK_SECONDS", 1)

    def wait_for_ever(_: int) -> None:
        while not (tmp_path / "never").exists():
            time.sleep(0.1)

    with pytest.raises(
        ResumableError, match="2 of 2 Ray tasks are at work, and none ended within 0.0166667 min"
    ):
        for_each_bucket(wait_for_ever, [0, 1])


def test_progress_shows_without_ray_too() -> None:
    done = []
    assert for_each_bucket(lambda bucket: bucket + 1, [1, 2], lambda: done.append(1), in_process=True) == [
        2,
        3,
    ]
    assert done == [1, 1]


@pytest.mark.usefixtures("ray_local")
def test_more_tasks_than_ray_gets_at_once_end_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_runtime, "TASKS_AT_ONCE", 2)
    assert ray_runtime.for_each(abs, [-1, -2, -3, -4, -5]) == [1, 2, 3, 4, 5]
