"""Estimates: from a first measured night, for the same work, for a part of it, and for another cluster."""

import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rebeca_ray.catalog.read import read_catalog
from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.config.sections import PriceSettings
from rebeca_ray.errors import UserError
from rebeca_ray.generation.assemble import measured_stages
from rebeca_ray.generation.decisions import Decisions
from rebeca_ray.generation.estimate import estimate, forecast, padded, seconds_of
from rebeca_ray.generation.progress import Progress, StageClock
from rebeca_ray.storage.objects import read_json, write_json
from tests.conftest import USERS, context_of, snapshot_of

MEASURED = {
    "stages": {
        "decide": {"seconds": 1.0},
        "plan": {"seconds": 14.0, "rows": 16, "busy_seconds": 4.0, "actors": 1},
        "test": {"seconds": 0.5},
        "render": {"seconds": 30.0, "rows": 16, "busy_seconds": 20.0, "actors": 1},
        "assemble": {"seconds": 2.5},
    },
}


@pytest.fixture
def measured(config: GenerateConfig) -> GenerateConfig:
    """The config of a catalog with one snapshot, whose stages took what MEASURED says."""
    manifest = snapshot_of(config)
    uri = f"{config.catalog}/snapshots/run_date={manifest.run_date}/run_id={manifest.run_id}/manifest.json"
    write_json({**(read_json(uri) or {}), "measured": MEASURED}, uri)
    return config


def planning(images: int) -> Decisions:
    return Decisions(
        pool=None, by_urgency=True, boundaries=[], planned_users=5, planned_items=images, shards=1
    )


def test_the_same_work_takes_the_same_time(measured: GenerateConfig) -> None:
    cost = forecast(context_of(measured), planning(16))
    assert (cost.plan_seconds, cost.render_seconds, cost.other_seconds) == (14.0, 30.0, 4.0)
    assert cost.hours == round(48 / 3600, 4)
    files = read_catalog(measured.catalog).files.to_pylist()
    assert cost.bytes_written == sum(row["bytes"] for row in files)


def test_less_work_takes_the_same_start_and_whole_batches(measured: GenerateConfig) -> None:
    cost = forecast(context_of(measured), planning(5))
    assert cost.render_seconds == 10 + 8 * 20 / 16  # five images are two batches of four
    assert cost.plan_seconds == round(10 + 5 * 4 / 16, 1)
    assert forecast(context_of(measured), planning(0)).render_seconds == 0


def test_the_config_describes_another_cluster(measured: GenerateConfig) -> None:
    decoder = measured.decoder.model_copy(update={"num_actors": 2, "device": "cuda"})
    prices = PriceSettings(gpu_hour=1000.0)
    context = context_of(measured.model_copy(update={"decoder": decoder, "prices": prices}))
    cost = forecast(context, planning(16))
    assert cost.render_seconds == 10 + 16 * 20 / 16 / 2
    assert cost.gpu_hours == round(2 * 20 / 3600, 4)
    assert cost.cost == pytest.approx(1000 * 2 * 20 / 3600, abs=0.01)
    assert forecast(context, planning(16), images_per_second=16.0).render_seconds == 10.5


def test_a_catalog_without_a_measured_run_needs_a_rate(config: GenerateConfig) -> None:
    with pytest.raises(UserError, match="no run has measured anything there yet; give --images-per-second"):
        estimate(config)
    cost = estimate(config, images_per_second=2.0)
    assert (cost.requested_items, cost.images, cost.planned_users, cost.render_seconds) == (16, 16, 5, 8.0)
    assert not list(Path(config.catalog).rglob("*.parquet"))


def test_an_estimate_counts_no_carried_items(measured: GenerateConfig) -> None:
    request = {
        "user_id": USERS[:6],
        "num_images": pa.array([None, 4, None, None, None, None], pa.int32()),
        "prompt": [None, None, "noto food pizza", None, None, None],
    }
    pq.write_table(pa.table(request), measured.request)
    tomorrow = measured.model_copy(update={"run_date": datetime.date.today() + datetime.timedelta(days=1)})
    cost = estimate(tomorrow)
    assert (cost.requested_items, cost.images, cost.planned_users) == (19, 3, 1)


def test_batches_are_padded_on_the_actor_that_has_most() -> None:
    assert [padded(rows, 4, 1) for rows in (0, 1, 4, 5)] == [0, 4, 4, 8]
    assert [padded(rows, 4, 2) for rows in (1, 8, 9)] == [8, 8, 16]
    assert seconds_of(None, 10, 2, 5.0, 4) == 1.0
    assert DecoderSettings(model="any").batch_size == 16


def test_a_stage_without_rows_is_not_measured(config: GenerateConfig) -> None:
    progress = Progress()
    with progress.stage("plan"):
        pass
    progress.stages |= {
        "plan": StageClock(seconds=9.0, rows=16, busy_seconds=4.0),
        "render": StageClock(seconds=5.0, rows=0, busy_seconds=0.0),
    }
    stages = measured_stages(config, progress, None)
    assert stages["plan"].actors == 1
    assert "render" not in stages
