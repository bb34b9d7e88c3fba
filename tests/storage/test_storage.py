"""Tables and objects on a disk and on a real S3 server: reads return the written bytes."""

from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from s3fs import S3FileSystem

from rebeca_ray.catalog.pointer import read_pointer
from rebeca_ray.data.validation import check_columns
from rebeca_ray.errors import UserError
from rebeca_ray.schemas import INTERACTIONS
from rebeca_ray.storage.objects import HashingSink, read_json, write_json
from rebeca_ray.storage.parquet import open_parquet, read_table, write_table


def test_tables_on_s3(s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    root = "s3://rebeca/storage"
    table = pa.table({"user_id": ["a", "b"], "rank": [0, 1]})
    written = write_table(table, f"{root}/items/part.parquet", row_group_size=10)
    assert written["rows"] == 2
    assert written["bytes"] == fsspec.filesystem("s3").info("rebeca/storage/items/part.parquet")["size"]
    assert read_table(f"{root}/items", "items").equals(table)
    write_json({"a": 1}, f"{root}/one.json")
    assert read_json(f"{root}/one.json") == {"a": 1}
    assert read_json(f"{root}/none.json") is None


def test_s3_without_credentials_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(S3FileSystem, "_cache", {})
    with pytest.raises(
        UserError, match=r"catalog s3://bucket/catalog: cannot be read \(.*check the path and the credentials"
    ):
        read_pointer("s3://bucket/catalog")


def test_a_failed_write_leaves_nothing_and_says_why(tmp_path: Path) -> None:
    def write_half() -> None:
        with HashingSink(fsspec.filesystem("file"), str(tmp_path / "a.parquet")) as sink:
            sink.write(b"half")
            raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_half()
    assert list(tmp_path.iterdir()) == []


def test_other_users_can_read_the_files(tmp_path: Path) -> None:
    """A pointer readable by its writer alone would hide the catalog from the ranking service."""
    (tmp_path / "plain").write_text("")
    write_json({}, str(tmp_path / "latest.json"))
    assert (tmp_path / "latest.json").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_files_of_a_folder_must_have_the_same_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"user_id": ["a"], "item_id": ["i"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"user_id": ["b"], "item_id": ["i"], "rating": [1.0]}), tmp_path / "b.parquet")
    with pytest.raises(
        UserError,
        match=r"b.parquet and a.parquet differ in their columns \(rating\); write all files with the same",
    ):
        check_columns(open_parquet(str(tmp_path), "interactions"), INTERACTIONS)
    (tmp_path / "b.parquet").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"interactions .*: b.parquet is not a readable Parquet file"):
        open_parquet(str(tmp_path), "interactions")
