"""Votes in a Parquet file: each once, beside other writers' rows, and read by the next night."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rebeca_ray.config.people import ColumnNames
from rebeca_ray.config.sections import InteractionSettings
from rebeca_ray.data.interactions import read_interactions
from rebeca_ray.data.votes import append_votes
from rebeca_ray.errors import InputError, StorageError
from rebeca_ray.storage.local import LocalStore

NOW = datetime(2026, 1, 1)


def ratings(folder: Path, **columns: object) -> InteractionSettings:
    """Write the ratings that the votes come beside, and return their settings."""
    pq.write_table(pa.table({"user_id": ["x"], "item_id": ["a"], **columns}), folder / "ratings.parquet")
    return InteractionSettings(path=str(folder), rating_scale=(0.0, 10.0), like_threshold=7.0)


def test_a_new_file_has_the_columns_of_the_interactions(tmp_path: Path) -> None:
    settings = ratings(tmp_path, rating=[9], timestamp=pa.array([NOW], pa.timestamp("us")))
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
    assert read_interactions(settings).like.sum() == 4


def test_likes_without_ratings_and_times_stay_so(tmp_path: Path) -> None:
    settings, uri = ratings(tmp_path), str(tmp_path / "feedback.parquet")
    append_votes(uri, "u", {"a": True}, settings)
    assert pq.read_table(uri).to_pylist() == [{"user_id": "u", "item_id": "a"}]
    assert read_interactions(settings).num_users == 2
    with pytest.raises(InputError, match="so it cannot hold a dislike"):
        append_votes(uri, "u", {"b": False}, settings)


def test_a_pair_that_another_file_rates_is_refused(tmp_path: Path) -> None:
    settings, uri = ratings(tmp_path, rating=[9]), str(tmp_path / "feedback.parquet")
    append_votes(uri, "x", {"b": True}, settings, rated=["a"])
    with pytest.raises(InputError, match="holds the user's rating of item a; remove that rating"):
        append_votes(uri, "x", {"a": True}, settings, rated=["a", "b"])
    append_votes(uri, "x", {"b": False}, settings, rated=["a", "b"])
    assert pq.read_table(uri)["rating"].to_pylist() == [0.0]
    append_votes(str(tmp_path.parent / f"{tmp_path.name}.parquet"), "x", {"a": True}, settings, rated=["a"])


@pytest.mark.parametrize(
    "kind",
    [pa.int64(), pa.timestamp("ms"), pa.timestamp("ns", "UTC"), pa.date32()],
    ids=str,
)
def test_times_of_every_type_are_read_again(tmp_path: Path, kind: pa.DataType) -> None:
    uri = str(tmp_path / "ratings.parquet")
    time = pa.array([int(NOW.timestamp())]).cast(pa.int64() if kind == pa.int64() else pa.timestamp("s"))
    columns = {
        "user_id": pa.array(["x"]).dictionary_encode(),
        "item_id": pa.array(["a"], pa.large_string()),
        "rating": [5],
        "timestamp": time.cast(kind),
    }
    pq.write_table(pa.table(columns), uri)
    settings = InteractionSettings(path=uri)
    append_votes(uri, "x", {"b": True}, settings)
    days = read_interactions(settings).timestamp / 86_400e6
    today = datetime.now(UTC).timestamp() / 86_400
    assert days[0] == pytest.approx(NOW.timestamp() / 86_400, abs=1)
    assert days[1] == pytest.approx(today, abs=1)


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
    settings = ratings(tmp_path, rating=[9])
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
        ({"user_id": ["u"], "item_id": ["a"], "rating": [["x"]]}, "its columns cannot hold a rating"),
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
