"""The reader matrix: one snapshot on a real S3 server, read in full by each common Parquet reader.

pyarrow is compared with the published rows, and every other reader with pyarrow, value by value.
"""

import datetime
import io
import math
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import fsspec
import numpy as np
import pandas as pd
import polars as pl
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from rebeca_ray import schemas
from rebeca_ray.catalog.read import Snapshot, read_catalog
from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.config.sections import LayoutSettings
from rebeca_ray.prior.selector import Selector
from rebeca_ray.schemas import TABLES
from tests.catalog.conftest import Rows
from tests.conftest import (
    USERS,
    D,
    assembled,
    generate_config,
    prepare,
    prior_users,
    publish,
    snapshot_of,
    write_tiny_prior,
)
from tests.generation.test_nights import change_digest, request_for

KEYS = {
    "items": ("user_id", "rank"),
    "images": ("item_id",),
    "users": ("user_id",),
    "errors": ("item_id",),
    "changes": ("item_id", "user_id"),
}


class Published(NamedTuple):
    snapshot: Snapshot
    rows: dict[str, Rows]  # by table, as pyarrow reads them


@pytest.fixture(scope="module")
def published(
    tiny_decoder: DecoderSettings, ray_local: str, tmp_path_factory: pytest.TempPathFactory
) -> Published:
    """Return the second night of a catalog of two buckets.

    It has new and carried items, a failed item, users that joined and left, and a cold-start user.
    """
    folder = tmp_path_factory.mktemp("readers")
    torch.manual_seed(2)
    write_tiny_prior(folder, users=prior_users(USERS), selector=Selector(D, 4))
    prior = (folder / "prior").rename(folder / "prior-with-a-selector")
    config = generate_config(folder, tiny_decoder).model_copy(
        update={
            "prior": str(prior),
            "catalog": f"s3://rebeca/{folder.name}",
            "layout": LayoutSettings(num_buckets=2),
        }
    )
    snapshot_of(request_for(config, USERS[:6]))
    change_digest(config, USERS[2])
    tonight = request_for(config, [*USERS[1:], "cold-start"], 1)
    prepared = prepare(tonight, break_first=True)
    assert assembled(tonight, prepared, error_budget=0.2).counts.requested == 21
    publish(config.catalog, prepared.run)
    snapshot = read_catalog(config.catalog)
    return Published(snapshot, {name: ordered(name, snapshot.table(name).to_pylist()) for name in TABLES})


def ordered(name: str, rows: Rows) -> Rows:
    """Return rows as plain values, sorted by their keys."""
    return sorted(
        ({key: plain(value) for key, value in row.items()} for row in rows),
        key=lambda row: [row[key] for key in KEYS[name]],
    )


def plain(value: Any) -> Any:
    """Return a reader's value as a plain one: arrays as lists, times in UTC, NaN as None.

    Some readers have NaN in place of null.
    """
    if isinstance(value, np.ndarray | pl.Series):
        return [float(element) for element in value]
    if hasattr(value, "asDict"):  # a Spark row, which is a tuple too
        return {name: plain(element) for name, element in value.asDict().items()}
    if isinstance(value, list):
        return [float(element) for element in value]
    if isinstance(value, bytearray | memoryview):
        return bytes(value)
    if value is pd.NaT or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, pd.Timestamp):
        value = value.to_pydatetime()
    if isinstance(value, datetime.datetime):
        return value.astimezone(datetime.UTC) if value.tzinfo else value.replace(tzinfo=datetime.UTC)
    if isinstance(value, np.generic):
        return value.item()
    return value


def assert_same(published: Published, name: str, rows: Rows) -> None:
    actual, expected = ordered(name, rows), published.rows[name]
    assert list(actual[0]) == list(expected[0])
    assert actual == expected


def test_the_snapshot_has_rows_of_every_kind(published: Published) -> None:
    rows = published.rows
    assert {name: bool(rows[name]) for name in TABLES} == dict.fromkeys(TABLES, True)
    assert {row["origin"] for row in rows["items"]} == {"new", "carried", "population"}
    assert {row["change"] for row in rows["changes"]} >= {"added", "removed"}
    assert [row["image"] is None for row in rows["images"]].count(True) == len(rows["errors"]) == 1
    assert all(len(published.snapshot.paths(name)) > 1 for name in TABLES if name != "errors")
    for name in TABLES:
        for path in published.snapshot.uris(name):
            with fsspec.open(path) as file:
                metadata = pq.read_schema(file).metadata
            assert metadata[b"rebeca.schema_version"] == str(schemas.SCHEMA_VERSION).encode()


@pytest.mark.parametrize("name", TABLES)
def test_pyarrow(published: Published, name: str, s3_server: dict[str, str]) -> None:
    """Read the files by hand, without this package's reader."""
    filesystem = pyarrow.fs.S3FileSystem(
        access_key="test-key",
        secret_key=s3_server["AWS_SECRET_ACCESS_KEY"],
        endpoint_override=s3_server["AWS_ENDPOINT_URL"],
        region="us-east-1",
    )
    tables = [
        pq.read_table(uri.removeprefix("s3://"), filesystem=filesystem)
        for uri in published.snapshot.uris(name)
    ]
    schema = schemas.table(name, D)
    assert all(table.schema.remove_metadata().equals(schema.remove_metadata()) for table in tables)
    assert_same(published, name, [row for table in tables for row in table.to_pylist()])


@pytest.mark.parametrize("name", TABLES)
def test_duckdb_by_sql_over_the_file_list(published: Published, name: str) -> None:
    snapshot = published.snapshot
    with duckdb.connect() as connection:
        connection.register_filesystem(fsspec.filesystem("s3"))
        connection.execute("SET TimeZone = 'UTC'")
        listing = f"{snapshot.root}/{snapshot.manifest.files.path}"
        connection.execute(f"""
            SET VARIABLE files = (
                SELECT list('{snapshot.root}/' || path) FROM read_parquet('{listing}')
                WHERE "table" = '{name}'
            )
        """)
        rows = connection.execute(
            "SELECT * FROM read_parquet(getvariable('files'), hive_partitioning = false)"
        )
        assert_same(published, name, rows.to_arrow_table().to_pylist())


def test_duckdb_with_folders_as_columns_leaves_the_tables_columns_alone(published: Published) -> None:
    """DuckDB makes columns of `run_date=` and `run_id=`, and they hide table columns of the same name."""
    with duckdb.connect() as connection:
        connection.register_filesystem(fsspec.filesystem("s3"))
        for name in TABLES:
            files = str(published.snapshot.uris(name))
            columns = [
                row[0]
                for row in connection.execute(f"DESCRIBE SELECT * FROM read_parquet({files})").fetchall()
            ]
            assert not {"bucket", "run_date", "run_id"} & set(schemas.table(name, D).names)
            assert columns[: len(schemas.table(name, D))] == schemas.table(name, D).names


@pytest.mark.parametrize("name", TABLES)
def test_polars_with_its_native_client(published: Published, name: str, s3_server: dict[str, str]) -> None:
    options = {"aws_endpoint_url": s3_server["AWS_ENDPOINT_URL"], "aws_allow_http": "true"}
    table = pl.read_parquet(published.snapshot.uris(name), storage_options=options)
    assert_same(published, name, table.to_dicts())
    assert published.snapshot.to_polars(name).equals(table)


@pytest.mark.parametrize("name", TABLES)
def test_pandas(published: Published, name: str) -> None:
    table = pd.concat([pd.read_parquet(uri) for uri in published.snapshot.uris(name)])
    assert_same(published, name, table.to_dict("records"))
    assert_same(published, name, published.snapshot.to_pandas(name).to_dict("records"))


@pytest.mark.parametrize("name", TABLES)
def test_ray_data(published: Published, name: str) -> None:
    assert_same(published, name, published.snapshot.to_ray(name).take_all())
    columns = schemas.table(name, D).names[:2]
    assert published.snapshot.to_ray(name, columns).schema().names == columns
    if name == "items":
        some = published.snapshot.to_ray(name, ["item_id"], USERS[2:4]).take_all()
        expected = [row["item_id"] for row in published.rows[name] if row["user_id"] in USERS[2:4]]
        assert sorted(row["item_id"] for row in some) == sorted(expected)


@pytest.mark.parametrize("name", TABLES)
def test_hugging_face_datasets_decode_the_images(
    published: Published,
    name: str,
    tmp_path: Path,
    s3_server: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from datasets import load_dataset

    dataset = load_dataset(
        "parquet", data_files=published.snapshot.uris(name), split="train", cache_dir=str(tmp_path)
    )
    if name == "images":
        pictures = {row["item_id"]: row["image"] for row in dataset}
        for row in published.rows["images"]:
            picture = pictures[row["item_id"]]
            if row["image"] is None:
                assert picture is None
            else:
                assert np.array_equal(
                    np.asarray(picture), np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])))
                )
        from datasets import Image as Encoded

        dataset = dataset.cast_column("image", Encoded(decode=False))
    assert_same(published, name, list(dataset))


@pytest.fixture(scope="module")
def by_spark(published: Published, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Rows]:
    """Return the rows of every table as Spark reads them.

    Spark reads copies of the files, because its package lacks the S3 client hadoop-aws.
    """
    folder, filesystem = tmp_path_factory.mktemp("spark"), fsspec.filesystem("s3")
    names_and_files = []
    for name in TABLES:
        copies = [
            f"{folder}/{uri.removeprefix(published.snapshot.root)}" for uri in published.snapshot.uris(name)
        ]
        for uri, copy in zip(published.snapshot.uris(name), copies, strict=True):
            Path(copy).parent.mkdir(parents=True, exist_ok=True)
            filesystem.get_file(uri, copy)
        names_and_files += [name, ",".join(copies)]
    script = Path(__file__).with_name("read_with_spark.py")
    command = [sys.executable, script, folder / "rows", *names_and_files]
    subprocess.run(command, check=True, timeout=240)
    rows: dict[str, Rows] = pickle.loads((folder / "rows").read_bytes())
    return rows


@pytest.mark.skipif(
    not shutil.which("java"), reason="Spark needs a Java, 17 or newer: `java` is not on the PATH"
)
@pytest.mark.parametrize("name", TABLES)
def test_spark(published: Published, by_spark: dict[str, Rows], name: str) -> None:
    assert_same(published, name, by_spark[name])
