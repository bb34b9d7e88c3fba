"""Histories: one row per user, the same from one piece and through buckets."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rebeca_ray.config.sections import InteractionSettings
from rebeca_ray.data import histories as histories_module
from rebeca_ray.data.histories import build_histories, user_table
from rebeca_ray.errors import UserError
from rebeca_ray.ray_runtime import for_each
from rebeca_ray.schemas import VALIDATION
from rebeca_ray.storage.parquet import read_table

ITEMS = np.array([f"i{number}" for number in range(50)])


def write_interactions(folder: Path, num_users: int = 40) -> InteractionSettings:
    """Write users with 1 to 12 interactions each, in random order, in two files."""
    random = np.random.default_rng(0)
    rows = [
        (f"u{user}", item, rating)
        for user in range(num_users)
        for item, rating in zip(random.permutation(50)[: 1 + user % 12], range(12), strict=False)
    ]
    rows = [rows[index] for index in random.permutation(len(rows))]
    user, item, rating = zip(*rows, strict=True)
    table = pa.table(
        {
            "user_id": user,
            "item_id": [f"i{number}" for number in item],
            "rating": pa.array([1 + value % 5 for value in rating], pa.float32()),
            "timestamp": pa.array(random.integers(0, 10**15, len(rows)), pa.timestamp("us")),
        }
    )
    (folder / "interactions").mkdir()
    half = table.num_rows // 2
    pq.write_table(table.slice(0, half), folder / "interactions" / "a.parquet")
    pq.write_table(table.slice(half), folder / "interactions" / "b.parquet")
    return InteractionSettings(path=str(folder / "interactions"), min_likes=0, hold_out=0.25)


def test_one_row_per_user_in_order_of_time(tmp_path: Path) -> None:
    settings = write_interactions(tmp_path)
    histories = build_histories(settings, ITEMS, str(tmp_path / "out"))
    assert histories.users_of_bucket == [40]
    table = read_table(histories.file(0), "histories")
    rows = {row["user_id"]: row for row in table.to_pylist()}
    source = read_table(settings.path, "interactions").to_pylist()
    for user in ("u0", "u11", "u39"):
        rated = sorted((row for row in source if row["user_id"] == user), key=lambda row: row["timestamp"])
        assert [f"i{item}" for item in rows[user]["item_index"]] == [row["item_id"] for row in rated]
        assert rows[user]["like"] == [int(row["rating"] >= 4) for row in rated]
        assert rows[user]["split"].count(VALIDATION) == len(rated) // 4
        assert rows[user]["num_likes"] == sum(rows[user]["like"])


@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize("max_folders", [256, 6])
def test_buckets_hold_the_same_histories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_folders: int
) -> None:
    settings = write_interactions(tmp_path)
    whole = build_histories(settings, ITEMS, str(tmp_path / "whole"))
    monkeypatch.setattr(histories_module, "MAX_FOLDERS", max_folders)
    monkeypatch.setattr(histories_module, "ROWS_PER_BUCKET", 10)
    monkeypatch.setattr(histories_module, "ROWS_PER_BLOCK", 20)
    monkeypatch.setattr(histories_module, "ROWS_PER_WRITE", 40)
    rows_of_task: Counter[str] = Counter()

    def count_then_build(*arguments: Any, **options: Any) -> list[Any]:
        assert 1 < len(list(tmp_path.glob("parts/*/split/*"))) <= max_folders
        for file in tmp_path.glob("parts/*/split/*/*.parquet"):
            rows_of_task[file.name] += pq.read_metadata(file).num_rows
        return for_each(*arguments, **options)

    monkeypatch.setattr(histories_module, "for_each", count_then_build)
    parts = build_histories(settings, ITEMS, str(tmp_path / "parts"))
    assert rows_of_task.total() == 244
    assert max(rows_of_task.values()) < 40 + 20  # a task takes a small block with another
    assert len(parts.users_of_bucket) > 20
    assert parts.num_users == whole.num_users == 40
    columns = ["user_id", "num_likes", "history_digest", "item_index", "like", "timestamp", "split"]
    read = [read_table(built.uri, "histories", columns).sort_by("user_id") for built in (whole, parts)]
    assert read[0].equals(read[1])
    users = user_table(parts).sort_by("user_index")
    assert users["user_index"].to_pylist() == list(range(40))
    for bucket, count in enumerate(parts.users_of_bucket):
        names = read_table(parts.file(bucket), "histories", ["user_id"])["user_id"].to_pylist()
        assert len(names) == count
        assert all(parts.bucket_of(name) == bucket for name in names)
        first = parts.first_user_index[bucket]
        assert users["user_id"].to_pylist()[first : first + count] == names
    assert not (Path(parts.uri) / "split").exists()


@pytest.mark.usefixtures("ray_local")
def test_a_defect_in_any_bucket_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = write_interactions(tmp_path)
    table = pq.read_table(f"{settings.path}/b.parquet")
    pq.write_table(pa.concat_tables([table, table.slice(3, 1)]), f"{settings.path}/b.parquet")
    monkeypatch.setattr(histories_module, "ROWS_PER_BUCKET", 10)
    with pytest.raises(
        UserError, match=r"interactions .*: 1 of \d+ rows have a \(user_id, item_id\) pair seen before"
    ):
        build_histories(settings, ITEMS, str(tmp_path / "out"))


def test_histories_are_used_again_until_their_input_changes(tmp_path: Path) -> None:
    settings = write_interactions(tmp_path)
    first = build_histories(settings, ITEMS, str(tmp_path / "out"))
    written = Path(first.file(0)).stat().st_mtime_ns
    assert build_histories(settings, ITEMS, str(tmp_path / "out")) == first
    assert Path(first.file(0)).stat().st_mtime_ns == written
    pq.write_table(pq.read_table(f"{settings.path}/b.parquet").slice(5), f"{settings.path}/b.parquet")
    other = build_histories(settings, ITEMS, str(tmp_path / "out"))
    assert other.uri != first.uri
    assert other.digest != first.digest
    # `item_index` counts into the items, so their order matters too.
    assert build_histories(settings, ITEMS[::-1], str(tmp_path / "out")).uri != other.uri


def test_rated_items_without_an_embedding_are_named(tmp_path: Path) -> None:
    settings = write_interactions(tmp_path)
    with pytest.raises(
        UserError, match=r"5 of 244 rate an item that has no embedding \(i0\); embed those items"
    ):
        build_histories(settings, ITEMS[1:], str(tmp_path / "out"))
    assert not list(tmp_path.glob("out/*/histories.json"))
