"""Read snapshots of every released version of the format, for ever.

A new version needs new golden files. The first test writes them where they are missing, and then fails once.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from rebeca_ray import schemas
from rebeca_ray.catalog.read import Snapshot, read_catalog
from rebeca_ray.catalog.verify import verify
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.schemas import TABLES
from tests.catalog.conftest import Rows
from tests.conftest import USERS, D, assembled, prepare, publish, snapshot_of
from tests.generation.test_nights import change_digest, request_for

GOLDEN = Path(__file__).parent / "golden"
VERSIONS = range(schemas.OLDEST_SCHEMA_VERSION, schemas.SCHEMA_VERSION + 1)
CURRENT_NAMES = {old: new for new, old in schemas.VERSION_3_NAMES.items()}  # of `users`, in version 3


def test_this_version_has_golden_files_and_can_write_new_ones(config: GenerateConfig, tmp_path: Path) -> None:
    folder = tmp_path / f"v{schemas.SCHEMA_VERSION}"
    write_golden_files(config, folder)
    assert_reads_as_written(folder, schemas.SCHEMA_VERSION)
    if not (GOLDEN / folder.name).exists():
        shutil.copytree(folder, GOLDEN / folder.name)
        pytest.fail(
            f"version {schemas.SCHEMA_VERSION} had no golden files; "
            f"this test wrote {GOLDEN / folder.name}: look at the files and commit them"
        )


def write_golden_files(config: GenerateConfig, folder: Path) -> None:
    """Write the second night of a small catalog, with rows in every table."""
    snapshot_of(request_for(config, USERS[:4]))
    change_digest(config, USERS[1])
    tonight = request_for(config, [*USERS[1:5], "stranger"], 1)
    prepared = prepare(tonight, break_first=True)
    assert assembled(tonight, prepared, error_budget=0.1).counts.requested == 15
    publish(config.catalog, prepared.run)
    shutil.copytree(config.catalog, folder, ignore=shutil.ignore_patterns("work", ".latest.lock"))
    snapshot = read_catalog(str(folder))
    shutil.rmtree(folder / str(snapshot.manifest.previous_path))  # the images of that night are enough
    expected = {"rows": rows_of(snapshot), "images": image_hashes(snapshot)}
    (folder / "expected.json").write_text(json.dumps(expected, indent=1, sort_keys=True) + "\n")


def rows_of(snapshot: Snapshot) -> dict[str, Rows]:
    """Return every row of every table as JSON values, with a hash for bytes."""
    tables = {name: snapshot.table(name).to_pylist() for name in TABLES}
    rows: dict[str, Rows] = json.loads(json.dumps(tables, default=as_text))
    return rows


def as_text(value: Any) -> str:
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else str(value.isoformat())


def image_hashes(snapshot: Snapshot) -> list[str]:
    return [hashlib.sha256(image).hexdigest() for image in snapshot.images(snapshot.items())]


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_reads_as_it_was_written(version: int) -> None:
    assert_reads_as_written(GOLDEN / f"v{version}", version)


def current_name(table: str, column: str, version: int) -> str:
    """Return the current name of a column of some version."""
    return CURRENT_NAMES.get(column, column) if version == 3 and table == "users" else column


def assert_reads_as_written(folder: Path, version: int) -> None:
    snapshot = read_catalog(str(folder))
    expected = json.loads((folder / "expected.json").read_text())
    assert snapshot.manifest.schema_version == version
    rows = rows_of(snapshot)
    for name in TABLES:
        assert len(rows[name]) == len(expected["rows"][name]) > 0
        for row, was in zip(rows[name], expected["rows"][name], strict=True):
            assert {column: row[current_name(name, column, version)] for column in was} == was
    assert image_hashes(snapshot) == expected["images"]
    user = rows["items"][-1]["user_id"]
    assert snapshot.for_user(user)["item_id"].to_pylist() == [
        row["item_id"] for row in expected["rows"]["items"] if row["user_id"] == user
    ]
    assert verify(snapshot, "full") == []


@pytest.mark.parametrize("version", VERSIONS)
def test_the_schema_has_only_grown(version: int) -> None:
    """Published columns keep their place and type, and later ones follow. Version 4 renamed a few."""
    snapshot = read_catalog(str(GOLDEN / f"v{version}"))
    assert snapshot.manifest.embed_dim == D
    for name in TABLES:
        was = pq.read_schema(snapshot.uris(name)[0])
        assert was.metadata[schemas.VERSION_KEY.encode()] == str(version).encode()
        names = [current_name(name, column, version) for column in was.names]
        now = schemas.table(name, D)
        renamed = [field.with_name(column) for field, column in zip(was, names, strict=True)]
        assert [now.field(column) for column in names] == renamed
        assert now.names[: len(was)] == names
