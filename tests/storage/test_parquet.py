"""Inputs are opened once: a counting file system sees every read of a footer."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from rebeca_ray import schemas
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.config.sections import InteractionSettings
from rebeca_ray.data.feedback import find_rated
from rebeca_ray.data.histories import build_histories
from rebeca_ray.data.items import read_image_embeds
from rebeca_ray.decoder.files import identify_decoder
from rebeca_ray.errors import InputError
from rebeca_ray.generation.request import check_request, input_digests
from rebeca_ray.generation.runs import describe_run
from rebeca_ray.storage import filesystem
from rebeca_ray.storage.listing import listed
from rebeca_ray.storage.parquet import open_parquet, read_table, write_table
from tests.conftest import USERS, D, snapshot_of


class FooterReads:
    """Counts the reads that reach the last byte of a file in some folder. A Parquet footer ends there."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.of_file: Counter[str] = Counter()
        opened = LocalFileSystem.open

        def counting(local: LocalFileSystem, path: str, mode: str = "rb", **options: Any) -> Any:
            file = opened(local, path, mode, **options)
            if mode != "rb" or folder not in Path(path).parents:
                return file
            read, size = file.f.read, Path(path).stat().st_size

            def counted(*count: int) -> bytes:
                data: bytes = read(*count)
                self.of_file[str(Path(path).relative_to(folder))] += file.f.tell() == size and data != b""
                return data

            file.read = counted
            return file

        monkeypatch.setattr(LocalFileSystem, "open", counting)
        # Arrow's own local file system would pass the counter by.
        monkeypatch.setattr(filesystem, "is_local", lambda _: False)


@pytest.fixture
def inputs(config: GenerateConfig, tmp_path: Path) -> GenerateConfig:
    """Write the inputs of a tiny run to one folder: items and interactions in two files each."""
    real, folder = pq.read_table(config.items), tmp_path / "inputs"
    rated = pa.table({"user_id": np.repeat(USERS[:4], 5), "item_id": np.tile(real["item_id"][:5], 4)})
    for name, table in (("items", real), ("interactions", rated)):
        (folder / name).mkdir(parents=True)
        pq.write_table(table.slice(0, 11), folder / name / "a.parquet")
        pq.write_table(table.slice(11), folder / name / "b.parquet")
    Path(config.request).rename(folder / "request.parquet")
    paths = {"items": f"{folder}/items", "request": f"{folder}/request.parquet"}
    interactions = InteractionSettings(path=f"{folder}/interactions")
    return config.model_copy(update={**paths, "interactions": interactions})


@pytest.fixture
def reads(inputs: GenerateConfig, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    return FooterReads(Path(inputs.request).parent, monkeypatch).of_file


RANK = pa.schema([("rank", pa.int64())])
ITEMS, INTERACTIONS = ({f"{name}/{file}.parquet": 1 for file in "ab"} for name in ("items", "interactions"))


def test_embedded_items_are_opened_once(inputs: GenerateConfig, reads: Counter[str]) -> None:
    assert read_image_embeds(str(inputs.items)).image_embeds.shape == (20, D)
    assert reads == ITEMS


def test_a_night_opens_each_input_once(inputs: GenerateConfig, reads: Counter[str]) -> None:
    """All that reads an input in the process of the driver, and the planning actor in the same process."""
    assert check_request(inputs, identify_decoder(inputs.decoder)) == 16
    describe_run(inputs, {}, None, input_digests(inputs))
    assert snapshot_of(inputs).counts.new == 16
    assert reads == {**ITEMS, **INTERACTIONS, "request.parquet": 1}


def test_histories_and_rated_items_open_the_interactions_once(
    inputs: GenerateConfig, reads: Counter[str], tmp_path: Path
) -> None:
    assert inputs.interactions is not None
    items = read_image_embeds(str(inputs.items))
    assert find_rated(inputs.catalog, inputs.interactions, items.item_id, D, None).num_rows == 0
    histories = build_histories(inputs.interactions, items.item_id, str(tmp_path / "storage"))
    assert histories.num_users == 4
    assert reads == {**ITEMS, **INTERACTIONS}


def test_an_input_is_read_whole_and_in_batches(tmp_path: Path) -> None:
    """Both give the columns in the order and the types that were asked for, whatever a file holds."""
    pq.write_table(
        pa.table({"user_id": ["a", "b"], "rating": pa.array([1, 2], pa.int64())}), tmp_path / "a.parquet"
    )
    column = pa.array(["c"]).dictionary_encode()
    pq.write_table(pa.table({"rating": pa.array([3], pa.int32()), "user_id": column}), tmp_path / "b.parquet")
    (tmp_path / "notes.txt").write_text("no table")
    table = open_parquet(str(tmp_path), "interactions")
    assert [file.name for file in table.files] == ["a.parquet", "b.parquet"]
    assert table.names == ["user_id", "rating"]
    assert table.num_rows == 3
    schema = pa.schema([("rating", pa.float64()), ("user_id", pa.string())])
    whole = pa.table({"rating": [1.0, 2.0, 3.0], "user_id": ["a", "b", "c"]}, schema=schema)
    assert table.read(schema).equals(whole)
    batches = list(table.batches(schema, 1))
    assert [batch.num_rows for batch in batches] == [1, 1, 1]
    assert pa.concat_tables(batches).equals(whole)
    with pytest.raises(
        InputError, match=r"interactions .*: column 'ratings' is missing; did you mean 'rating'\?"
    ):
        read_table(str(tmp_path), "interactions", ["ratings"])


def test_a_changed_file_is_read_anew(tmp_path: Path) -> None:
    """Also behind a symbolic link and with the same size."""
    path, link = tmp_path / "data" / "table.parquet", tmp_path / "link.parquet"
    path.parent.mkdir()
    link.symlink_to(path)
    digests = set()
    for values in ([1, 2], [3, 4], [5, 6, 7]):
        pq.write_table(pa.table({"rank": values}), path)
        for uri in (path, link):
            assert read_table(str(uri), "items")["rank"].to_pylist() == values
        digests.add(open_parquet(str(path), "items").digest())
    assert len(digests) == 3


def test_a_changed_object_is_read_anew(s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Within one second and with the same size only its ETag tells."""
    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    listings = set()
    for values in ([1, 2], [3, 4], [5, 6]):
        write_table(pa.table({"rank": values}), "s3://rebeca/changed/items.parquet", row_group_size=10)
        for uri in ("s3://rebeca/changed", "s3://rebeca/changed/items.parquet"):
            table = open_parquet(uri, "items")
            assert table.read(RANK)["rank"].to_pylist() == values
            assert open_parquet(uri, "items").headers is table.headers
            listings.add(table.listing)
    assert len(listings) == 3


def test_the_tables_of_a_run_displace_no_input(
    inputs: GenerateConfig, reads: Counter[str], tmp_path: Path
) -> None:
    open_parquet(str(inputs.items), "items")
    for number in range(20):
        pq.write_table(pa.table({"rank": [number]}), tmp_path / f"{number}.parquet")
        assert read_table(str(tmp_path / f"{number}.parquet"), "plan")["rank"].to_pylist() == [number]
    open_parquet(str(inputs.items), "items").read(schemas.embedded_items(D))
    assert reads == ITEMS


def test_a_later_file_may_hold_nulls_where_the_first_declares_none(tmp_path: Path) -> None:
    strict = pa.schema([pa.field("user_id", pa.string(), nullable=False)])
    pq.write_table(pa.table({"user_id": ["ann"]}, schema=strict), tmp_path / "a.parquet")
    pq.write_table(pa.table({"user_id": pa.array([None], pa.string())}), tmp_path / "b.parquet")
    assert read_table(str(tmp_path), "request")["user_id"].to_pylist() == ["ann", None]


@pytest.mark.parametrize(
    "names",
    [("mtime", "generation"), ("LastModified", "ETag"), ("last_modified", "etag")],
    ids=["gcsfs", "s3fs", "adlfs"],
)
def test_a_file_that_was_written_again_with_the_same_size_is_another_input(names: tuple[str, str]) -> None:
    changed, version = names
    store = AbstractFileSystem()
    before = listed(store, "bucket/a.parquet", {"size": 9, changed: "09:00", version: "1"})
    assert before != listed(store, "bucket/a.parquet", {"size": 9, changed: "09:00", version: "2"})
    later = listed(store, "bucket/a.parquet", {"size": 9, changed: "09:01", version: "1"})
    assert (before.changed, later.changed) == ("09:00", "09:01")
