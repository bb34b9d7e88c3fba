"""Votes in a Parquet file: each once, beside other writers' rows, and read by the next night."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rebeca_ray.config.sections import ColumnNames, InteractionSettings
from rebeca_ray.data.interactions import read_interactions
from rebeca_ray.data.votes import append_votes
from rebeca_ray.errors import InputError, StorageError
from rebeca_ray.storage.local import LocalStore


def test_a_new_file_is_read_as_interactions(tmp_path: Path) -> None:
    settings = InteractionSettings(path=str(tmp_path), rating_scale=(0.0, 10.0), like_threshold=7.0)
    uri = str(tmp_path / "feedback.parquet")
    assert append_votes(uri, "u", {"a": True, "b": False}, settings) == 2
    assert append_votes(uri, "v", {"a": True}, settings) == 3
    assert append_votes(uri, "u", {"b": True, "c": False}, settings) == 4  # in place of the dislike
    rows = [(row["user_id"], row["item_id"], row["rating"]) for row in pq.read_table(uri).to_pylist()]
    assert sorted(rows) == [("u", "a", 10.0), ("u", "b", 10.0), ("u", "c", 0.0), ("v", "a", 10.0)]
    now = datetime.now(UTC).replace(tzinfo=None)
    assert all(
        timedelta() <= now - time < timedelta(minutes=1)
        for time in pq.read_table(uri)["timestamp"].to_pylist()
    )
    assert read_interactions(settings).like.sum() == 3


def test_a_file_keeps_its_columns_types_and_names(tmp_path: Path) -> None:
    uri = str(tmp_path / "ratings.parquet")
    columns = {
        "who": pa.array(["u", "v"], pa.large_string()),
        "item_id": ["a", "a"],
        "rating": pa.array([3, 4], pa.int8()),
        "note": ["x", None],
    }
    before = pa.table(columns)
    pq.write_table(before, uri)
    settings = InteractionSettings(path=uri, columns=ColumnNames(user_id="who"))
    append_votes(uri, "u", {"a": False, "b": True}, settings)
    after = pq.read_table(uri)
    assert after.schema == before.schema
    assert after.to_pylist() == [
        {"who": "v", "item_id": "a", "rating": 4, "note": None},
        {"who": "u", "item_id": "a", "rating": 1, "note": None},
        {"who": "u", "item_id": "b", "rating": 5, "note": None},
    ]


def test_rows_of_another_writer_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = InteractionSettings(path=str(tmp_path))
    uri = str(tmp_path / "feedback.parquet")
    append_votes(uri, "u", {"a": True}, settings)
    swap, others = LocalStore.compare_and_swap, ["v", "w"]

    def swap_after_another(store: LocalStore, data: bytes, version: str | None) -> bool:
        if others:
            append_votes(uri, others.pop(), {"b": True}, settings)
        return swap(store, data, version)

    monkeypatch.setattr(LocalStore, "compare_and_swap", swap_after_another)
    append_votes(uri, "u", {"c": True}, settings)
    rows = pq.read_table(uri).to_pylist()
    assert sorted((row["user_id"], row["item_id"]) for row in rows) == [
        ("u", "a"), ("u", "c"), ("v", "b"), ("w", "b"),
    ]  # fmt: skip
    monkeypatch.setattr(LocalStore, "compare_and_swap", lambda *_: False)
    with pytest.raises(StorageError, match="others write to it all the time"):
        append_votes(uri, "u", {"d": True}, settings)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (None, "is no Parquet file"),
        ({"user_id": ["u"], "rating": [1.0]}, "column 'item_id' is missing, there are user_id, rating"),
        ({"user_id": ["u"], "item_id": ["a"]}, "so it cannot hold a dislike; save likes alone"),
        ({"user_id": [1], "item_id": ["a"], "rating": [1.0]}, "its columns cannot hold a rating"),
    ],
)
def test_a_file_of_something_else_stays_as_it_is(
    tmp_path: Path, table: dict[str, list[object]] | None, message: str
) -> None:
    file = tmp_path / "feedback.parquet"
    file.write_text("user_id,item_id\n")
    if table is not None:
        pq.write_table(pa.table(table), file)
    before = file.read_bytes()
    with pytest.raises(InputError, match=message):
        append_votes(str(file), "u", {"b": False}, InteractionSettings(path=str(tmp_path)))
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["feedback.parquet"]
