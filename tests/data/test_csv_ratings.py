"""Ratings in CSV files, and ratings under other names of columns, in CSV and in Parquet."""

import gzip
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rebeca_ray.config.jobs import TrainConfig
from rebeca_ray.config.load import parse_config
from rebeca_ray.config.people import ColumnNames
from rebeca_ray.config.sections import InteractionSettings
from rebeca_ray.data.histories import build_histories
from rebeca_ray.data.interactions import open_interactions, read_columns, read_interactions
from rebeca_ray.errors import InputError
from rebeca_ray.generation.runs import flat
from rebeca_ray.storage.parquet import open_parquet, read_table

MOVIES = ColumnNames(user_id="userId", item_id="movieId", timestamp="time")
TEXT = 'userId,movieId,rating,time,note\n1,0031,2.5,1260759144,"a, b\nc"\n1,10,4,2026-01-05 10:30:00,\n'
ROWS = [
    {"user_id": "1", "item_id": "0031", "rating": 2.5, "timestamp": datetime(2009, 12, 14, 2, 52, 24)},
    {"user_id": "1", "item_id": "10", "rating": 4.0, "timestamp": datetime(2026, 1, 5, 10, 30)},
]


def rows_of(path: Path, columns: ColumnNames = MOVIES) -> list[dict[str, Any]]:
    source = open_interactions(InteractionSettings(path=str(path), columns=columns))
    rows: list[dict[str, Any]] = read_columns(source).to_pylist()
    return rows


def test_ratings_are_read_from_csv_plain_and_compressed_and_from_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(TEXT)
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + TEXT.replace("1,", "2,").encode()))
    assert rows_of(tmp_path / "a.csv") == ROWS
    assert [row["user_id"] for row in rows_of(tmp_path / "b.csv.gz")] == ["2", "2"]
    assert len(rows_of(tmp_path)) == 4


def test_csv_and_parquet_of_the_same_ratings_make_the_same_histories(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(TEXT)
    columns = {"userId": ["1", "1"], "movieId": ["0031", "10"], "rating": [2.5, 4.0]}
    times = [row["timestamp"] for row in ROWS]
    pq.write_table(pa.table({**columns, "time": pa.array(times, pa.timestamp("us"))}), tmp_path / "b.parquet")
    ids, out = np.array(["0031", "10"]), str(tmp_path / "out")
    built = [
        build_histories(
            InteractionSettings(path=str(tmp_path / name), columns=MOVIES, hold_out=0.0), ids, out
        )
        for name in ("a.csv", "b.parquet")
    ]
    assert built[0].digest == built[1].digest
    assert read_table(built[0].uri, "histories").equals(read_table(built[1].uri, "histories"))


def test_columns_of_folders_may_be_renamed_too(tmp_path: Path) -> None:
    (tmp_path / "userId=7").mkdir()
    (tmp_path / "userId=7" / "a.csv").write_text("movieId\n10\n")
    assert rows_of(tmp_path, ColumnNames(user_id="userId", item_id="movieId")) == [
        {"user_id": "7", "item_id": "10"}
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("userid,movieId,time\n1,2,3\n", "column 'userId' is missing; did you mean 'userid'?"),
        ("userId,movieId\n1,2\n", "column 'time' is missing; known: movieId, userId"),
        (
            "userId,movieId,time\n1,2\n",
            "a.csv is not a readable CSV file (CSV parse error: Row #2: ",
        ),
        ("userId,movieId,time\n" + "1,2,3\n" * 400_000 + "1\n", "not readable as CSV (CSV parse error: "),
        ("", "a.csv is not a readable CSV file (Empty CSV file); write it again"),
        (
            "userId,movieId,time,rating\n1,2,3,good\n",
            "'rating' is string, with values that are no double",
        ),
        (
            "userId,movieId,time\n1,2,yesterday\n",
            "'time' is string, with values that are no timestamp",
        ),
        ("userId,movieId,time\n1,2,99999999999999999\n", "column 'time' is string, with values"),
        ("userId,userId,movieId,time\n1,1,2,3\n", "a.csv has column 'userId' more than once"),
    ],
)
def test_a_csv_file_with_a_defect_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(InputError) as caught:
        rows_of(tmp_path / "a.csv")
    assert str(caught.value).startswith(f"interactions {tmp_path}/a.csv: ")
    assert message in str(caught.value)
    assert str(caught.value).splitlines() == [str(caught.value)]


@pytest.mark.parametrize("text", ["userId,movieId,time\n,2,3\n", "userId,movieId,time\n1,,3\n"])
def test_an_empty_id_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(InputError, match="1 of 1 rows have an empty (user|item)_id"):
        read_interactions(InteractionSettings(path=str(tmp_path / "a.csv"), columns=MOVIES))


def test_two_kinds_of_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(TEXT)
    pq.write_table(pa.table({"userId": ["1"]}), tmp_path / "b.parquet")
    with pytest.raises(InputError, match=r"Parquet files and CSV files \(b.parquet, a.csv\); keep one"):
        rows_of(tmp_path)
    with pytest.raises(InputError, match=r"items .*holds no Parquet file \(a.csv\); give a Parquet file, or"):
        open_parquet(str(tmp_path / "a.csv"), "items")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"user": "userId"}, "unknown key 'interactions.columns.user'; did you mean 'user_id'?"),
        ({"user_id": "id", "item_id": "id"}, "id is named twice; name each column once"),
        ({"user_id": ""}, "interactions.columns.user_id = ''"),
    ],
)
def test_names_that_cannot_be_meant_are_refused(columns: Mapping[str, str], message: str) -> None:
    values = {"interactions": {"path": "a.csv", "columns": columns}, "items": "i", "out": "o"}
    with pytest.raises(InputError) as caught:
        parse_config(TrainConfig, values, where="train.yaml")
    assert message in str(caught.value)


def test_a_run_is_described_with_the_names() -> None:
    settings = InteractionSettings(path="a.csv", columns=MOVIES)
    assert flat("config", settings.model_dump())["config.columns.user_id"] == "userId"
