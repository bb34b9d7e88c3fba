"""Files of an input as other writers leave them: columns in folders, mixed types, stray files, footers."""

import json
from collections.abc import Callable
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rebeca_ray import schemas
from rebeca_ray.config.sections import InteractionSettings
from rebeca_ray.data import histories as histories_module
from rebeca_ray.data.histories import build_histories
from rebeca_ray.data.interactions import open_interactions, read_columns
from rebeca_ray.data.items import read_image_embeds
from rebeca_ray.data.validation import check_columns
from rebeca_ray.errors import InputError
from rebeca_ray.storage.parquet import open_parquet, read_table

RATED = {"user_id": ["ann"], "item_id": ["i1"], "rating": [4.0]}
MOMENT = datetime(2026, 1, 5, 10, 30)


def write(path: Path, columns: dict[str, Any], **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Return the interactions of a folder as the jobs see them."""
    rows: list[dict[str, Any]] = read_columns(
        open_interactions(InteractionSettings(path=str(folder)))
    ).to_pylist()
    return rows


def requests_of(folder: Path) -> list[dict[str, Any]]:
    source = open_parquet(str(folder), "request")
    rows: list[dict[str, Any]] = source.read(check_columns(source, schemas.REQUEST)).to_pylist()
    return rows


def test_columns_in_folder_names_are_read_in_their_declared_type(tmp_path: Path) -> None:
    for user, event, stars, time in (
        ("a%2Fb", "rating", "4", "2026-01-05 10%3A30%3A00"),
        ("001", "__HIVE_DEFAULT_PARTITION__", "3.5", "1767609000"),
        ("c", "impression", "5", "2026-01-05T11%3A30%3A00%2B01%3A00"),
    ):
        folder = f"user_id={user}/event={event}/rating={stars}/timestamp={time}/run=7"
        write(tmp_path / folder / "part-0.parquet", {"item_id": ["i1", "i2"]})
    assert rows_of(tmp_path) == [
        {"user_id": user, "item_id": item, "rating": rating, "timestamp": MOMENT}
        for user, rating in (("001", 3.5), ("a/b", 4.0))
        for item in ("i1", "i2")
    ]


def test_a_folder_name_that_is_no_value_of_its_column_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "rating=good" / "a.parquet", {"user_id": ["ann"], "item_id": ["i1"]})
    with pytest.raises(InputError, match=r"'rating' is text, with values that are no double \(.*'good'"):
        rows_of(tmp_path)


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        (
            "rating=3",
            "a.parquet has column 'rating' also in the name of its folder; rename or",
        ),
        ("event=rating/event=impression", "a.parquet has column 'event' also in the name"),
        ("x", None),
        ("run=3", None),
    ],
)
def test_a_column_in_a_folder_name_and_in_the_file_is_refused(
    tmp_path: Path, folder: str, message: str | None
) -> None:
    write(tmp_path / folder / "a.parquet", {**RATED, "run": [1]})
    if message is None:
        assert rows_of(tmp_path) == [{**{name: value[0] for name, value in RATED.items()}}]
        return
    with pytest.raises(InputError) as caught:
        rows_of(tmp_path)
    assert message in str(caught.value)


def test_a_column_that_some_folders_name_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a" / "a.parquet", RATED)
    write(tmp_path / "event=rating" / "b.parquet", RATED)
    with pytest.raises(InputError, match=r"b.parquet and a.parquet differ in their columns \(event\)"):
        rows_of(tmp_path)


def test_embeddings_in_a_folder_name_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "image_embeds=1" / "a.parquet", {"item_id": ["a"]})
    with pytest.raises(InputError, match="column 'image_embeds' is in the name of a folder, expected fixed"):
        read_image_embeds(str(tmp_path))


def test_folders_above_the_input_name_no_column(tmp_path: Path) -> None:
    folder = tmp_path / "bucket=prod" / "item_id=all" / "rating=1"
    write(folder / "a.parquet", RATED)
    expected = [{name: value[0] for name, value in RATED.items()}]
    assert rows_of(folder) == expected
    assert rows_of(folder / "a.parquet") == expected


TIMES = {
    "date": pa.array([20458], pa.date32()),
    "days in ms": pa.array([20458 * 86_400_000], pa.date64()),
    "seconds": pa.array([MOMENT], pa.timestamp("s")),
    "nanoseconds": pa.array([1_767_609_000_000_000_001], pa.timestamp("ns")),
    "zoned": pa.array([MOMENT], pa.timestamp("ms", "UTC")),
    "unix": pa.array([1_767_609_000], pa.int32()),
    "dictionary": pa.array([MOMENT], pa.timestamp("us")).dictionary_encode(),
}


@pytest.mark.parametrize("first", TIMES)
def test_no_file_decides_the_type_of_another(tmp_path: Path, first: str) -> None:
    """Whichever comes first, all are as exact as they were written."""
    order = [first, *(name for name in TIMES if name != first)]
    ratings = [pa.array([5]), pa.array([3.5]), pa.array([Decimal("4.5")]), pa.array([2], pa.uint8())]
    texts = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
    for number, name in enumerate(order):
        columns = {
            "user_id": pa.array([name]).cast(texts[number % 4]),
            "item_id": pa.array(["i1"]).cast(texts[(number + 1) % 4]),
            "rating": ratings[number % 4],
            "timestamp": TIMES[name],
            "event": pa.nulls(1) if number % 2 else pa.array(["rating"]),
        }
        write(tmp_path / f"{number}.parquet", columns)
    rows = rows_of(tmp_path)
    assert [row["rating"] for row in rows] == [
        [5.0, 3.5, 4.5, 2.0][number % 4] for number in range(len(order))
    ]
    midnight = datetime(2026, 1, 5)
    assert {row["user_id"]: row["timestamp"] for row in rows} == {
        name: midnight if name in ("date", "days in ms") else MOMENT for name in TIMES
    }


def test_old_times_of_spark_keep_their_year(tmp_path: Path) -> None:
    times = pa.array([datetime(9999, 12, 31), datetime(1500, 1, 1), None], pa.timestamp("us"))
    columns = {"user_id": ["a", "b", "c"], "item_id": ["i"] * 3, "timestamp": times}
    write(tmp_path / "a.parquet", columns, use_deprecated_int96_timestamps=True)
    assert [row["timestamp"] for row in rows_of(tmp_path)] == times.to_pylist()


def test_an_optional_column_of_nothing_is_a_missing_one(tmp_path: Path) -> None:
    request = {"user_id": ["a"], "prompt": pa.nulls(1), "num_images": pa.nulls(1)}
    write(tmp_path / "a.parquet", request)
    assert requests_of(tmp_path) == [{"user_id": "a"}]
    write(tmp_path / "b.parquet", {"user_id": ["b"], "prompt": ["a cat"], "num_images": pa.nulls(1)})
    assert requests_of(tmp_path) == [{"user_id": "a", "prompt": None}, {"user_id": "b", "prompt": "a cat"}]


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        (
            "num_images",
            pa.array([2**64 - 1], pa.uint64()),
            "is uint64 in b.parquet, with values",
        ),
        ("num_images", pa.array([True]), "'num_images' is bool in b.parquet, expected int32; cast it"),
        (
            "num_images",
            pa.array([Decimal("3.5")]),
            r"is decimal128\(2, 1\) in b.parquet, expected",
        ),
        ("priority", pa.array(["3"]), "'priority' is string in b.parquet, expected float; cast it"),
        (
            "prompt",
            pa.array([b"cat"], pa.binary_view()),
            "is binary_view in b.parquet, expected string",
        ),
    ],
)
def test_a_type_that_loses_something_is_refused_by_file_column_and_type(
    tmp_path: Path, column: str, values: pa.Array, message: str
) -> None:
    write(tmp_path / "a.parquet", {"user_id": ["a"], column: pa.nulls(1)})
    write(tmp_path / "b.parquet", {"user_id": ["b"], column: values})
    with pytest.raises(InputError, match=message):
        requests_of(tmp_path)


def embeds(kind: str) -> pa.Array:
    values = np.arange(1, 5, dtype=np.float32).reshape(2, 2)
    if kind == "tensor":
        return pa.FixedShapeTensorArray.from_numpy_ndarray(values)
    if kind == "ray":
        from ray.data.extensions import ArrowTensorArray

        return ArrowTensorArray.from_numpy(values)
    if kind == "matrix":
        return pa.FixedShapeTensorArray.from_numpy_ndarray(values.reshape(2, 1, 2))
    kinds = {
        "list": pa.list_(pa.float64()),
        "large": pa.large_list(pa.float32()),
        "view": pa.list_view(pa.float32()),
        "fixed": pa.list_(pa.float16(), 2),
    }
    return pa.array(values.tolist(), kinds[kind])


@pytest.mark.parametrize("kind", ["tensor", "ray", "list", "large", "view", "fixed"])
def test_embeddings_are_read_from_tensors_and_lists_of_every_kind(tmp_path: Path, kind: str) -> None:
    write(tmp_path / "a.parquet", {"item_id": ["a", "b"], "image_embeds": embeds("fixed")})
    write(tmp_path / "b.parquet", {"item_id": ["c", "d"], "image_embeds": embeds(kind)})
    items = read_image_embeds(str(tmp_path))
    assert items.image_embeds.tolist() == [[1, 2], [3, 4]] * 2
    assert items.image_embeds.dtype == np.float32


def test_a_tensor_of_several_dimensions_is_no_embedding(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"item_id": ["a", "b"], "image_embeds": embeds("matrix")})
    with pytest.raises(InputError, match=r"column 'image_embeds' is .*tensor.*, expected fixed_size_list"):
        read_image_embeds(str(tmp_path))


def test_names_that_begin_with_an_underscore_or_a_dot_are_no_data(tmp_path: Path) -> None:
    write(tmp_path / "part-0.snappy.parquet", RATED)
    for name in (
        "_temporary/0/part-1.parquet",
        ".staging/part-1.parquet",
        "_part-1.parquet",
        "part-0.parquet.partial-77",
    ):
        write(tmp_path / name, RATED)
    for name in ("_SUCCESS", "_committed_17", ".part-0.parquet.crc", "_metadata", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    assert len(rows_of(tmp_path)) == 1
    assert len(rows_of(tmp_path / "_part-1.parquet")) == 1  # somebody named it
    write(tmp_path / "_day=1" / "part-2.parquet", {**RATED, "user_id": ["ben"]})
    assert [row["user_id"] for row in rows_of(tmp_path)] == ["ben", "ann"]


@pytest.mark.parametrize("name", ["a.parq", "a.pq", "a.PARQUET", "000000_0", "a.parquet.snappy", "part.c000"])
def test_a_file_is_data_by_its_content_whatever_its_name(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, RATED)
    assert len(rows_of(tmp_path)) == 1


def test_a_file_that_promises_parquet_must_be_parquet(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", RATED)
    (tmp_path / "b.parquet.gz").write_bytes(b"\x1f\x8b" + bytes(20))
    with pytest.raises(InputError, match=r"b.parquet.gz is not a readable Parquet file but gzip; write"):
        rows_of(tmp_path)
    (tmp_path / "b.parquet.gz").rename(tmp_path / "b.gz")
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(InputError, match=r"holds no Parquet file \(b.gz\); give a Parquet file, or a folder"):
        read_table(str(tmp_path), "items")


LOGS = {
    "Delta": "_delta_log/00000000000000000000.json",
    "Iceberg": "metadata/00001-4a.metadata.json",
    "Hudi": ".hoodie/hoodie.properties",
}


@pytest.mark.parametrize("kind", LOGS)
def test_a_table_with_a_log_is_refused(tmp_path: Path, kind: str) -> None:
    """Its removed rows would come back. The log may lie beside the files, or above a part of them."""
    write(tmp_path / "table" / "data" / "dt=1" / "a.parquet", RATED)
    write(tmp_path / "table" / "b.parquet", RATED)
    assert len(rows_of(tmp_path / "table" / "b.parquet")) == 1
    log = tmp_path / "again" / LOGS[kind]
    (tmp_path / "table").rename(tmp_path / "again")
    log.parent.mkdir(parents=True)
    log.write_text("{}")
    for part in ("", "data", "data/dt=1", "data/dt=1/a.parquet", "b.parquet"):
        with pytest.raises(InputError) as caught:
            rows_of(tmp_path / "again" / part)
        assert f": is a {kind} table, or a part of one, and its log tells" in str(caught.value)
        assert str(caught.value).endswith("; export it as plain Parquet, and give that folder")


def test_a_folder_called_metadata_is_no_log(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", RATED)
    (tmp_path / "metadata").mkdir()
    (tmp_path / "metadata" / "columns.json").write_text(json.dumps({}))
    assert len(rows_of(tmp_path)) == 1


def test_columns_that_nobody_declared_are_neither_read_nor_compared(tmp_path: Path) -> None:
    extra: list[dict[str, Any]] = [{}, {"note": [1]}, {"note": ["x"]}, {"note": [[b"1"]], "page": [True]}]
    for number, columns in enumerate(extra):
        write(tmp_path / f"{number}.parquet", {**RATED, "user_id": [f"u{number}"], **columns})
    twice = pa.table([["u4"], ["i1"], [4.0], [1], [2]], ["user_id", "item_id", "rating", "note", "note"])
    pq.write_table(twice, tmp_path / "4.parquet")
    assert [row["user_id"] for row in rows_of(tmp_path)] == ["u0", "u1", "u2", "u3", "u4"]


def zigzag(number: int) -> bytes:
    """Return a number as Thrift writes it in a footer."""
    number, data = number << 1, b""
    while number > 127:
        data, number = data + bytes([number & 127 | 128]), number >> 7
    return data + bytes([number])


def with_claim(path: Path, truth: int, claim: int) -> None:
    """Replace a number in the footer of a file."""
    data = path.read_bytes()
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    footer = data[start:-8].replace(zigzag(truth), zigzag(claim))
    assert footer != data[start:-8]
    path.write_bytes(data[:start] + footer + len(footer).to_bytes(4, "little") + b"PAR1")


@pytest.mark.parametrize("claim", [10**9, 10**12, 2**61])
def test_a_footer_that_claims_more_rows_than_its_file_can_hold_is_refused(tmp_path: Path, claim: int) -> None:
    rows = 12_345
    ids = [f"u{row}" for row in range(rows)]
    write(tmp_path / "a.parquet", {"user_id": ids, "item_id": ids}, store_schema=False)
    with_claim(tmp_path / "a.parquet", rows, claim)
    with pytest.raises(InputError) as caught:
        build_histories(InteractionSettings(path=str(tmp_path)), np.array(ids), str(tmp_path / "out"))
    assert f"a.parquet is damaged: its footer claims {claim:,} rows" in str(caught.value)


def test_a_footer_that_claims_a_few_rows_more_is_refused_when_they_are_missing(tmp_path: Path) -> None:
    rows = 12_345
    ids = [f"u{row}" for row in range(rows)]
    write(tmp_path / "a.parquet", {"user_id": ids, "item_id": ids}, store_schema=False)
    with_claim(tmp_path / "a.parquet", rows, 54_321)
    with pytest.raises(InputError, match="not readable as Parquet"):
        rows_of(tmp_path)


def test_a_footer_that_claims_more_bytes_than_its_file_has_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    columns = {"user_id": [f"u{row}" for row in range(5000)], "item_id": ["i"] * 5000}
    write(path, columns, store_schema=False)
    size = pq.read_metadata(path).row_group(0).column(0).total_compressed_size
    with_claim(path, size, 2**40)
    with pytest.raises(InputError, match=r"a.parquet is damaged: its footer claims 1,099,511,\d+,\d+ b"):
        rows_of(tmp_path)


@pytest.mark.usefixtures("ray_local")
def test_many_interactions_are_read_as_few_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Data reads them, with folders above that would be columns, and with types that differ."""
    folder = tmp_path / "bucket=prod" / "item_id=all"
    kinds: list[Callable[[pa.Array], pa.Array]] = [
        lambda ratings: ratings.cast(pa.int64()),
        lambda ratings: pa.compute.subtract(ratings, 0.5),
        lambda ratings: ratings.cast(pa.decimal128(3, 1)),
    ]
    for number, change in enumerate(kinds):
        columns = {
            "user_id": [f"u{number}-{row}" for row in range(4)],
            "item_id": pa.array(["i0", "i1", "i2", "i3"]).dictionary_encode(),
            "rating": change(pa.array([5.0, 4.0, 5.0, 4.0])),
            "timestamp": list(TIMES.values())[number + 1].take(pa.array([0] * 4)),
            "note": [[1], ["x"], [True]][number] * 4,
        }
        write(folder / ("event=impression" if number == 2 else "event=rating") / f"{number}.parquet", columns)
    settings = InteractionSettings(path=str(folder), min_likes=0, hold_out=0.0)
    ids = np.array([f"i{number}" for number in range(4)])
    few = build_histories(settings, ids, str(tmp_path / "few"))
    monkeypatch.setattr(histories_module, "ROWS_PER_BUCKET", 2)
    many = build_histories(settings, ids, str(tmp_path / "many"))
    assert few.num_users == many.num_users == 8
    columns = ["user_id", "num_likes", "history_digest", "item_index", "like", "timestamp"]
    tables = [read_table(built.uri, "histories", columns).sort_by("user_id") for built in (few, many)]
    assert tables[0].equals(tables[1])
    assert tables[0]["num_likes"].to_pylist() == [1, 1, 1, 1, 1, 0, 1, 0]


def test_an_empty_file_has_no_types(tmp_path: Path) -> None:
    """Some writers leave one for each worker that had nothing to write."""
    write(tmp_path / "a.parquet", {name: pa.nulls(0) for name in RATED})
    write(tmp_path / "b.parquet", RATED)
    assert rows_of(tmp_path) == [{name: value[0] for name, value in RATED.items()}]
