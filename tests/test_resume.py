"""A run that is killed, or hangs, is gone on with: what was drawn is not drawn again, and every item is published once."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest

from rebeca_ray.catalog.layout import work_folder
from rebeca_ray.catalog.pointer import read_pointer
from rebeca_ray.catalog.read import Snapshot, published, read_catalog
from rebeca_ray.config import GenerateConfig
from rebeca_ray.generation import generate_catalog
from rebeca_ray.resume import unfinished_runs
from rebeca_ray.settings import LayoutSettings, LimitSettings
from rebeca_ray.storage import join, list_files, open_filesystem, read_json

DRIVER = """
import os, sys, time
from rebeca_ray import generation, planning, rendering
from rebeca_ray.catalog.lease import Lease
from rebeca_ray.config import GenerateConfig
from rebeca_ray.job import plain_errors

class HangsLater(rendering.RenderImages):
    calls = 0
    def __call__(self, batch):
        self.calls += 1
        if self.calls > 4:
            time.sleep(3600)
        return super().__call__(batch)

{sabotage}
with plain_errors():
    generation.generate_catalog(GenerateConfig.model_validate_json(sys.argv[1]))
"""
HANG = "rendering.RenderImages = HangsLater"  # so that a kill always comes in the middle
DIE_PLANNING = "planning.write_json = lambda *_: os._exit(9)"  # everything is planned, but nothing says so
DIE_PUBLISHING = "Lease.publish = lambda *_, **__: os._exit(9)"  # the manifest is there, but nobody is pointed to it


def to_resume(config: GenerateConfig, **update: Any) -> GenerateConfig:
    """Forty items in files of four, and a lease that soon counts as dead."""
    limits = LimitSettings(lease_seconds=3)
    return config.model_copy(update={"num_images": 9, "layout": LayoutSettings(images_per_file=4), "limits": limits, **update})


def start(config: GenerateConfig, sabotage: str, ray_address: str) -> subprocess.Popen[str]:
    """A driver of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER.format(sabotage=sabotage), config.model_dump_json()],
        env={**os.environ, "RAY_ADDRESS": ray_address},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_records(process: subprocess.Popen[str], config: GenerateConfig, count: int) -> str:
    """The id of the run of `process`, once it has so many image files."""
    while process.poll() is None:
        for run_id in unfinished_runs(config.root):
            if len(list_files(join(work_folder(config.root, run_id), "records"), ".json")) >= count:
                return run_id
        time.sleep(0.1)
    raise AssertionError(process.communicate()[0])


def drawn(root: str, run_id: str) -> dict[str, Any]:
    """Of every image file with a record: what the record says, and when the file was written."""
    records = [read_json(uri) for uri in list_files(join(work_folder(root, run_id), "records"), ".json")]
    return {record["path"]: (record["sha256"], written_at(root, record["path"])) for record in records if record}


def written_at(root: str, path: str) -> Any:
    filesystem, base = open_filesystem(root)
    return filesystem.modified(join(base, path))


def assert_everything_once(snapshot: Snapshot, count: int = 40) -> None:
    """So many items, each with one image, and each image drawn once."""
    ids = snapshot.table("images")["item_id"].to_pylist()
    assert len(ids) == len(set(ids)) == count
    assert sorted(snapshot.items()["item_id"].to_pylist()) == sorted(ids)
    counts = snapshot.manifest["counts"]
    assert (counts["requested"], counts["new"]) == (count, count)


def on_s3(config: GenerateConfig) -> GenerateConfig:
    fsspec.filesystem("s3").put_file(config.request, "rebeca/resumed/request.parquet")
    return config.model_copy(update={"request": "s3://rebeca/resumed/request.parquet", "root": "s3://rebeca/resumed/catalog"})


@pytest.mark.parametrize("place", [lambda config: config, on_s3], ids=["local", "s3"])
def test_a_run_that_is_killed_while_rendering_draws_the_rest(
    config: GenerateConfig, ray_local: str, place: Callable[[GenerateConfig], GenerateConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    config = place(to_resume(config))
    process = start(config, HANG, ray_local)
    run_id = wait_for_records(process, config, 2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = drawn(config.root, run_id)
    assert published(config.root) is None

    manifest = generate_catalog(config, resume="require")
    assert f"resuming run {run_id}, begun at 20" in capsys.readouterr().out
    assert (manifest["run_id"], manifest["epoch"]) == (run_id, 2)
    snapshot = read_catalog(config.root)
    assert_everything_once(snapshot)
    files = [row for row in snapshot.files.to_pylist() if row["table"] == "images"]
    assert before.items() <= {row["path"]: (row["sha256"], written_at(config.root, row["path"])) for row in files}.items()
    kept = sum(row["rows"] for row in files if "/part-000001-" in row["path"])
    assert 8 <= kept <= 16
    assert manifest["measured"]["stages"]["render"]["rows"] == 40 - kept
    assert read_pointer(config.root)[0].lease is None
    assert unfinished_runs(config.root) == {}


def test_a_run_that_dies_while_planning_and_again_before_publishing(
    config: GenerateConfig, ray_local: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = to_resume(config)
    process = start(config, DIE_PLANNING, ray_local)
    output, _ = process.communicate()
    assert process.returncode == 9, output
    (run_id,) = unfinished_runs(config.root)
    work = Path(work_folder(config.root, run_id))
    assert list(work.glob("plan/unit=0/bucket=0/part-000001-*.parquet"))
    assert not (work / "plan.json").exists()
    assert not (work / "records").exists()

    process = start(config, DIE_PUBLISHING, ray_local)
    output, _ = process.communicate()
    assert process.returncode == 9, output
    assert f"resuming run {run_id}" in output
    parts = read_json(str(work / "plan.json"))
    assert parts is not None
    assert sum(part["rows"] for part in parts["parts"]) == 40
    assert all("/part-000002-" in part["path"] for part in parts["parts"])
    before = drawn(config.root, run_id)
    assert len(before) == 10
    assert published(config.root) is None

    manifest = generate_catalog(config)
    assert f"resuming run {run_id}" in capsys.readouterr().out
    assert (manifest["run_id"], manifest["epoch"]) == (run_id, 3)
    assert not {"plan", "render"} & set(manifest["measured"]["stages"])  # neither was done again
    snapshot = read_catalog(config.root)
    assert_everything_once(snapshot)
    assert {row["path"] for row in snapshot.files.to_pylist() if row["table"] == "images"} == set(before)


def test_a_run_that_hangs_ends_itself_and_is_gone_on_with(config: GenerateConfig, ray_local: str) -> None:
    config = to_resume(config)
    hasty = config.model_copy(update={"limits": LimitSettings(stall_minutes=0.2, lease_seconds=600)})
    process = start(hasty, HANG, ray_local)
    output, _ = process.communicate()
    assert process.returncode == 75, output
    (run_id,) = unfinished_runs(config.root)
    (dump,) = Path(work_folder(config.root, run_id)).glob("stalled-*.txt")
    told = (
        f"error: no progress for 0.2 min while it was at render (limits.stall_minutes); its state is in {dump}. Start it again: it resumes"
    )
    assert [line for line in output.splitlines() if line.startswith("error:")] == [told]
    state = dump.read_text()
    assert state.startswith("stage render; stages so far: {'decide': ")
    assert "rebeca_ray/rendering.py" in state
    assert "in render_unit" in state  # the stack of the driver's main thread
    assert read_pointer(config.root)[0].lease is None

    manifest = generate_catalog(config, resume="require")  # at once, though the lease was one of ten minutes
    assert manifest["run_id"] == run_id
    assert manifest["measured"]["stages"]["render"]["rows"] == 24
    assert_everything_once(read_catalog(config.root))
