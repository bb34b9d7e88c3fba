"""A faulty store: every write arrives once and complete, and a permanent outage ends with one line."""

import gc
import hashlib
import itertools
import random
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs
import pytest
from s3fs import S3FileSystem

from rebeca_ray.catalog.exports import image_objects, key_values
from rebeca_ray.catalog.exports.iceberg import register_snapshot
from rebeca_ray.catalog.gc import collect
from rebeca_ray.catalog.lease import hold_lease
from rebeca_ray.catalog.pointer import Pointer, change_pointer, read_pointer
from rebeca_ray.catalog.read import read_catalog
from rebeca_ray.catalog.verify import verify
from rebeca_ray.cli.runner import plain_errors
from rebeca_ray.errors import UserError
from rebeca_ray.ray_runtime import for_each_bucket
from rebeca_ray.storage.filesystem import delete, list_files, list_folders, open_filesystem
from rebeca_ray.storage.objects import HashingSink, read_json, write_json
from rebeca_ray.storage.parquet import read_table, write_table
from rebeca_ray.storage.swap_probe import require_swaps
from tests.catalog.large import write_snapshot
from tests.conftest import without_id
from tests.faulty_s3 import FAULTS, Fault, FaultyS3, forever, seeded

TABLE = pa.table({"user_id": [f"user-{number}" for number in range(1000)], "rank": list(range(1000))})
PART = 5 * 2**20  # bytes: the smallest part of a multipart upload on S3


@pytest.fixture
def root(proxy: FaultyS3, request: pytest.FixtureRequest) -> str:
    return f"s3://rebeca/faults/{hashlib.md5(request.node.name.encode()).hexdigest()}"


def faults(proxy: FaultyS3) -> list[Fault]:
    return [request.fault for request in proxy.requests if request.fault]


@pytest.mark.parametrize("fault", FAULTS)
def test_every_operation_survives_every_fault(proxy: FaultyS3, root: str, fault: Fault) -> None:
    """Each fault hits the first request, then the second one (if an operation has one)."""
    operations: list[tuple[Callable[[], Any], Any]] = [
        (lambda: write_table(TABLE, f"{root}/items/a.parquet", row_group_size=100)["rows"], 1000),
        (lambda: write_json({"a": 1}, f"{root}/one.json"), None),
        (lambda: read_json(f"{root}/one.json"), {"a": 1}),
        (lambda: read_json(f"{root}/none.json"), None),
        (lambda: read_table(f"{root}/items", "items").equals(TABLE), True),
        (lambda: list_files(root), [f"{root}/items/a.parquet", f"{root}/one.json"]),
        (lambda: list_files(f"{root}/items", ".json"), []),
        (lambda: list_folders(root), ["items"]),
        (lambda: delete(f"{root}/one.json"), None),
        (lambda: read_json(f"{root}/one.json"), None),
    ]
    for plan in ([fault], ["", fault]):
        hit = 0
        for operation, expected in operations:
            proxy.misbehave(plan)
            assert operation() == expected
            hit += fault in faults(proxy)
        assert hit >= 6


@pytest.mark.parametrize("seed", [0, 4])
def test_a_stream_of_faults_changes_no_file(proxy: FaultyS3, root: str, seed: int) -> None:
    proxy.misbehave(seeded(seed, share=0.3))
    for number in range(8):
        part = TABLE.slice(100 * number, 100)
        record = write_table(part, f"{root}/items/{number}.parquet", row_group_size=10)
        write_json({"file": number, **record}, f"{root}/records/{number}.json")
        assert read_json(f"{root}/records/{number}.json") == {"file": number, **record}
    delete(f"{root}/records/7.json")
    assert [name.removeprefix(root) for name in list_files(f"{root}/records")] == [
        f"/records/{number}.json" for number in range(7)
    ]
    assert read_table(f"{root}/items", "items").equals(TABLE.slice(0, 800))
    assert len({*faults(proxy)}) >= 5
    assert len(faults(proxy)) >= 10

    proxy.misbehave([])
    filesystem, path = open_filesystem(root)
    for number in range(7):
        data = filesystem.cat_file(f"{path}/items/{number}.parquet")
        record = read_json(f"{root}/records/{number}.json") or {}
        assert (record["bytes"], record["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())


@pytest.fixture
def big(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Return the three parts of a file, each with different content."""
    monkeypatch.setattr(S3FileSystem, "default_block_size", PART)
    return [random.Random(number).randbytes(size) for number, size in enumerate((PART, PART, 1000))]


def write_big(parts: list[bytes], root: str) -> dict[str, Any]:
    filesystem, path = open_filesystem(f"{root}/big")
    with HashingSink(filesystem, path) as sink:
        for part in parts:
            sink.write(part)
    return sink.record()


@pytest.mark.parametrize("fault", ["slow down", "lost", "cut", "gone"])
def test_a_multipart_upload_survives_a_fault(
    proxy: FaultyS3, root: str, big: list[bytes], fault: Fault
) -> None:
    for plan, step in (([fault], "?uploads"), (["", fault], "partNumber"), ([fault], "POST /rebeca/faults/")):
        proxy.misbehave(plan, step)
        assert write_big(big, root) == {
            "bytes": 2 * PART + 1000,
            "sha256": hashlib.sha256(b"".join(big)).hexdigest(),
        }
        assert faults(proxy) == [fault]
        filesystem, path = open_filesystem(f"{root}/big")
        assert filesystem.cat_file(path) == b"".join(big)
        delete(f"{root}/big")


@pytest.mark.parametrize("step", ["?uploads", "partNumber=2", "?uploadId"])
def test_a_failed_multipart_upload_leaves_nothing(
    proxy: FaultyS3, root: str, big: list[bytes], step: str
) -> None:
    filesystem, path = open_filesystem(f"{root}/big")
    proxy.misbehave(forever("error"), f"POST /{path}{step}" if step == "?uploadId" else step)
    with pytest.raises(
        UserError,
        match=rf"^{path}: cannot be written \(InternalError, by plan\); check the path, its free space",
    ):
        write_big(big, root)
    gc.collect()
    proxy.misbehave([])
    assert not filesystem.exists(path)
    assert [
        upload
        for upload in filesystem.list_multipart_uploads("rebeca")
        if upload["Key"] == path.removeprefix("rebeca/")
    ] == []


def test_an_error_before_close_leaves_no_file(proxy: FaultyS3, root: str) -> None:
    filesystem, path = open_filesystem(f"{root}/half")

    def write_half() -> None:
        with HashingSink(filesystem, path) as sink:
            sink.write(b"half")
            raise RuntimeError("unrelated")

    with pytest.raises(RuntimeError, match=r"^unrelated$"):
        write_half()
    gc.collect()
    assert not filesystem.exists(path)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("method", ["HEAD", "GET", "PUT"])
def test_a_fault_never_changes_the_pointer_twice(
    proxy: FaultyS3, root: str, fault: Fault, method: str
) -> None:
    for token in (1, 2):  # without a pointer, then with one
        plan: list[Fault] = [fault, "", fault]
        proxy.misbehave(plan, f"{method} /")
        changed = change_pointer(
            root, lambda pointer: replace(pointer, fencing_token=pointer.fencing_token + 1)
        )
        assert fault in faults(proxy)
        assert replace(changed, catalog_id=None) == without_id(root) == Pointer(fencing_token=token)


def test_a_lease_is_acquired_once_and_publishes_once(proxy: FaultyS3, root: str) -> None:
    for token in (1, 2, 3):
        proxy.misbehave(seeded(token, share=0.4))
        with hold_lease(root, f"run-{token}", 1.0) as lease:
            assert lease.fencing_token == token
            time.sleep(0.4)  # one or two heartbeats
            lease.check()
            lease.publish(run_id=f"run-{token}", run_date="2026-01-01", snapshot=f"snapshots/{token}")
        assert len(faults(proxy)) >= 3
        proxy.misbehave([])
        pointer, _ = read_pointer(root)
        assert [replaced["run_id"] for replaced in pointer.previously_published] == [
            f"run-{before}" for before in range(1, token)
        ]
        assert replace(pointer, previously_published=(), catalog_id=None) == Pointer(
            fencing_token=token,
            run_id=f"run-{token}",
            run_date="2026-01-01",
            snapshot=f"snapshots/{token}",
            lease=None,
        )


@pytest.mark.parametrize("fault", ["lost", "cut"])
def test_a_lease_survives_lost_answers(proxy: FaultyS3, root: str, fault: Fault) -> None:
    require_swaps(root)
    proxy.misbehave([fault], "PUT /")
    with hold_lease(root, "run", 60) as lease:
        assert faults(proxy) == [fault]
        assert lease.fencing_token == 1
        proxy.misbehave([fault], "PUT /")
        lease.publish(run_id="run", run_date="2026-01-01", snapshot="snapshots/run")
        assert faults(proxy) == [fault]
        proxy.misbehave([fault], "PUT /")
    assert faults(proxy) == [fault]
    assert without_id(root) == Pointer(
        fencing_token=1, run_id="run", run_date="2026-01-01", snapshot="snapshots/run"
    )


@pytest.mark.parametrize(
    ("fault", "method"), [("gone", "PUT"), ("gone", "HEAD"), ("cut", "GET"), ("error", "")]
)
def test_a_temporary_outage_does_not_lose_the_lease(
    proxy: FaultyS3, root: str, fault: Fault, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(S3FileSystem, "retries", 1)  # each heartbeat then fails without a retry
    with hold_lease(root, "run", 1.2) as lease:
        proxy.misbehave(forever(fault), method)
        while len(faults(proxy)) < 8:
            time.sleep(0.02)
        proxy.misbehave([])
        before = read_pointer(root)[0].lease
        while read_pointer(root)[0].lease == before:
            time.sleep(0.05)
        lease.check()
        assert lease.lost is None
        assert lease.fencing_token == 1
        assert [thread.name for thread in threading.enumerate()].count("lease") == 1


def test_a_healthy_file_is_not_damaged_by_an_answer_that_is_cut_off(proxy: FaultyS3, root: str) -> None:
    write_snapshot(root, rows_per_group=100)
    snapshot = read_catalog(root)
    expected = snapshot.table("items")
    for fault in FAULTS:
        proxy.misbehave([fault] * 2, "HEAD /")
        assert snapshot.table("items").equals(expected)
        assert snapshot.dataset("items").count_rows() == expected.num_rows
        assert [request for request in proxy.requests if request.method == "HEAD"] == []


def test_an_export_to_a_disk_ends_in_one_line_when_the_store_goes_down(
    proxy: FaultyS3,
    root: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Ray's workers have their own store settings, so the exports work in this process."""
    monkeypatch.setattr(S3FileSystem, "retries", 1)
    once = pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=1)
    monkeypatch.setattr(pyarrow.fs, "AwsStandardS3RetryStrategy", lambda max_attempts: once)
    for module in (image_objects, key_values):
        monkeypatch.setattr(module, "for_each_bucket", partial(for_each_bucket, in_process=True))
    write_snapshot(root, rows_per_group=100)
    snapshot = read_catalog(root)
    exports: list[Callable[[], Any]] = [
        lambda: key_values.export_key_values(snapshot, f"{tmp_path}/values", "jsonl"),
        lambda: image_objects.export_images(snapshot, f"{tmp_path}/images", "/images"),
        lambda: register_snapshot(snapshot, f"sqlite:////{tmp_path}/iceberg.db", str(tmp_path), "rebeca"),
        lambda: snapshot.table("items"),
        lambda: verify(snapshot, "full"),
        lambda: collect(root, keep=1, grace_hours=1),
    ]
    for export in exports:
        proxy.misbehave(itertools.chain([""], forever("gone")))
        with pytest.raises(SystemExit) as ended, plain_errors():
            export()
        assert ended.value.code == 75
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")


DOWN: dict[str, Callable[[str], Any]] = {
    "read_json": lambda root: read_json(f"{root}/one.json"),
    "read_table": lambda root: read_table(f"{root}/items", "items"),
    "write_json": lambda root: write_json({"a": 2}, f"{root}/one.json"),
    "write_table": lambda root: write_table(TABLE, f"{root}/items/b.parquet", row_group_size=10),
    "list_files": list_files,
    "list_folders": list_folders,
    "delete": lambda root: delete(f"{root}/one.json"),
    "read_pointer": read_pointer,
    "change_pointer": lambda root: change_pointer(root, lambda pointer: replace(pointer, fencing_token=7)),
    "hold_lease": lambda root: hold_lease(root, "run", 60).__enter__(),
}


WRITES = ["write_json", "write_table", "change_pointer", "hold_lease"]


@pytest.mark.parametrize(
    ("fault", "methods", "ends"),
    [
        ("slow down", "", list(DOWN)),
        ("error", "", list(DOWN)),
        ("gone", "", list(DOWN)),
        ("cut", "GET /", [name for name in DOWN if name not in ("write_json", "write_table")]),
        ("error", "PUT /", WRITES),
    ],
)
def test_a_permanent_outage_ends_with_a_one_line_error(
    proxy: FaultyS3,
    root: str,
    fault: Fault,
    methods: str,
    ends: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(S3FileSystem, "retries", 2)
    write_json({"a": 1}, f"{root}/one.json")
    write_table(TABLE, f"{root}/items/a.parquet", row_group_size=100)
    change_pointer(root, lambda _: Pointer(fencing_token=1))
    proxy.misbehave(forever(fault), methods)
    for name in ends:
        with pytest.raises(SystemExit) as ended, plain_errors():
            DOWN[name](root)
        assert ended.value.code == 75
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert root.removeprefix("s3://") in line
        assert "cannot be " in line
    proxy.misbehave([])
    assert without_id(root) == Pointer(fencing_token=1)
    assert read_json(f"{root}/one.json") == {"a": 1}
    assert list_files(root) == [f"{root}/items/a.parquet", f"{root}/latest.json", f"{root}/one.json"]
    assert read_table(f"{root}/items", "items").equals(TABLE)
