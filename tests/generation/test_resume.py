"""A run that is killed or hangs is resumed: no image is rendered twice, and every item is published once."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.compute as pc
import pytest

from rebeca_ray.catalog.layout import work_folder
from rebeca_ray.catalog.pointer import read_pointer
from rebeca_ray.catalog.read import Snapshot, published, read_catalog
from rebeca_ray.catalog.runs import unfinished_runs
from rebeca_ray.cli.runner import plain_errors
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.config.sections import LayoutSettings, LimitSettings
from rebeca_ray.decoder.interface import DecodedImage
from rebeca_ray.decoder.local import LocalDecoder
from rebeca_ray.errors import UserError
from rebeca_ray.generation import render
from rebeca_ray.generation.context import RunContext
from rebeca_ray.generation.pipeline import generate_catalog
from rebeca_ray.generation.request import input_digests
from rebeca_ray.generation.runs import begin, describe_run
from rebeca_ray.storage.filesystem import join, list_files, open_filesystem
from rebeca_ray.storage.objects import read_json
from rebeca_ray.storage.parquet import read_table
from tests.conftest import context_of, planned_items, prepare, render_rows, versions_of, write_plan
from tests.generation.light_render import LightRender

DRIVER = """
import os, sys, time
from rebeca_ray.generation import pipeline, plan, render
from rebeca_ray.catalog.lease import Lease
from rebeca_ray.cli.runner import plain_errors
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.log import configure
from tests.generation.light_render import LightRender

class HangsLater(LightRender):
    calls = 0
    def __call__(self, batch):
        self.calls += 1
        if self.calls > 4:
            time.sleep(3600)
        return super().__call__(batch)

render.RenderImages = LightRender
{sabotage}
configure()
with plain_errors("go on"):
    pipeline.generate_catalog(GenerateConfig.model_validate_json(sys.argv[1]), in_process={in_process})
"""
HANG = "render.RenderImages = HangsLater"  # so that a kill always comes in the middle
DIE_PLANNING = "plan.write_record = lambda *_: os._exit(9)"  # all items are planned, without the marker
DIE_PUBLISHING = "Lease.publish = lambda *_, **__: os._exit(9)"  # the manifest exists, without the pointer


def to_resume(config: GenerateConfig, **update: Any) -> GenerateConfig:
    """Forty items in files of four, and a lease that soon counts as dead."""
    limits = LimitSettings(lease_seconds=3)
    return config.model_copy(
        update={"num_images": 9, "layout": LayoutSettings(images_per_file=4), "limits": limits, **update}
    )


def planned(config: GenerateConfig) -> str:
    """The id of a run that was killed once it had its plan, which is made in this process."""
    context = context_of(config)
    record_beginning(context)
    write_plan(context)
    return context.run.run_id


def record_beginning(context: RunContext) -> None:
    description = describe_run(
        context.config, versions_of(context.config), None, input_digests(context.config)
    )
    begin(context.config.catalog, context.run.run_id, context.date, description)


def start(config: GenerateConfig, sabotage: str, ray_address: str = "") -> subprocess.Popen[str]:
    """Generate the catalog in another process; without a Ray, that process runs all stages."""
    script = DRIVER.format(sabotage=sabotage, in_process=not ray_address)
    return subprocess.Popen(
        [sys.executable, "-c", script, config.model_dump_json()],
        env={**os.environ, "RAY_ADDRESS": ray_address},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_records(process: subprocess.Popen[str], config: GenerateConfig, run_id: str) -> None:
    """Wait until two image files of a run exist."""
    while len(list_files(join(work_folder(config.catalog, run_id), "records"), ".json")) < 2:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)


def rendered(root: str, run_id: str) -> dict[str, Any]:
    """The image files with a record: checksum and time of writing by path."""
    return {
        record["path"]: (record["sha256"], written_at(root, record["path"]))
        for record in records(root, run_id)
    }


def records(root: str, run_id: str) -> list[dict[str, Any]]:
    values = [read_json(uri) for uri in list_files(join(work_folder(root, run_id), "records"), ".json")]
    return [record for record in values if record]


def written_at(root: str, path: str) -> Any:
    filesystem, base = open_filesystem(root)
    return filesystem.modified(join(base, path))


def assert_everything_once(snapshot: Snapshot, count: int = 40) -> None:
    """Check that the snapshot has `count` items, each with one image, and each image rendered once."""
    ids = snapshot.table("images")["item_id"].to_pylist()
    assert len(ids) == len(set(ids)) == count
    assert sorted(snapshot.items()["item_id"].to_pylist()) == sorted(ids)
    counts = snapshot.manifest.counts
    assert (counts.requested, counts.new) == (count, count)


def on_s3(config: GenerateConfig) -> GenerateConfig:
    fsspec.filesystem("s3").put_file(config.request, "rebeca/resumed/request.parquet")
    return config.model_copy(
        update={"request": "s3://rebeca/resumed/request.parquet", "catalog": "s3://rebeca/resumed/catalog"}
    )


def test_a_run_that_is_killed_while_rendering_renders_the_rest(
    config: GenerateConfig,
    s3_server: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(render, "RenderImages", LightRender)
    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    config = on_s3(to_resume(config))
    run_id = planned(config)
    process = start(config, HANG)
    wait_for_records(process, config, run_id)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = rendered(config.catalog, run_id)
    assert published(config.catalog) is None

    manifest = generate_catalog(config, resume="require", in_process=True).manifest
    assert f"resuming run {run_id}, begun at 20" in caplog.text
    assert (manifest.run_id, manifest.fencing_token) == (run_id, 2)
    snapshot = read_catalog(config.catalog)
    assert_everything_once(snapshot)
    files = [row for row in snapshot.files.to_pylist() if row["table"] == "images"]
    assert (
        before.items()
        <= {row["path"]: (row["sha256"], written_at(config.catalog, row["path"])) for row in files}.items()
    )
    kept = sum(row["rows"] for row in files if "/part-000001-" in row["path"])
    assert 8 <= kept <= 16
    assert manifest.measured.stages["render"].rows == 40 - kept
    assert read_pointer(config.catalog)[0].lease is None
    assert unfinished_runs(config.catalog) == {}


def test_a_run_that_ctrl_c_stops_is_resumed(config: GenerateConfig) -> None:
    config = to_resume(config)
    run_id = planned(config)
    process = start(config, HANG)
    wait_for_records(process, config, run_id)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert output.splitlines()[-1] == "stopped; go on"
    assert "Traceback" not in output
    assert read_pointer(config.catalog)[0].lease is None  # freed, not expired
    before = rendered(config.catalog, run_id)

    manifest = generate_catalog(config, resume="require", in_process=True).manifest
    assert manifest.measured.stages["render"].rows == 40 - 4 * len(before)
    assert_everything_once(read_catalog(config.catalog))


def test_a_run_that_dies_while_planning_and_again_before_publishing_is_resumed(
    config: GenerateConfig, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    config = to_resume(config)
    process = start(config, DIE_PLANNING)
    output, _ = process.communicate()
    assert process.returncode == 9, output
    (run_id,) = unfinished_runs(config.catalog)
    work = Path(work_folder(config.catalog, run_id))
    assert list(work.glob("plan/shard=0/bucket=0/part-000001-*.parquet"))
    assert not (work / "plan.json").exists()
    assert not (work / "records").exists()

    process = start(config, DIE_PUBLISHING)
    output, _ = process.communicate()
    assert process.returncode == 9, output
    assert f"resuming run {run_id}" in output
    parts = read_json(str(work / "plan.json"))
    assert parts is not None
    assert sum(part["rows"] for part in parts["parts"]) == 40
    assert all("/part-000002-" in part["path"] for part in parts["parts"])
    before = rendered(config.catalog, run_id)
    assert len(before) == 10
    assert published(config.catalog) is None

    manifest = generate_catalog(config, in_process=True).manifest
    assert f"resuming run {run_id}" in caplog.text
    assert (manifest.run_id, manifest.fencing_token) == (run_id, 3)
    assert not {"plan", "render"} & set(manifest.measured.stages)  # neither was done again
    snapshot = read_catalog(config.catalog)
    assert_everything_once(snapshot)
    assert {row["path"] for row in snapshot.files.to_pylist() if row["table"] == "images"} == set(before)


def test_a_run_that_hangs_ends_itself_and_is_resumed(config: GenerateConfig, ray_local: str) -> None:
    config = to_resume(config)
    run_id = planned(config)
    hasty = config.model_copy(update={"limits": LimitSettings(stall_minutes=0.15, lease_seconds=600)})
    process = start(hasty, HANG, ray_local)
    output, _ = process.communicate()
    assert process.returncode == 75, output
    assert f"resuming run {run_id}" in output
    (dump,) = Path(work_folder(config.catalog, run_id)).glob("stalled-*.txt")
    message = (
        f"ERROR run {run_id}: no progress for 0.15 min in stage render (stall_minutes); "
        f"its state is in {dump}. Start it again: it resumes"
    )
    assert [line.partition(" ")[2] for line in output.splitlines() if " ERROR " in line] == [message]
    state = dump.read_text()
    assert state.startswith("stage render; ")
    assert "'stages': {'histories': StageClock(" in state
    assert "rebeca_ray/generation/render.py" in state
    assert "in render_shard" in state  # the stack of the driver's main thread
    assert read_pointer(config.catalog)[0].lease is None
    rows = sum(image_file["rows"] for image_file in records(config.catalog, run_id))

    # The next attempt starts at once, though the lease was one of ten minutes.
    manifest = generate_catalog(config, resume="require", in_process=True).manifest
    assert manifest.run_id == run_id
    assert manifest.measured.stages["render"].rows == 40 - rows
    assert_everything_once(read_catalog(config.catalog))


def test_failed_items_are_rendered_again_with_retry_failed(
    config: GenerateConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two of sixteen items failed in a decoder that works again."""
    decoder = config.decoder.model_copy(update={"batch_size": 16})  # one call of the decoder
    config = config.model_copy(update={"decoder": decoder})
    whole = LocalDecoder.decode
    with monkeypatch.context() as patch:
        patch.setattr(
            LocalDecoder,
            "decode",
            lambda self, rows: [DecodedImage(seed=1, error="bad luck")] * 2 + whole(self, rows)[2:],
        )
        context = prepare(config).context
    run = context.run
    record_beginning(context)
    for _ in range(2):  # without the option they stay failed
        with pytest.raises(SystemExit) as caught, plain_errors():
            generate_catalog(config, in_process=True)
        assert caught.value.code == 3
        assert (
            capsys.readouterr()
            .err.splitlines()[-1]
            .startswith(
                f"error: run {run.run_id}: 2 of 16 items failed (bad luck), the budget is 0.10%; "
                "nothing is published. Mend it"
            )
        )
        assert published(config.catalog) is None
    errors_uri = join(config.catalog, replace(run, fencing_token=2).table("errors", 0))
    errors = read_table(errors_uri, "errors").to_pylist()
    assert [(row["stage"], row["error"], row["attempt"]) for row in errors] == [("render", "bad luck", 0)] * 2

    manifest = generate_catalog(config, retry_failed=True, in_process=True).manifest
    assert manifest.run_id == run.run_id
    assert (manifest.counts.new, manifest.counts.failed) == (16, 0)
    assert manifest.measured.stages["render"].rows == 2
    snapshot = read_catalog(config.catalog)
    assert snapshot.table("errors").num_rows == 0
    (again,) = (
        row["path"]
        for row in snapshot.files.to_pylist()
        if row["table"] == "images" and "/part-000003-" in row["path"]
    )
    rendered_again = read_table(join(config.catalog, again), "images")
    assert sorted(rendered_again["item_id"].to_pylist()) == sorted(row["item_id"] for row in errors)
    items = snapshot.items()
    assert items.num_rows == 16
    assert None not in snapshot.images(items)
    with pytest.raises(UserError, match="no unfinished run of .* to go on with"):
        generate_catalog(config, retry_failed=True, in_process=True)


def test_a_run_without_gpu_hours_left_publishes_its_rendered_items(
    config: GenerateConfig,
) -> None:
    """It was killed with one shard of three rendered, and has no time left."""
    config = config.model_copy(update={"layout": LayoutSettings(items_per_shard=6)})
    context = context_of(config)
    record_beginning(context)
    write_plan(context)
    rows = planned_items(context.run)
    first = rows.filter(pc.equal(rows["shard"], 0))
    render_rows(context, 0, first)
    limits = LimitSettings(max_gpu_hours=1e-9)
    tonight = config.model_copy(update={"limits": limits})
    counts = generate_catalog(tonight, in_process=True).manifest.counts
    assert (counts.requested, counts.new, counts.deferred) == (16, first.num_rows, 16 - first.num_rows)
    done = set(first["user_id"].to_pylist())
    assert (counts.users, counts.stale_users) == (len(done), 5 - len(done))
    assert set(read_catalog(config.catalog).items()["user_id"].to_pylist()) == done
