"""Estimates: from a first measured night, for the same work, for a part of it, and for another cluster."""

import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rebeca_ray.catalog.read import read_catalog
from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.config.sections import PriceSettings
from rebeca_ray.errors import UserError
from rebeca_ray.generation.decide import Decisions
from rebeca_ray.generation.estimate import estimate, foresee, padded, seconds_of
from rebeca_ray.generation.pipeline import measured as measured_stages
from rebeca_ray.generation.progress import Progress
from rebeca_ray.storage.objects import read_json, write_json
from tests.conftest import USERS, snapshot_of

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
    """A catalog whose one snapshot measured what MEASURED says."""
    manifest = snapshot_of(config, requested=16)
    uri = f"{config.catalog}/snapshots/run_date={manifest.run_date}/run_id={manifest.run_id}/manifest.json"
    write_json({**(read_json(uri) or {}), "measured": MEASURED}, uri)
    return config


def drawing(images: int) -> Decisions:
    return Decisions(
        pool=None, by_urgency=True, boundaries=[], planned_users=5, planned_items=images, units=1
    )


def test_the_same_work_takes_the_same_time(measured: GenerateConfig) -> None:
    found = foresee(measured, drawing(16), 16, read_catalog(measured.catalog))
    assert (found.plan_seconds, found.render_seconds, found.other_seconds) == (14.0, 30.0, 4.0)
    assert found.hours == round(48 / 3600, 4)
    images = read_catalog(measured.catalog).files.to_pylist()
    assert found.bytes_written == sum(row["bytes"] for row in images)


def test_less_work_takes_the_same_start_and_whole_batches(measured: GenerateConfig) -> None:
    found = foresee(measured, drawing(5), 16, read_catalog(measured.catalog))
    assert found.render_seconds == 10 + 8 * 20 / 16  # five images are two batches of four
    assert found.plan_seconds == round(10 + 5 * 4 / 16, 1)
    assert foresee(measured, drawing(0), 16, read_catalog(measured.catalog)).render_seconds == 0


def test_another_cluster_is_described_by_the_config(measured: GenerateConfig) -> None:
    decoder = measured.decoder.model_copy(update={"num_actors": 2, "device": "cuda"})
    prices = PriceSettings(gpu_hour=1000.0)
    described = measured.model_copy(update={"decoder": decoder, "prices": prices})
    found = foresee(described, drawing(16), 16, read_catalog(measured.catalog))
    assert found.render_seconds == 10 + 16 * 20 / 16 / 2
    assert found.gpu_hours == round(2 * 20 / 3600, 4)
    assert found.cost == pytest.approx(1000 * 2 * 20 / 3600, abs=0.01)
    told = foresee(described, drawing(16), 16, read_catalog(measured.catalog), images_per_second=16.0)
    assert told.render_seconds == 10.5


def test_nothing_measured_needs_a_rate(config: GenerateConfig) -> None:
    with pytest.raises(UserError, match="no run has measured anything there yet; give --images-per-second"):
        estimate(config)
    found = estimate(config, images_per_second=2.0)
    assert (found.requested_items, found.images, found.planned_users, found.render_seconds) == (
        16,
        16,
        5,
        8.0,
    )
    assert not list(Path(config.catalog).rglob("*.parquet"))


def test_what_is_carried_is_not_counted(measured: GenerateConfig) -> None:
    told: dict[str, Any] = {
        "user_id": USERS[:6],
        "num_images": pa.array([None, 4, None, None, None, None], pa.int32()),
    }
    pq.write_table(
        pa.table({**told, "prompt": [None, None, "noto food pizza", None, None, None]}), measured.request
    )
    tomorrow = measured.model_copy(update={"run_date": datetime.date.today() + datetime.timedelta(days=1)})
    found = estimate(tomorrow)
    assert (found.requested_items, found.images, found.planned_users) == (19, 3, 1)


def test_batches_are_padded_on_the_actor_that_has_most() -> None:
    assert [padded(rows, 4, 1) for rows in (0, 1, 4, 5)] == [0, 4, 4, 8]
    assert [padded(rows, 4, 2) for rows in (1, 8, 9)] == [8, 8, 16]
    assert seconds_of(None, 10, 2, 5.0, 4) == 1.0
    assert DecoderSettings(model="any").batch_size == 16


def test_a_night_in_which_no_actor_came_to_draw_measures_nothing(config: GenerateConfig) -> None:
    progress = Progress()
    with progress.stage("plan"):
        pass
    progress.stages |= {
        "plan": {"seconds": 9.0, "rows": 16, "busy_seconds": 4.0},
        "render": {"seconds": 5.0, "rows": 0, "busy_seconds": 0.0},
    }
    found = measured_stages(config, progress, None)
    assert found["plan"]["actors"] == 1
    assert "render" not in found
