"""Crashes and servers that cannot swap: nothing stays for ever, and nothing is lost by a power cut."""

import os
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from s3fs import S3FileSystem

from rebeca_ray.catalog.lease import hold_lease
from rebeca_ray.catalog.pointer import Pointer
from rebeca_ray.errors import InputError
from rebeca_ray.storage.filesystem import list_files, open_filesystem
from rebeca_ray.storage.leftovers import leftovers, remove_leftovers
from rebeca_ray.storage.local import partial_of
from rebeca_ray.storage.objects import write_json
from rebeca_ray.storage.parquet import write_table
from rebeca_ray.storage.swap_probe import require_swaps
from rebeca_ray.storage.writable import require_new_parquet
from tests.conftest import without_id

TABLE = pa.table({"user_id": ["a"]})
LONG_AGO = datetime.now(UTC) - timedelta(days=3)
SOON = datetime.now(UTC) + timedelta(hours=1)


@pytest.fixture(params=["s3", "gcs"])
def careless_root(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return a root in a store that ignores the conditions of a write."""
    if request.param == "gcs":
        root = str(request.getfixturevalue("gcs"))
        monkeypatch.setattr(request.getfixturevalue("gcs_server"), "ignores_conditions", True)
        return root
    for name, value in request.getfixturevalue("s3_server").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(S3FileSystem, "_cache", {})
    pipe = S3FileSystem._pipe_file

    async def careless(self: S3FileSystem, path: str, data: bytes, **options: Any) -> Any:
        for condition in ("IfMatch", "IfNoneMatch"):
            options.pop(condition, None)
        return await pipe(self, path, data, **options)

    monkeypatch.setattr(S3FileSystem, "_pipe_file", careless)
    return f"s3://rebeca/careless-{os.urandom(4).hex()}"


def test_a_store_that_ignores_conditions_gets_no_lease(careless_root: str) -> None:
    with (
        pytest.raises(InputError, match=rf"^catalog {careless_root}: its store ignores .*If-Match.*; use S3"),
        hold_lease(careless_root, "run", 60),
    ):
        raise AssertionError("held")
    assert {*list_files(careless_root)} <= {careless_root}  # SeaweedFS keeps the folder for a while


def test_the_proof_leaves_nothing_behind_and_is_made_once(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    require_swaps.cache_clear()
    with hold_lease(root, "run", 60):
        pass
    assert list_files(root, ".json") == [f"{root}/latest.json"]
    assert [file for file in list_files(root) if "probe" in file] == []
    monkeypatch.setattr("rebeca_ray.storage.swap_probe.open_store", None)  # another proof would fail
    with hold_lease(root, "run", 60):
        pass
    assert without_id(root) == Pointer(fencing_token=2)


def test_leftovers_are_old_files_with_a_name_of_ours(tmp_path: Path) -> None:
    root = str(tmp_path)
    write_json({}, f"{root}/latest.json")
    write_table(TABLE, f"{root}/images/run_id=1/a.parquet", row_group_size=10)
    write_json({}, f"{root}/images/notes.partial-plan.json")
    dead = partial_of(tmp_path / "images" / "run_id=1" / "b.parquet")
    assert dead != partial_of(tmp_path / "images" / "run_id=1" / "b.parquet")
    for path in (dead, tmp_path / ".swap-probe-00ff"):
        path.write_bytes(b"half")
    assert leftovers(root, LONG_AGO) == []
    assert leftovers(root, SOON) == sorted([f"{root}/.swap-probe-00ff", str(dead)])
    os.utime(dead, (0, 0))
    remove_leftovers(root, LONG_AGO)
    assert leftovers(root, SOON) == [f"{root}/.swap-probe-00ff"]
    remove_leftovers(root, SOON)
    assert [path.name for path in sorted(tmp_path.rglob("*")) if path.is_file()] == [
        "notes.partial-plan.json",
        "a.parquet",
        "latest.json",
    ]
    remove_leftovers(f"{root}/nowhere", SOON)


def test_the_partial_files_of_one_output_go_before_it_is_written_again(tmp_path: Path) -> None:
    out = tmp_path / "atlas.parquet"
    dead, other, alive = partial_of(out), partial_of(tmp_path / "other.atlas.parquet"), partial_of(out)
    for path in (dead, other, alive):
        path.write_bytes(b"half")
    for path in (dead, other):
        os.utime(path, (0, 0))
    require_new_parquet(str(out))
    assert {*tmp_path.iterdir()} == {other, alive}


@pytest.fixture
def s3_root(s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(S3FileSystem, "_cache", {})
    return f"s3://rebeca/uploads-{os.urandom(4).hex()}"


def test_old_uploads_are_aborted_those_of_neighbours_stay(s3_root: str) -> None:
    filesystem, path = open_filesystem(s3_root)
    keys = [f"{path}/a.parquet".removeprefix("rebeca/"), f"{path}2/b.parquet".removeprefix("rebeca/")]
    for key in keys:
        filesystem.call_s3("create_multipart_upload", Bucket="rebeca", Key=key)

    def uploads() -> list[str]:
        known = filesystem.list_multipart_uploads("rebeca")
        return sorted(upload["Key"] for upload in known if upload["Key"] in keys)

    remove_leftovers(s3_root, LONG_AGO)
    assert uploads() == sorted(keys)
    remove_leftovers(s3_root, SOON)
    assert uploads() == [keys[1]]


def test_old_probes_on_a_store_are_removed(s3_root: str) -> None:
    write_json({}, f"{s3_root}/.swap-probe-1")
    write_json({}, f"{s3_root}/latest.json")
    assert leftovers(s3_root, LONG_AGO) == []
    remove_leftovers(s3_root, SOON)
    assert list_files(s3_root) == [f"{s3_root}/latest.json"]


@pytest.mark.parametrize("kind", ["table", "json"])
def test_a_file_is_synced_before_its_name_and_the_name_before_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    steps: list[tuple[str, int]] = []
    fsync, replace = os.fsync, Path.replace

    def record_sync(descriptor: int) -> None:
        steps.append(("sync", os.fstat(descriptor).st_ino))
        fsync(descriptor)

    def record_rename(path: Path, target: Any) -> Path:
        steps.append(("rename", path.stat().st_ino))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(Path, "replace", record_rename)
    target = tmp_path / "new" / "folder" / "a"
    if kind == "table":
        write_table(TABLE, str(target), row_group_size=10)
    else:
        write_json({}, str(target))
    file, folder = target.stat().st_ino, target.parent.stat().st_ino
    parents = [("sync", path.stat().st_ino) for path in (tmp_path / "new", tmp_path)]
    assert steps == [*parents, ("sync", file), ("rename", file), ("sync", folder)]


def test_files_and_folders_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_json({}, f"{tmp_path}/a/one.json")
        write_table(TABLE, f"{tmp_path}/a/b/two.parquet", row_group_size=10)
    finally:
        os.umask(before)
    modes = {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in tmp_path.rglob("*")}
    assert modes == {"a": "0o750", "b": "0o750", "one.json": "0o640", "two.parquet": "0o640"}
