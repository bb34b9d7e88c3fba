"""A reader's errors for a catalog that is missing, of another version, damaged, or out of reach."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from botocore.exceptions import EndpointConnectionError
from fsspec.implementations.local import LocalFileSystem

from rebeca_ray import schemas
from rebeca_ray.catalog import row_groups
from rebeca_ray.catalog.read import Snapshot, read_catalog
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.errors import StorageError, UserError
from rebeca_ray.identity import bucket_of
from tests.catalog.large import BUCKETS, write_snapshot
from tests.conftest import USERS
from tests.generation.test_nights import night


def test_a_missing_catalog_and_one_of_another_version_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="nothing is published there; give another root, .*`rebeca catalog list` shows"
    ):
        read_catalog(str(tmp_path / "nowhere"))
    for root, reason in (
        ("", "its root is empty"),
        (None, "its root is empty"),
        ("s3:/bucket/catalog", "s3:/bucket/catalog.*: is no address"),
    ):
        with pytest.raises(UserError, match=reason):
            read_catalog(root)  # type: ignore[arg-type]
    newer = write_snapshot(tmp_path / "newer", rows_per_group=100, version=schemas.SCHEMA_VERSION + 1)
    version = schemas.SCHEMA_VERSION
    with pytest.raises(
        UserError, match=rf"schema version {version + 1}, this version reads {version}; upgrade rebeca-ray"
    ):
        read_catalog(newer)
    older = write_snapshot(tmp_path / "older", rows_per_group=100, version=2)
    with pytest.raises(
        UserError,
        match="schema version 2, older than this version reads: 3 to 4; generate into another root",
    ):
        read_catalog(older)


@pytest.mark.parametrize("damage", ["truncated", "missing", "one bit", "no parquet"])
def test_a_damaged_file_is_named_with_the_remedy(large: Snapshot, damage: str) -> None:
    user = "üser-007"
    path = Path(large.root, large.paths("items", {bucket_of(user, BUCKETS)})[0])
    whole = path.read_bytes()
    data = bytearray(whole)
    metadata = pq.read_metadata(path)
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "no parquet":
        path.write_bytes(b"x" * len(data))
    else:  # in the middle of every page of embeddings: no codec notices that
        for group in range(metadata.num_row_groups):
            column = metadata.row_group(group).column(3)
            data[column.data_page_offset + column.total_compressed_size // 2] ^= 1
        path.write_bytes(data)
    row_groups.footer_bytes.cache_clear()
    for read in (lambda: large.for_user(user), lambda: large.items(), lambda: large.to_pandas()):
        with pytest.raises(
            UserError,
            match=r"run large: .*is missing or damaged \(.*\); `rebeca catalog verify` names every such file",
        ):
            read()
    for read in (
        lambda: large.for_user(user),
        large.items,
        lambda: large.bucket("items", bucket_of(user, BUCKETS), BUCKETS),
    ):
        with pytest.raises(UserError, match=str(path.relative_to(large.root))):
            read()
    path.write_bytes(whole)
    assert large.for_user(user).num_rows == 4  # the restored file is read, also by a reader that failed on it


@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_a_damaged_file_list_is_named(large: Snapshot, damage: str) -> None:
    listing = Path(large.root, large.manifest.files.path)
    if damage == "missing":
        listing.unlink()
    else:
        listing.write_bytes(listing.read_bytes() + b"x")
    with pytest.raises(
        UserError,
        match=r"the file list of snapshot .* is missing or damaged \(.*\); restore it, or publish another",
    ):
        read_catalog(large.root)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("embed_dim", None, "Input should be a valid integer"),
        ("embed_dim", "64", "Input should be a valid integer"),
        ("num_buckets", 0, "Input should be greater than 0"),
        ("num_buckets", -3, "Input should be greater than 0"),
        ("created_at", "soon", "Value error, Invalid isoformat string: 'soon'"),
        ("created_at", "2026-01-01T00:00:00", "Value error, has no time zone"),
        ("previous_path", 7, "Input should be a valid string"),
        ("run_id", ..., "Field required"),
        ("files", ..., "Field required"),
    ],
)
def test_a_damaged_manifest_is_refused_by_its_field(
    large: Snapshot, name: str, value: Any, reason: str
) -> None:
    manifest = Path(large.root, large.path, "manifest.json")
    values = json.loads(manifest.read_text()) | {name: value}
    manifest.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))
    remedy = (
        "restore it, or publish another snapshot with `rebeca catalog publish` "
        "and remove snapshots/.*/manifest.json"
    )
    with pytest.raises(UserError, match=f"the manifest of snapshot .*: {name}: {reason}; {remedy}"):
        read_catalog(large.root)
    values["schema_version"] = "3"
    manifest.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))
    with pytest.raises(UserError, match=r"manifest.json tells no schema_version: this is no catalog"):
        read_catalog(large.root)


def test_a_missing_image_file_is_named(config: GenerateConfig) -> None:
    _, snapshot = night(config, USERS[:2])
    Path(snapshot.root, snapshot.paths("images")[0]).unlink()
    row_groups.footer_bytes.cache_clear()
    with pytest.raises(UserError, match=r"images/run_id=.* is missing or damaged \(.*"):
        snapshot.images(snapshot.items())


def test_an_unreachable_store_is_no_damaged_file(large: Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise EndpointConnectionError(endpoint_url="http://store")

    monkeypatch.setattr(LocalFileSystem, "open", unreachable)
    row_groups.footer_bytes.cache_clear()
    with pytest.raises(
        StorageError,
        match=r"cannot be read \(Could not connect to the endpoint.*\); "
        r"check the network and the credentials",
    ):
        large.for_user("üser-007")


def test_an_error_answer_of_s3_is_no_damaged_file(large: Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrow's client raises an OSError without a number, as for a damaged file."""
    message = (
        "When reading information for key 'items' in bucket 'rebeca': "
        "AWS Error SLOW_DOWN during HeadObject operation"
    )

    def busy(*_: Any) -> None:
        raise OSError(message)

    monkeypatch.setattr(Snapshot, "dataset_of", busy)
    with pytest.raises(
        StorageError,
        match=r"cannot be read \(.*AWS Error SLOW_DOWN.*\); check the network and the credentials",
    ):
        large.items()
