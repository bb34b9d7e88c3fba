"""Version 3 beside version 4: its files keep their column names, and what is built on them goes on."""

import json
import shutil
from pathlib import Path

import pytest

from rebeca_ray import schemas
from rebeca_ray.catalog.exports.iceberg import open_iceberg, register_snapshot
from rebeca_ray.catalog.gc import collect
from rebeca_ray.catalog.read import Snapshot, read_catalog
from rebeca_ray.catalog.snapshots import find_snapshot, list_snapshots
from rebeca_ray.errors import InputError

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def versions() -> dict[int, Snapshot]:
    return {version: read_catalog(str(GOLDEN / f"v{version}")) for version in (3, schemas.SCHEMA_VERSION)}


@pytest.mark.parametrize("order", [(3, 4, 3), (4, 3)])
def test_iceberg_tables_follow_a_catalog_from_version_to_version(
    versions: dict[int, Snapshot], tmp_path: Path, order: tuple[int, ...]
) -> None:
    database = {"catalog": f"sqlite:///{tmp_path}/iceberg.db", "warehouse": f"file://{tmp_path}/warehouse"}
    for version in order:
        snapshot = versions[version]
        assert register_snapshot(snapshot, **database)["users"][0] == 1
        table = open_iceberg(**database).load_table("rebeca.users")
        names = snapshot.stored_schema("users").names
        assert table.schema().column_names == names
        rows = snapshot.renamed("users", table.scan().to_arrow().select(names)).sort_by("user_id")
        assert rows.to_pylist() == snapshot.table("users").sort_by("user_id").to_pylist()


def test_a_snapshot_that_cannot_be_read_hides_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = str(shutil.copytree(GOLDEN / "v4", tmp_path / "catalog"))
    published = read_catalog(root)
    older = Path(root, "snapshots", "run_date=2020-01-01", "run_id=older", "manifest.json")
    older.parent.mkdir(parents=True)
    older.write_text(json.dumps({"schema_version": 2, "run_id": "older"}))
    assert [manifest.run_id for manifest in list_snapshots(root)] == [published.run_id]
    assert "schema version 2, older than" in caplog.text
    assert find_snapshot(root, published.run_id).run_id == published.run_id
    with pytest.raises(InputError, match="schema version 2, older than"):
        find_snapshot(root, "older")
    caplog.clear()
    assert collect(root, keep=1, grace_hours=0).files == []  # nobody knows what it needs
    assert "its files stay, remove or restore" in caplog.text
    assert older.exists()
