"""Snapshots of every version of the format that was ever released, read for ever.

A new version needs golden files of its own: the test that makes them anew leaves them here where there are none, and fails, once.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from rebeca_ray import schemas
from rebeca_ray.catalog.read import TABLES, Snapshot, read_catalog
from rebeca_ray.catalog.verify import verify
from rebeca_ray.config.jobs import GenerateConfig
from tests.conftest import USERS, D, assembled, prepare, publish, snapshot_of
from tests.generation.test_nights import change_digest, request_for

GOLDEN = Path(__file__).parent / "golden"
VERSIONS = range(schemas.OLDEST_SCHEMA_VERSION, schemas.SCHEMA_VERSION + 1)


def test_this_version_has_golden_files_and_they_can_be_made_anew(
    config: GenerateConfig, tmp_path: Path
) -> None:
    made = tmp_path / f"v{schemas.SCHEMA_VERSION}"
    write_golden_files(config, made)
    assert_read_as_written(made, schemas.SCHEMA_VERSION)
    if not (GOLDEN / made.name).exists():
        shutil.copytree(made, GOLDEN / made.name)
        pytest.fail(
            f"version {schemas.SCHEMA_VERSION} had no golden files; {GOLDEN / made.name} holds some now: look at them, commit them"
        )


def write_golden_files(config: GenerateConfig, folder: Path) -> None:
    """The second night of a small catalog, with something in every table."""
    snapshot_of(request_for(config, USERS[:4]))
    change_digest(config, USERS[1])
    prepared = prepare(request_for(config, [*USERS[1:5], "stranger"], 1), break_first=True)
    assembled(config, prepared, requested=15, error_budget=0.1)
    publish(config.catalog, prepared.run)
    shutil.copytree(config.catalog, folder, ignore=shutil.ignore_patterns("work", ".latest.lock"))
    snapshot = read_catalog(str(folder))
    shutil.rmtree(folder / str(snapshot.manifest.previous_path))  # of the night before only images are needed
    expected = {"rows": rows_of(snapshot), "images": image_hashes(snapshot)}
    (folder / "expected.json").write_text(json.dumps(expected, indent=1, sort_keys=True) + "\n")


def rows_of(snapshot: Snapshot) -> dict[str, list[dict[str, Any]]]:
    """Every row of every table as JSON can say it; of bytes a hash."""
    return {
        name: json.loads(json.dumps(snapshot.table(name).to_pylist(), default=as_json)) for name in TABLES
    }


def as_json(value: Any) -> str:
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else str(value.isoformat())


def image_hashes(snapshot: Snapshot) -> list[str]:
    return [hashlib.sha256(image).hexdigest() for image in snapshot.images(snapshot.items())]


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_is_read_as_it_was_written(version: int) -> None:
    assert_read_as_written(GOLDEN / f"v{version}", version)


def assert_read_as_written(folder: Path, version: int) -> None:
    snapshot = read_catalog(str(folder))
    expected = json.loads((folder / "expected.json").read_text())
    assert snapshot.manifest.schema_version == version
    rows = rows_of(snapshot)
    for name in TABLES:
        assert len(rows[name]) == len(expected["rows"][name]) > 0
        for row, was in zip(rows[name], expected["rows"][name], strict=True):
            renamed = dict(zip(current_names(was, version), was.values(), strict=True))
            assert {column: row[column] for column in renamed} == renamed
    assert image_hashes(snapshot) == expected["images"]
    user = rows["items"][-1]["user_id"]
    assert snapshot.for_user(user)["item_id"].to_pylist() == [
        row["item_id"] for row in expected["rows"]["items"] if row["user_id"] == user
    ]
    assert verify(snapshot, "full") == []


@pytest.mark.parametrize("version", VERSIONS)
def test_the_schema_has_only_grown(version: int) -> None:
    """Every column that was ever published is still there, of the same type, before those that came later."""
    snapshot = read_catalog(str(GOLDEN / f"v{version}"))
    assert snapshot.manifest.embed_dim == D
    for name in TABLES:
        was = pq.read_schema(snapshot.uris(name)[0])
        assert was.metadata[schemas.VERSION_KEY.encode()] == str(version).encode()
        now = schemas.table(name, D)
        names = current_names(was.names, version)
        assert [now.field(new) for new in names] == [
            field.with_name(new) for field, new in zip(was, names, strict=True)
        ]
        assert now.names[: len(was)] == names


def current_names(columns: Iterable[str], version: int) -> list[str]:
    """Return the names of today for columns of a version."""
    current = {old: new for new, old in schemas.VERSION_3_NAMES.items()} if version == 3 else {}
    return [current.get(column, column) for column in columns]
