"""The pointer, on disk and on a real S3 server.

Every change is kept. A damaged or unreachable pointer never counts as empty.
"""

import fcntl
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from s3fs import S3FileSystem

from rebeca_ray.catalog import pointer as module
from rebeca_ray.catalog.pointer import TRIES, Pointer, change_pointer, read_pointer, swap
from rebeca_ray.errors import InputError, LeaseHeldError, StorageError, UserError
from rebeca_ray.storage import local
from rebeca_ray.storage.filesystem import join, open_filesystem
from rebeca_ray.storage.store import Store, open_store
from tests.catalog.conftest import Start, begin
from tests.catalog.worker import COUNT

PUBLISHED = Pointer(fencing_token=3, run_id="a", run_date="2026-01-01", snapshot="snapshots/a", forced=True)


def put(root: str, data: bytes) -> None:
    filesystem, path = open_filesystem(join(root, "latest.json"))
    filesystem.pipe_file(path, data)


def test_a_pointer_reads_as_it_was_written(root: str) -> None:
    assert read_pointer(root) == (Pointer(), None)
    assert change_pointer(root, lambda _: PUBLISHED) == PUBLISHED
    pointer, version = read_pointer(root)
    assert pointer == PUBLISHED
    assert change_pointer(root, lambda pointer: replace(pointer)) == PUBLISHED
    assert read_pointer(root)[1] == version  # a change to nothing writes nothing
    put(root, b'{"fencing_token": 4, "of_a_later_version": 1}')
    assert read_pointer(root)[0] == Pointer(fencing_token=4)


def test_a_version_3_pointer_reads_under_the_current_names(root: str) -> None:
    version_3 = {
        "epoch": 7,
        "run_id": "b",
        "run_date": "2026-01-02",
        "snapshot": "snapshots/b",
        "forced": False,
        "lease": {"run_id": "c", "epoch": 7, "holder": "c", "beat": 3, "seconds": 60.0},
        "left": [{"run_id": "a", "at": "2026-01-02T03:04:05+00:00"}],
    }
    put(root, json.dumps(version_3).encode())
    expected = Pointer(
        fencing_token=7,
        run_id="b",
        run_date="2026-01-02",
        snapshot="snapshots/b",
        lease={"run_id": "c", "fencing_token": 7, "holder": "c", "beat": 3, "seconds": 60.0},
        previously_published=({"run_id": "a", "replaced_at": "2026-01-02T03:04:05+00:00"},),
    )
    assert read_pointer(root)[0] == expected
    freed = change_pointer(root, lambda pointer: replace(pointer, lease=None))
    assert freed == read_pointer(root)[0] == replace(expected, lease=None)
    filesystem, path = open_filesystem(join(root, "latest.json"))
    stored = json.loads(filesystem.cat_file(path))
    assert stored["fencing_token"] == 7
    assert not {"epoch", "left"} & set(stored)


def test_concurrent_changes_of_several_processes_are_all_kept(root: str, start: Start) -> None:
    processes = [start(root, name, "count") for name in "abc"]
    begin(*processes)
    results = [(process.communicate(timeout=60)[1], process.returncode) for process in processes]
    assert results == [("", 0)] * 3
    pointer = read_pointer(root)[0]
    assert pointer.fencing_token == 3 * COUNT
    assert pointer.snapshot in [f"{name}-{COUNT - 1}" for name in "abc"]


def test_an_error_of_a_change_is_raised_and_nothing_is_written(root: str) -> None:
    change_pointer(root, lambda _: PUBLISHED)

    def refuse(pointer: Pointer) -> Pointer:
        raise LeaseHeldError(f"token {pointer.fencing_token} is enough")

    with pytest.raises(LeaseHeldError, match=r"^token 3 is enough$"):
        change_pointer(root, refuse)
    changed = change_pointer(root, lambda pointer: replace(pointer, fencing_token=4))  # the lock is free
    assert changed.fencing_token == 4


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"\xff",
        b"[]",
        b'"fencing_token"',
        b"7",
        b"null",
        b'{"fencing_token": "3"}',
        b'{"lease": {}}',
        b'{"lease": 7}',
    ],
)
def test_a_damaged_pointer_gives_one_line_and_never_an_empty_catalog(root: str, data: bytes) -> None:
    put(root, data)
    expected = (
        rf"^catalog {root}: latest.json is damaged; remove it, and publish one of the snapshots "
        r"that `rebeca catalog list` shows$"
    )
    with pytest.raises(InputError, match=expected):
        read_pointer(root)
    with pytest.raises(InputError, match=expected):
        change_pointer(root, lambda _: PUBLISHED)
    filesystem, path = open_filesystem(join(root, "latest.json"))
    assert filesystem.cat_file(path) == data


@pytest.fixture
def s3_root(s3_server: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(S3FileSystem, "_cache", {})
    return f"s3://rebeca/{tmp_path.name}"


def test_a_stale_version_is_refused(s3_root: str) -> None:
    assert swap(s3_root, Pointer(fencing_token=1), None)
    _, first = read_pointer(s3_root)
    assert swap(s3_root, Pointer(fencing_token=2), first)
    assert not swap(s3_root, Pointer(fencing_token=7), first)
    assert not swap(s3_root, Pointer(fencing_token=7), None)
    assert not swap(s3_root, Pointer(fencing_token=7), '"stale"')
    assert not swap(f"{s3_root}/none", Pointer(fencing_token=7), first)  # it was removed meanwhile
    assert read_pointer(s3_root)[0] == Pointer(fencing_token=2)


def test_a_refused_change_is_repeated_on_the_current_pointer(s3_root: str) -> None:
    seen = []

    def publish_b(pointer: Pointer) -> Pointer:
        seen.append(pointer.fencing_token)
        if len(seen) < 3:
            change_pointer(s3_root, lambda other: replace(other, fencing_token=other.fencing_token + 1))
        return replace(pointer, snapshot="b")

    assert change_pointer(s3_root, publish_b) == Pointer(fencing_token=2, snapshot="b")
    assert seen == [0, 1, 2]
    assert read_pointer(s3_root)[0] == Pointer(fencing_token=2, snapshot="b")


def test_a_change_that_always_loses_the_race_ends(s3_root: str) -> None:
    def always_late(pointer: Pointer) -> Pointer:
        change_pointer(s3_root, lambda other: replace(other, fencing_token=other.fencing_token + 1))
        return replace(pointer, snapshot="b")

    with pytest.raises(
        LeaseHeldError, match=rf"^catalog {s3_root}: latest.json was changed by others {TRIES} times in a row"
    ):
        change_pointer(s3_root, always_late)
    assert read_pointer(s3_root)[0] == Pointer(fencing_token=TRIES)


def through(filesystem: Any) -> Callable[[str], Store]:
    """Return an `open_store` that gives its stores another filesystem."""

    def opened(uri: str) -> Store:
        store = open_store(uri)
        store.filesystem = filesystem
        return store

    return opened


class LostAnswer:
    """An S3 file system that stores a conditional write, but answers 412 to the client's second try."""

    def __init__(self, real: Any) -> None:
        self.real = real
        self.written = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def pipe_file(self, path: str, data: bytes, **condition: str) -> None:
        self.written += 1
        self.real.pipe_file(path, data, **condition)
        self.real.pipe_file(path, data, **condition)


def test_a_stored_change_with_a_lost_answer_is_no_lost_race(
    s3_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    filesystem, _ = open_filesystem(s3_root)
    lost = LostAnswer(filesystem)
    monkeypatch.setattr(module, "open_store", through(lost))
    for token in (1, 2):
        changed = change_pointer(
            s3_root, lambda pointer: replace(pointer, fencing_token=pointer.fencing_token + 1)
        )
        assert changed == Pointer(fencing_token=token)
    assert lost.written == 2
    assert read_pointer(s3_root)[0] == Pointer(fencing_token=2)


class Refusing:
    """An S3 file system that allows reads and denies writes."""

    def __init__(self, real: Any) -> None:
        self.real = real
        self.written = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def pipe_file(self, path: str, data: bytes, **condition: str) -> None:
        self.written += 1
        raise PermissionError("Access Denied. Request 4127409")


def test_a_denied_write_is_no_lost_race(s3_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    filesystem, _ = open_filesystem(s3_root)
    denied = Refusing(filesystem)
    monkeypatch.setattr(module, "open_store", through(denied))
    with pytest.raises(
        (InputError, StorageError),
        match=rf"^{s3_root}/latest.json: cannot be written \(Access Denied. Request 4127409\)",
    ):
        change_pointer(s3_root, lambda _: PUBLISHED)
    assert denied.written == 1


def test_others_may_read_the_pointer_and_a_file_uri_equals_the_path(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    change_pointer(f"file://{tmp_path}/catalog", lambda _: PUBLISHED)
    assert (tmp_path / "catalog/latest.json").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert read_pointer(f"{tmp_path}/catalog") == read_pointer(f"file://{tmp_path}/catalog")
    assert read_pointer(f"{tmp_path}/catalog/")[0] == PUBLISHED
    assert json.loads((tmp_path / "catalog/latest.json").read_text())["snapshot"] == "snapshots/a"
    assert sorted(path.name for path in (tmp_path / "catalog").iterdir()) == [".latest.lock", "latest.json"]


def test_a_root_that_is_a_file_gives_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=rf"^catalog {tmp_path}/file: cannot be read \(Not a directory\); check the path"
    ):
        read_pointer(f"{tmp_path}/file")
    with pytest.raises(UserError, match=rf"^catalog {tmp_path}/file: cannot be read \(Not a directory\)"):
        change_pointer(f"{tmp_path}/file", lambda _: PUBLISHED)


def test_a_forbidden_s3_root_gives_one_line(s3_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change_pointer(s3_root, lambda _: PUBLISHED)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    monkeypatch.setattr(S3FileSystem, "_cache", {})
    with pytest.raises(
        UserError,
        match=rf"^catalog {s3_root}: cannot be read \(Forbidden\); check the path and the credentials$",
    ):
        change_pointer(s3_root, lambda _: Pointer())


def test_a_lock_that_is_never_freed_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "LOCK_SECONDS", 0.1)
    with (tmp_path / ".latest.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(
            UserError, match=r"\.latest\.lock: another process has held it for 0\.1 s; end that process"
        ):
            change_pointer(str(tmp_path), lambda now: replace(now, fencing_token=1))
    assert change_pointer(str(tmp_path), lambda now: replace(now, fencing_token=1)).fencing_token == 1
