"""The published snapshot as Iceberg tables, in a SQLite catalog."""

import os
import re
import sqlite3
import uuid
from errno import ENOSPC
from pathlib import Path
from unittest.mock import Mock

import pytest
from pyiceberg.exceptions import CommitFailedException, ValidationException
from sqlalchemy.exc import OperationalError

from rebeca_ray.catalog.exports import iceberg
from rebeca_ray.catalog.exports.iceberg import open_iceberg, register_snapshot
from rebeca_ray.catalog.read import Snapshot
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.errors import ResumableError, UserError
from rebeca_ray.schemas import TABLES
from tests.conftest import USERS
from tests.generation.test_nights import change_digest, night


def test_an_iceberg_table_without_its_metadata_is_no_damaged_catalog(
    config: GenerateConfig, tmp_path: Path
) -> None:
    database = {"catalog": f"sqlite:///{tmp_path}/iceberg.db", "warehouse": f"file://{tmp_path}/warehouse"}
    _, monday = night(config, USERS[:2])
    register_snapshot(monday, **database)
    for lost in (tmp_path / "warehouse").rglob("snap-*.avro"):
        lost.unlink()
    change_digest(config, USERS[0])
    _, tuesday = night(config, USERS[:2], 1)
    with pytest.raises(UserError, match=r"iceberg sqlite:.*: cannot be used \(.*snap-.*avro.*\)"):
        register_snapshot(tuesday, **database)
    Path(monday.root, tuesday.paths("items")[0]).unlink()
    other = {"catalog": f"sqlite:///{tmp_path}/other.db", "warehouse": f"file://{tmp_path}/other"}
    with pytest.raises(
        UserError,
        match=r"catalog .*: run .*missing or damaged .*; `rebeca catalog verify` names every such file",
    ):
        register_snapshot(tuesday, **other)


def test_iceberg_ends_with_one_line_when_another_writer_commits_or_its_disk_fails(
    config: GenerateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = {"catalog": f"sqlite:///{tmp_path}/iceberg.db", "warehouse": f"file://{tmp_path}/warehouse"}
    _, monday = night(config, USERS[:2])
    full = sqlite3.OperationalError("database or disk is full")
    full.sqlite_errorname = "SQLITE_FULL"
    for error, line in (
        (CommitFailedException("too late"), "rebeca was changed by another writer (too late); run it again"),
        (ValidationException("added"), "rebeca was changed by another writer (added); run it again"),
        (OSError(ENOSPC, "No space left"), "cannot be used (No space left)"),
        (OperationalError("COMMIT", {}, full), "cannot be used ((sqlite3.OperationalError) database or disk"),
    ):
        monkeypatch.setattr(iceberg, "bring_to", Mock(side_effect=error))
        with pytest.raises(ResumableError, match=f"^iceberg {database['catalog']}: {re.escape(line)}"):
            register_snapshot(monday, **database)


def test_orphans_of_an_iceberg_table_go_after_an_hour_and_its_files_stay(
    config: GenerateConfig, tmp_path: Path
) -> None:
    database = {"catalog": f"sqlite:///{tmp_path}/iceberg.db", "warehouse": f"file://{tmp_path}/warehouse"}
    _, monday = night(config, USERS[:2])
    register_snapshot(monday, **database)
    folder = tmp_path / "warehouse" / "rebeca" / "items" / "metadata"
    needed = {*folder.iterdir()}
    ident = uuid.uuid4()
    orphans = {
        folder / name
        for name in (f"00001-{ident}.metadata.json", f"{ident}-m0.avro", f"snap-77-0-{ident}.avro")
    }
    others = {folder / name for name in ("notes.avro", f"{ident}.puffin")}
    for path in orphans | others:
        path.write_bytes(b"")
    register_snapshot(monday, **database)  # while their writer may still be at work
    assert {*folder.iterdir()} == needed | orphans | others
    for path in folder.iterdir():
        os.utime(path, (0, 0))
    register_snapshot(monday, **database)
    assert {*folder.iterdir()} == needed | others
    assert open_iceberg(**database).load_table("rebeca.items").scan().to_arrow().num_rows == 6


def test_iceberg_tables_are_the_snapshots_files_and_follow_it(
    on_store: GenerateConfig, tmp_path: Path
) -> None:
    database = {"catalog": f"sqlite:///{tmp_path}/iceberg.db", "warehouse": f"file://{tmp_path}/warehouse"}

    def assert_same(snapshot: Snapshot) -> None:
        tables = open_iceberg(**database)
        for name in TABLES:
            rows = tables.load_table(f"rebeca.{name}").scan().to_arrow()
            expected = snapshot.table(name)
            assert rows.column_names == expected.column_names
            key = [(column, "ascending") for column in expected.column_names if column.endswith("_id")]
            assert rows.sort_by(key).to_pylist() == expected.sort_by(key).to_pylist()

    _, monday = night(on_store, USERS[:4])
    assert register_snapshot(monday, **database) == {
        "items": (1, 0),
        "images": (1, 0),
        "users": (1, 0),
        "errors": (0, 0),
        "changes": (1, 0),
    }
    assert_same(monday)
    assert set(register_snapshot(monday, **database).values()) == {(0, 0)}
    # The second time leaves no metadata behind.
    assert len(list((tmp_path / "warehouse").rglob("*.metadata.json"))) <= 2 * len(TABLES)
    commits = len(open_iceberg(**database).load_table("rebeca.items").history())
    change_digest(on_store, USERS[0])
    _, tuesday = night(on_store, USERS[:4], 1)
    assert register_snapshot(tuesday, **database)["items"] == (1, 1)
    assert_same(tuesday)
    _, wednesday = night(on_store, USERS[:4], 2)
    register_snapshot(wednesday, **database)
    assert_same(wednesday)
    assert set(register_snapshot(wednesday, **database).values()) == {(0, 0)}
    assert len(open_iceberg(**database).load_table("rebeca.items").history()) > commits
    register_snapshot(tuesday, **database)  # and back
    assert_same(tuesday)
    with pytest.raises(UserError, match="cannot be used .*; give a database as sqlite:////absolute/path.db"):
        register_snapshot(monday, "sqlite:////nowhere/at/all.db", database["warehouse"])
    for catalog, warehouse in (
        ("nonsense", database["warehouse"]),
        (f"sqlite:///{tmp_path}/other.db", "gopher://here"),
    ):
        with pytest.raises(
            UserError,
            match=r"iceberg .*: cannot be used .*, "
            r"and a warehouse as file:///absolute/path or s3://bucket/prefix",
        ):
            register_snapshot(monday, catalog, warehouse)
    with pytest.raises(
        UserError, match=r"psycopg is not installed; pip install 'rebeca-ray\[iceberg\]' \(and the driver\)"
    ):
        register_snapshot(monday, "postgresql://nobody@127.0.0.1/nothing", database["warehouse"])
