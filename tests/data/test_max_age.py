"""Ratings older than `max_age_days` are ignored, and their users become cold-start users."""

import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rebeca_ray.config.jobs import TrainConfig, dated
from rebeca_ray.config.sections import InteractionSettings
from rebeca_ray.data.histories import build_histories
from rebeca_ray.data.interactions import read_interactions
from rebeca_ray.errors import InputError
from rebeca_ray.storage.parquet import read_table

ITEMS = np.array(["a", "b", "c"], object)
LAST = datetime.date(2026, 3, 31)
ROWS = [
    ("ann", "a", datetime.datetime(2026, 3, 1)),  # the first moment of 30 days before
    ("ann", "b", datetime.datetime(2026, 2, 28, 23, 59, 59)),
    ("ann", "c", datetime.datetime(2026, 3, 30)),
    ("ben", "a", datetime.datetime(2025, 1, 1)),
    ("cleo", "a", None),
]


def settings(folder: Path, **changes: Any) -> InteractionSettings:
    user, item, time = zip(*ROWS, strict=True)
    columns = {"user_id": user, "item_id": item, "timestamp": pa.array(time, pa.timestamp("us"))}
    pq.write_table(pa.table(columns), folder / "interactions.parquet")
    return InteractionSettings(path=str(folder / "interactions.parquet"), hold_out=0.0, **changes)


def kept(read: InteractionSettings) -> list[tuple[str, str]]:
    interactions = read_interactions(read)
    users = interactions.user_id[interactions.user_index]
    return sorted(zip(users.tolist(), interactions.item_id.tolist(), strict=True))


def test_old_ratings_and_those_without_a_time_are_ignored(tmp_path: Path) -> None:
    assert len(kept(settings(tmp_path))) == 5
    assert kept(settings(tmp_path, max_age_days=30, until=LAST)) == [("ann", "a"), ("ann", "c")]
    assert kept(settings(tmp_path, max_age_days=10**9, until=LAST)) == [
        ("ann", "a"), ("ann", "b"), ("ann", "c"), ("ben", "a"),
    ]  # fmt: skip
    with pytest.raises(InputError, match="no user has at least 1 likes"):
        kept(settings(tmp_path, max_age_days=1, until=datetime.date(2027, 1, 1)))


def test_histories_serve_again_until_the_first_day_moves(tmp_path: Path) -> None:
    everything = settings(tmp_path).for_serving(hide_hold_out=False)

    def build(days: int, until: datetime.date) -> tuple[str, list[str]]:
        read = everything.model_copy(update={"max_age_days": days, "until": until})
        histories = build_histories(read, ITEMS, str(tmp_path / "out"))
        return histories.uri, read_table(histories.uri, "histories", ["user_id"])["user_id"].to_pylist()

    first, users = build(30, LAST)
    assert users == ["ann"]
    assert build(31, LAST + datetime.timedelta(days=1)) != (first, users)  # another setting
    assert build(30, LAST) == (first, users)
    assert build(30, LAST + datetime.timedelta(days=1))[0] != first


def test_an_age_needs_times(tmp_path: Path) -> None:
    pq.write_table(pa.table({"user_id": ["ann"], "item_id": ["a"]}), tmp_path / "interactions.parquet")
    read = InteractionSettings(path=str(tmp_path / "interactions.parquet"), max_age_days=30)
    with pytest.raises(InputError, match=r"'timestamp' is missing, but interactions\.max_age_days is 30"):
        read_interactions(read)


def test_a_job_counts_from_its_date_and_else_from_today() -> None:
    values = {"items": "i", "out": "o", "interactions": {"path": "p", "max_age_days": 30}}
    config = TrainConfig.model_validate(values)
    today = datetime.datetime(2026, 3, 31, tzinfo=datetime.UTC)
    assert config.interactions.since(today) == datetime.date(2026, 3, 1)
    assert dated(config, datetime.date(2026, 2, 10)).interactions.since(today) == datetime.date(2026, 1, 11)
    assert InteractionSettings(path="p").since(today) is None
