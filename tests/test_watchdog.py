"""The watchdog: workers' heartbeats are progress, and an embedding or a training that hangs ends itself."""

import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from rebeca_ray import schemas
from rebeca_ray.catalog.pointer import Kind, read_pointer
from rebeca_ray.config.jobs import EmbedConfig, TrainConfig
from rebeca_ray.ray_runtime import for_each
from rebeca_ray.stickers import CLIP, ITEMS
from rebeca_ray.watchdog import Activity, Counter, Pulse, watchdog

HANG = """
import sys, time
from rebeca_ray.config.jobs import EmbedConfig, TrainConfig
from rebeca_ray.data import embedding
from rebeca_ray.log import configure
from rebeca_ray.training import train

configure()
embedding.embed_images = train.build_histories = lambda *_, **__: time.sleep(3600)
"""
EMBED = "embedding.embed_items(EmbedConfig.model_validate_json(sys.argv[1]))"
TRAIN = "train.train_prior(TrainConfig.model_validate_json(sys.argv[1]))"


@pytest.mark.usefixtures("ray_local")
def test_beats_of_workers_are_progress() -> None:
    activity = Activity()
    pulse = activity.listen()
    assert activity.listen() is pulse
    started = activity.moved_at
    activity.seconds_without_progress()
    assert activity.moved_at == started

    def work(value: int) -> int:
        pulse.beat()
        return value

    assert for_each(work, [1, 2]) == [1, 2]
    while activity.beats == 0:  # a beat is sent, not waited for
        activity.seconds_without_progress()
    assert activity.moved_at > started


@pytest.mark.usefixtures("ray_local")
def test_a_worker_sends_few_beats_with_all_its_rows() -> None:
    pulse = Pulse()
    for _ in range(1000):
        pulse.beat()
    assert pulse.count() == 1
    pulse.last_beat = 0.0
    pulse.beat(16)
    assert pulse.count() == 1000 + 16


@pytest.mark.usefixtures("ray_local")
def test_beats_are_the_progress_of_a_stage() -> None:
    activity = Activity()
    pulse = activity.listen()
    pulse.beat(7)  # of an earlier stage
    assert pulse.count() == 7
    with activity.counting("embed", 400) as counted:
        while counted.done == 0:  # the count before the stage is read in a thread
            pulse.last_beat = 0.0
            pulse.beat(4)
            time.sleep(0.05)
    assert counted.done % 4 == 0
    assert counted.done <= pulse.count() - 7


class SilentPulse:
    """A pulse whose cluster does not answer."""

    def count(self) -> int:
        raise ray.exceptions.GetTimeoutError


def test_a_cluster_that_does_not_answer_makes_no_progress(caplog: pytest.LogCaptureFixture) -> None:
    activity = Activity()
    activity.pulse = cast(Any, SilentPulse())
    before = activity.moved_at
    activity.seconds_without_progress()
    assert activity.moved_at == before
    assert "the workers' heartbeats cannot be counted: GetTimeoutError" in caplog.text


def test_a_block_that_ends_while_its_state_is_written_down_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    writing, written = threading.Event(), threading.Event()

    def write(_: Activity) -> str:
        writing.set()
        assert written.wait(60)
        return "a file"

    monkeypatch.setattr("rebeca_ray.watchdog.dump_state", write)
    monkeypatch.setattr("rebeca_ray.watchdog.os._exit", pytest.fail)
    stalls: list[bool] = []
    with watchdog(Activity(), 0.001, on_stall=lambda: stalls.append(True)):
        assert writing.wait(60)
        threading.Timer(0.5, written.set).start()  # after the block
    assert stalls == []


@pytest.mark.usefixtures("ray_local")
def test_a_step_that_waits_for_a_node_says_for_which(caplog: pytest.LogCaptureFixture) -> None:
    actor = ray.remote(num_cpus=1, resources={"telescope": 2})(Counter).remote()
    with watchdog(Activity(), 0.5, on_stall=pytest.fail):
        while "telescope" not in caplog.text:
            time.sleep(0.1)
    ray.kill(actor)
    line = next(line for line in caplog.messages if "telescope" in line)
    assert re.sub(r"\d\.\d min", "N min", line) == (
        "stage starting: no progress for N min; these wait for free resources: 1 x (1 CPU, 2 telescope)"
    )


@pytest.mark.parametrize(("work", "stage"), [(EMBED, "embed"), (TRAIN, "histories")])
def test_an_embedding_or_a_training_that_hangs_ends_itself(tmp_path: Path, work: str, stage: str) -> None:
    out, kind = str(tmp_path / "out"), cast(Kind, "items" if work == EMBED else "prior")
    config: EmbedConfig | TrainConfig
    if work == EMBED:
        config = EmbedConfig(items=str(ITEMS), clip=f"local-dir:{CLIP}", out=out, stall_minutes=0.05)
    else:
        embeds = pa.FixedSizeListArray.from_arrays(
            pa.array(np.eye(8, dtype=np.float32).ravel()), type=schemas.image_embeds(8)
        )
        items = tmp_path / "items.parquet"
        pq.write_table(pa.table({"item_id": [f"item-{i}" for i in range(8)], "image_embeds": embeds}), items)
        config = TrainConfig.model_validate(
            {"interactions": {"path": "none"}, "items": str(items), "out": out, "stall_minutes": 0.05}
            | {"storage": str(tmp_path / "storage")}
        )
    process = subprocess.run(
        [sys.executable, "-c", HANG + work, config.model_dump_json()],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert process.returncode == 75, process.stderr
    assert f"no progress for 0.05 min in stage {stage} (stall_minutes)" in process.stderr
    assert read_pointer(out, kind)[0].lease is None  # another attempt can start at once
